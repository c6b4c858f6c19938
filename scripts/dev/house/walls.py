"""Which room may import which: the order of rooms, circles, and what servers' rules must not know.

An import counts wherever it stands: at the start of a file, inside a function, or for type checkers only. A late import
hides a circle from Python, not from a reader.
"""

from collections import deque

from house.tree import HALL, PACKAGE, Import, Module, Package


# lowest first; hf_eagle/docs/rooms.md gives the reasons
ORDER = (
    *("door", "data", "targets", "losses", "decoding", "drafts", "arguments", "store", "evaluation"),
    *("answers", "foreign", "serving", "diagnosis", "hub", "training", "benchmark", "docs"),
)
# the programs of the hall: they start the rooms, and no room asks them for anything
PROGRAMS = (f"{PACKAGE}.cli", f"{PACKAGE}.__main__", f"{PACKAGE}.commands")
OUTSIDE = ("scripts", "tests")
# of serving/: what servers do, restated from their sources; what hf_eagle writes must not leak into it
RESTATED = ("rules", "kinds", "served_math")


def upward_imports(package: Package) -> list[str]:
    """Every import of a higher room, `file:line: reason`; and every room that has no place in the order."""
    rooms = {module.room for module in package.modules.values()} - {HALL}
    strangers = [
        f"{PACKAGE}/{room}/: this room has no place in the order of rooms" for room in sorted(rooms - {*ORDER})
    ]

    judged = [(found, _wrong(package, found)) for found in package.imports]
    return strangers + [f"{found.place}: {reason}" for found, reason in judged if reason]


def _wrong(package: Package, found: Import) -> str | None:
    """Why an import is upward; `None` if it is not."""
    source, top = found.source.room, found.target.split(".")[0]
    if top in OUTSIDE:
        return f"the package imports {top}/"
    if top != PACKAGE:
        return None

    target = package.room_of(found.target)
    if source == HALL:
        early = target != HALL and found.at_start
        return f"the hall imports {target}/ as it is imported itself: do it inside a function" if early else None
    if target == HALL:
        return f"{source}/ imports {found.target}" if found.target in PROGRAMS else None

    known = source in ORDER and target in ORDER
    return f"{source}/ imports {target}/" if known and ORDER.index(source) < ORDER.index(target) else None


def circles(package: Package) -> list[str]:
    """Rooms that reach each other, one line a circle, with an import for each of its arrows."""
    arrows: dict[tuple[str, str], str] = {}
    for found in package.imports:
        pair = (found.source.room, package.room_of(found.target))
        if HALL not in pair and pair[0] != pair[1]:
            arrows.setdefault(pair, found.place)

    rooms = sorted({room for pair in arrows for room in pair})
    reached = {room: _reach(room, arrows) for room in rooms}
    groups = {tuple(b for b in rooms if a in reached[b] and b in reached[a]) for a in rooms if a in reached[a]}

    lines = []
    for group in sorted(groups):
        inside = [f"{a} -> {b} ({place})" for (a, b), place in sorted(arrows.items()) if a in group and b in group]
        lines.append(f"{', '.join(group)}: {'; '.join(inside)}")
    return lines


def _reach(start: str, arrows: dict[tuple[str, str], str]) -> set[str]:
    """Every room that can be reached from one by at least one arrow."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        room = waiting.pop()
        following = {b for a, b in arrows if a == room} - reached
        reached |= following
        waiting += following
    return reached


def serving_wall(package: Package) -> list[str]:
    """Restated modules of `serving/` that come to `drafts/`, directly or through others, with the way there."""
    following: dict[str, list[Import]] = {}
    for found in package.imports:
        following.setdefault(found.source.name, []).append(found)

    ways = [_way_to_drafts(package, module, following) for module in package.modules.values() if is_restated(module)]
    return [way for way in ways if way]


def is_restated(module: Module) -> bool:
    """Return whether a module says what servers do: `serving/rules*`, `serving/kinds*` and `serving/served_math*`."""
    parts = module.path.split("/")
    return module.room == "serving" and parts[2].startswith(RESTATED)


def _way_to_drafts(package: Package, start: Module, following: dict[str, list[Import]]) -> str | None:
    """The shortest chain of imports from a module into `drafts/`, `None` if there is none."""
    waiting, seen = deque([(start.name, ())]), {start.name}
    while waiting:
        name, way = waiting.popleft()
        for found in following.get(name, ()):
            if package.room_of(found.target) == "drafts":
                steps = [*(step.place for step in way), found.place]
                return f"{steps[0]}: comes to {found.target} by {' -> '.join(steps)}"

            inner = found.target in package.modules and package.room_of(found.target) != HALL
            if inner and found.target not in seen:
                seen.add(found.target)
                waiting.append((found.target, (*way, found)))
    return None
