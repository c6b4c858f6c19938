"""Put the decoding code beside a draft, so that plain transformers can use it: a repository's `custom_generate/`.

The files are this package's own source, as far as decoding with this draft reaches it, see `reachable.py`. The modules
of a room follow each other in one file. There is no second copy to keep up.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from textwrap import wrap

from ..drafts.kinds import KINDS, architectures_of
from .reachable import Reachable


PACKAGE = Path(__file__).resolve().parents[1]
ENTRY = "hub.generate_entry"
FOLDER = "custom_generate"
# methods that torch and transformers call where a draft is loaded and decodes; training and saving have others
CALLED = ("forward", "update", "get_seq_length", "get_mask_sizes", "_init_weights", "_validate_yarn_rope_parameters")
# a draft is called to be trained: what it decodes with is `decode`
LEFT_OUT = ("UnrolledDraft.forward",)
# the table of kinds looks its modules up by name, which nobody could follow to the files that are needed
TABLE = "drafts.kinds"
_TABLE = '''def class_of(architectures):
    """The class of drafts that the first known one of these names; `None` if none is known."""
    return next((_CLASSES[name] for name in architectures if name in _CLASSES), None)


def architecture_names():
    """Every known name."""
    return sorted(_CLASSES)


'''
_HEADER = "# Parts of hf_eagle, copied when this draft was published; the source is there: "
_LINE = 119


def write_custom_generate(folder: str | Path, repo_id: str | None = None) -> Path:
    """
    Write `custom_generate/` into a draft's folder.

    Args:
        folder (`str` or `Path`):
            The draft's folder.
        repo_id (`str`, *optional*):
            Where the draft is published, so that `generate` finds it by itself. Without one its `draft` must be passed.

    Returns:
        `Path`: the folder that was written; an earlier one is replaced.
    """
    written = Path(folder) / FOLDER
    written.mkdir(exist_ok=True)
    for old in written.glob("*.py"):
        old.unlink()
    for name, source in bundle(repo_id, architectures_of(folder)).items():
        (written / name).write_text(source)
    return written


def bundle(repo_id: str | None = None, architectures: Iterable[str] = ()) -> dict[str, str]:
    """Sources by file name: `generate.py`, and a file for each room of this package that it needs.

    Args:
        repo_id: where the draft is published.
        architectures: of the draft's config.json; the first known one is carried, and all are where none is known.

    Returns:
        Nothing for a kind of draft that is no part of this package: its code lies elsewhere.

    Raises:
        ValueError: for source that cannot be bundled, in one sentence.
    """
    known = {name: kind for kind in KINDS.values() for name in kind.architectures}
    first = next((name for name in architectures if name in known), None)
    carried = {name: kind for name, kind in known.items() if first in (None, name)}
    carried = {name: kind for name, kind in carried.items() if kind.package.startswith(f"{PACKAGE.name}.")}
    if not carried:
        return {}

    reached = Reachable(PACKAGE, CALLED, LEFT_OUT, {TABLE: _table_of(carried)})
    reached.add(ENTRY, "generate")
    files = joined_rooms(reached)

    entry = files["generate.py"]
    files["generate.py"] = entry.replace("\nDRAFT = None\n", f"\nDRAFT = {repo_id!r}\n", 1)
    return files


def joined_rooms(reached: Reachable) -> dict[str, str]:
    """Sources by file name of what is reached, the modules of each room in one file.

    Raises:
        ValueError: if a name means two things in a file.
    """
    rooms = defaultdict(dict)
    for module, kept in reached.kept().items():
        rooms[_room_of(module)][module] = kept
    return {f"{room}.py": _joined(room, modules, reached) for room, modules in sorted(rooms.items())}


def _joined(room: str, modules: dict[str, dict[str, set[str]]], reached: Reachable) -> str:
    bound, libraries, rooms, parts = {}, set(), defaultdict(set), []
    for name, kept in modules.items():
        module = reached.modules[name]
        for used in reached.imported.get(name, ()):
            if used in module.absolute:
                _bind(bound, used, module.absolute[used], name)
                libraries.add(module.absolute[used])
            elif (other := _room_of(module.relative[used][0])) != room:
                _bind(bound, used, f"from .{other}", name)
                rooms[f".{other}"].add(used)

        # what several modules define alike, such as a logger, is there once
        new = {used: kept[used] for used in kept if _bind(bound, used, module.text({used: kept[used]}), name)}
        parts.append(module.text(new))
    origins = ", ".join(f"{name.replace('.', '/')}.py" for name in modules)
    header = "\n".join(wrap(f"{_HEADER}{origins}.", _LINE, subsequent_indent="# "))
    text = "\n\n".join(filter(None, [header, _imports(libraries, rooms), *parts])) + "\n"
    # one blank line between definitions: this copy is read, and never edited
    return re.sub(r"\n{3,}", "\n\n", text)


def _bind(bound: dict[str, tuple[str, str]], name: str, meaning: str, module: str) -> bool:
    """Whether the name is new in its file; `ValueError` if it means something else there."""
    known, where = bound.setdefault(name, (meaning, module))
    if known != meaning:
        raise ValueError(f"`{name}` means one thing in {where} and another in {module}: rename one of the two.")
    return where == module


def _imports(libraries: set[str], rooms: dict[str, set[str]]) -> str:
    """Import statements, those from one module in one."""
    names = defaultdict(set)
    for line in libraries:
        if line.startswith("from "):
            module, _, name = line.removeprefix("from ").partition(" import ")
            names[module].add(name)
    plain = sorted(line for line in libraries if line.startswith("import "))
    return "\n".join(plain + [_import_line(*found) for found in (*sorted(names.items()), *sorted(rooms.items()))])


def _import_line(module: str, names: set[str]) -> str:
    line = f"from {module} import {', '.join(sorted(names))}"
    if len(line) <= _LINE:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in sorted(names)) + ")"


def _room_of(module: str) -> str:
    return "generate" if module == ENTRY else module.partition(".")[0]


def _table_of(carried: dict) -> str:
    """The table of kinds as it travels: their classes, imported in plain sight."""
    imports = [
        f"from .{kind.package.removeprefix(f'{PACKAGE.name}.drafts.')}.{kind.architectures[name]} import {name}"
        for name, kind in carried.items()
    ]
    classes = ", ".join(f'"{name}": {name}' for name in carried)
    return "\n".join(imports) + f"\n\n\n{_TABLE}_CLASSES = {{{classes}}}\n"
