"""Measure the structure of hf_eagle's code, and enforce its walls (import rules and limits).

    python scripts/dev/count_house.py                 one table: before, now, limit
    python scripts/dev/count_house.py --list          and every place that was counted, with file and line
    python scripts/dev/count_house.py --batch         also the way of one batch; runs a step of training (15 s)
    python scripts/dev/count_house.py --check         fails when a wall is broken, and says where; `make lint` runs it

The walls: no room imports a higher one, rooms do not form circles, what servers do is restated without `drafts/`, few
loose files, few branches on the kind of draft, a short README, and no docstring that cites what is not there.
`hf_eagle/docs/rooms.md` explains them; `house/` beside this file says how each is counted. Needs nothing but Python;
`--batch` needs what tests need.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from house.batch import way_of_a_batch
from house.branches import find_branches
from house.pages import lost_citations, pages
from house.style import style_measures
from house.tree import Package, read_modules
from house.walls import circles, serving_wall, upward_imports


ROOT = Path(__file__).resolve().parents[2]
# counted by hand at commit ea890db, before there were rooms; `-` where there was nothing to count
BEFORE = {
    "loose files under hf_eagle/": "24",
    "branches on the kind of draft": "92",
    "tests of a capability": "23",
    # by `--batch`; by hand, where properties and a target's inside were left out, 18 files and 27 hops
    "files that are given a batch": "8",
    "files of a batch, with all that they call": "23",
    "hops of a batch": "52",
    "file lines, median / p90 / max": "132 / 265 / 391",
    "function lines, median / p90 / max": "9 / 28 / 87",
    "blank lines per 100 inside functions": "1.4",
    "bodies >= 20 lines without blank line or comment, %": "53",
    "lines with a comment per 100 written ones": "2.5",
    "README, bytes": "25,000",
}


# limit, places, held, least
STYLE_LIMITS = {
    "README, bytes": (9_000, None, True),
    "blank lines per 100 inside functions": (5, None, False, True),
    "bodies >= 20 lines without blank line or comment, %": (10, None, False),
}


@dataclass
class Measure:
    """A row of the table.

    Attributes:
        name: what is counted.
        now: the count.
        limit: the most there may be, or the least; `None` for what is only looked at.
        places: one line for each thing counted, for whoever has to change it.
        held: whether `--check` fails beyond the limit.
        least: whether the limit is the least.
    """

    name: str
    now: str
    limit: int | None = None
    places: list[str] | None = None
    held: bool = False
    least: bool = False

    @property
    def beyond(self) -> bool:
        if self.limit is None or self.now == "-":
            return False
        now = float(self.now.replace(",", ""))
        return now < self.limit if self.least else now > self.limit

    @property
    def broken(self) -> bool:
        return self.held and self.beyond

    @property
    def bound(self) -> str:
        return "" if self.limit is None else f"at {'least' if self.least else 'most'} {self.limit:,}"


def measures(root: Path) -> list[Measure]:
    """All that can be counted without running anything."""
    package, scripts = Package(read_modules(root, "hf_eagle")), read_modules(root, "scripts")
    modules = list(package.modules.values())
    branches, capabilities = find_branches(package, scripts)

    def counted(name: str, places: list, limit: int | None, held: bool = True) -> Measure:
        return Measure(name, str(len(places)), limit, [str(place) for place in places], held)

    rows = [
        counted("upward imports", upward_imports(package), 0),
        counted("circles of rooms", circles(package), 0),
        counted("serving's rules that come to drafts/", serving_wall(package), 0),
        counted("loose files under hf_eagle/", [module.path for module in modules if module.loose], 6),
        counted("branches on the kind of draft", branches, 15),
        counted("tests of a capability", capabilities, None, held=False),
        counted("docstrings that cite what is not there", lost_citations(modules, root), 0),
    ]
    readme = root / "README.md"
    style = style_measures(modules, readme.stat().st_size if readme.is_file() else 0)
    rows += [Measure(name, value, *STYLE_LIMITS.get(name, ())) for name, value in style.items()]
    if written := pages(root):
        rows.append(Measure("pages of docs", str(len(written)), 10, written, held=True, least=True))
    return rows


def batch_measures(root: Path) -> list[Measure]:
    """The way of one batch; see `house/batch.py`."""
    seen = way_of_a_batch(root)
    width = max(map(len, seen.files))
    way = [f"{number:3} {caller:{width}} -> {file}: {name}" for number, (caller, file, name) in enumerate(seen.hops, 1)]
    return [
        Measure("files that are given a batch", str(len(seen.holders)), 10, list(seen.holders), held=True),
        Measure("files of a batch, with all that they call", str(len(seen.files)), None, list(seen.files)),
        Measure("hops of a batch", str(len(seen.hops)), None, way),
    ]


def table(rows: list[Measure]) -> str:
    """Measure, before, now, limit; what is above its limit is marked."""
    lines = [("measure", "before", "now", "limit")]
    for row in rows:
        lines.append((row.name, BEFORE.get(row.name, "-"), row.now, row.bound + ("  <- beyond" if row.beyond else "")))

    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="print broken walls only, and fail if there are any")
    parser.add_argument("--list", action="store_true", help="print every place that was counted")
    parser.add_argument("--batch", action="store_true", help="run one step of training and follow its batch")
    parser.add_argument("--root", type=Path, default=ROOT, help="another clone to count (default: this one)")
    options = parser.parse_args()

    rows = measures(options.root.resolve())
    if options.batch:
        rows += batch_measures(options.root.resolve())
    broken = [row for row in rows if row.broken]
    if not options.check:
        print(table(rows))

    for row in rows if options.list else broken if options.check else [r for r in rows if r.name == "hops of a batch"]:
        if row.places or row.broken:
            print(f"\n{row.name}: {row.now}" + (f", {row.bound}" if row.bound else ""))
        if row.places:
            print("\n".join(f"  {place}" for place in row.places))
    return int(options.check and bool(broken))


if __name__ == "__main__":
    sys.exit(main())
