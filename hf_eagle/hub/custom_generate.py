"""Put the decoding code beside a draft, so that plain transformers can use it: a repository's `custom_generate/`.

The files are this package's own modules, flattened into one folder with their imports rewritten; there is no second
copy to keep up.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from ..drafts.kinds import KINDS, architectures_of, find_kind


PACKAGE = Path(__file__).resolve().parents[1]
ENTRY = "hub.generate_entry"
FOLDER = "custom_generate"
# the table of kinds looks its modules up by name, which nobody could follow to the files that are needed
TABLE = "drafts.kinds"
_RELATIVE_IMPORT = re.compile(r"^(\s*from )(\.+)([\w.]*)( import )", re.MULTILINE)
_TABLE = '''"""The kinds of draft that travel with this one."""


class Kind:
    """Finds the class of a draft by its name."""

    @staticmethod
    def draft_class(architecture):
        return next(known for known in _CLASSES if known.__name__ == architecture)


def find_kind(architectures):
    """The kind and the name of the first of these that is known."""
    return next(((Kind, name) for name in architectures if name in architecture_names()), None)


def architecture_names():
    """Every known name."""
    return sorted(known.__name__ for known in _CLASSES)


# behind what they themselves import from here
'''
_HEADER = "# A module of hf_eagle, copied when this draft was published; the source is there.\n"


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
    """Sources by file name: `generate.py` and every module of this package that it needs.

    Args:
        repo_id: where the draft is published.
        architectures: of the draft's config.json, whose kind alone is carried; without a known one, all kinds are.

    Returns:
        Nothing for a kind of draft that is no part of this package: its code lies elsewhere.
    """
    found = find_kind(architectures)
    ours = [kind for kind in KINDS.values() if kind.package.startswith(f"{PACKAGE.name}.")]
    carried = ours if found is None else [kind for kind in ours if kind == found[0]]
    if not carried:
        return {}

    files, waiting = {}, [ENTRY]
    while waiting:
        module = waiting.pop()
        if _file_name(module) in files:
            continue
        source = PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text()
        source, needed = _flattened(_table_of(carried) if module == TABLE else source, module)
        files[_file_name(module)] = _HEADER + source
        waiting += needed
    entry = files[_file_name(ENTRY)]
    files[_file_name(ENTRY)] = entry.replace("\nDRAFT = None\n", f"\nDRAFT = {repo_id!r}\n", 1)
    return dict(sorted(files.items()))


def _table_of(kinds: list) -> str:
    """The table of kinds as it travels: their classes, imported in plain sight."""
    classes = {name: f"{kind.package}.{module}" for kind in kinds for name, module in kind.architectures.items()}
    imports = [
        f"from .{module.removeprefix(f'{PACKAGE.name}.drafts.')} import {name}  # noqa: E402"
        for name, module in classes.items()
    ]
    return _TABLE + "\n".join(imports) + f"\n\n\n_CLASSES = [{', '.join(classes)}]\n"


def _file_name(module: str) -> str:
    return "generate.py" if module == ENTRY else f"{module.replace('.', '_')}.py"


def _flattened(source: str, module: str) -> tuple[str, list[str]]:
    """A module whose relative imports all name files beside it, and the modules that these were."""
    needed = []

    def beside(match: re.Match) -> str:
        parts = module.split(".")[: -len(match[2])]
        needed.append(".".join([*parts, match[3]]))
        return f"{match[1]}.{_file_name(needed[-1]).removesuffix('.py')}{match[4]}"

    return _RELATIVE_IMPORT.sub(beside, source), needed
