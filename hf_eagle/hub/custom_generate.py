"""Put the decoding code beside a draft, so that plain transformers can use it: a repository's `custom_generate/`.

The files are the part of this package's source that decoding with this draft needs, see `reachable.py`. The modules
of a room follow each other in one file. So there is no second copy to maintain.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from textwrap import wrap

from ..drafts.kinds import KINDS
from .reachable import Reachable


PACKAGE = Path(__file__).resolve().parents[1]
ENTRY = "hub.generate_entry"
FOLDER = "custom_generate"
# methods that torch and transformers call when a draft is loaded and decodes; training and saving call others
CALLED = (
    "forward",
    "update",
    "get_seq_length",
    "get_mask_sizes",
    "_init_weights",
    "get_config_dict",
    "_validate_yarn_rope_parameters",
)
LEFT_OUT = (
    # calling a draft is for training; decoding uses other methods
    *("UnrolledDraft.forward", "DFlashDraftModel.forward"),
    # every kind of this package has methods of its own in place of these
    *("EaglePreTrainedModel.proposer", "EaglePreTrainedModel.select_features"),
    "EaglePreTrainedModel.select_embeddings",
    # a row of the table below; what else is called `kind` does not mean it
    "EaglePreTrainedModel.kind",
    *("DraftAttention.query_projections", "DraftAttention.key_value_projections"),
)
# the table of kinds looks up its modules by name, so its source does not show which files are needed
TABLE = "drafts.kinds"
_TABLE = '''def class_of(architectures):
    """The class of drafts that the first known one of these names; `None` if none is known."""
    return next((_CLASSES[name] for name in architectures if name in _CLASSES), None)


def architecture_names():
    """Every known name."""
    return sorted(_CLASSES)


'''
# decoding compiles nothing, so a region is the function that it is made of
REGIONS = "regions"
_EAGER = """def region(function):
    \"\"\"The function itself: nothing is compiled for decoding.\"\"\"
    return lambda *tensors, training: function(*tensors)
"""
_HEADER = "# Parts of hf_eagle, copied when this draft was published; the source is there: "
_LINE = 119


def bundle(repo_id: str | None = None, architectures: Iterable[str] = ()) -> dict[str, str]:
    """Return sources by file name: `generate.py`, and a file for each room of this package that it needs.

    Args:
        repo_id: repository that the draft is published in.
        architectures: `architectures` of the draft's config.json; the code of the first known one is included, or of
            all if none is known.

    Returns:
        An empty `dict` for a kind of draft that is no part of this package.

    Raises:
        ValueError: if source cannot be bundled, in one sentence.
    """
    known = {name: kind for kind in KINDS.values() for name in kind.architectures}
    first = next((name for name in architectures if name in known), None)
    carried = {name: kind for name, kind in known.items() if first in (None, name)}
    carried = {name: kind for name, kind in carried.items() if kind.package.startswith(f"{PACKAGE.name}.")}
    if not carried:
        return {}

    reached = Reachable(PACKAGE, CALLED, LEFT_OUT, {TABLE: _table_of(carried), REGIONS: _EAGER})
    reached.add(ENTRY, "generate")
    files = joined_rooms(reached)

    entry = files["generate.py"]
    files["generate.py"] = entry.replace("\nDRAFT = None\n", f"\nDRAFT = {repo_id!r}\n", 1)
    return files


def joined_rooms(reached: Reachable) -> dict[str, str]:
    """Return the reached sources by file name, the modules of each room in one file.

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

        # a definition that several modules share, such as a logger, is written once
        new = {used: kept[used] for used in kept if _bind(bound, used, module.text({used: kept[used]}), name)}
        # who uses the entry reads all of its docstring; of the rest the source has more
        parts.append(module.text(new, brief=name != ENTRY))
    origins = ", ".join(f"{name.replace('.', '/')}.py" for name in modules)
    header = "\n".join(wrap(f"{_HEADER}{origins}.", _LINE, subsequent_indent="# "))
    text = "\n\n".join(filter(None, [header, _imports(libraries, rooms), *parts])) + "\n"
    # one blank line between definitions keeps the copy short
    return re.sub(r"\n{3,}", "\n\n", text)


def _bind(bound: dict[str, tuple[str, str]], name: str, meaning: str, module: str) -> bool:
    """Whether the name is new in its file; raise a `ValueError` if it already means something else there."""
    known, where = bound.setdefault(name, (meaning, module))
    if known != meaning:
        raise ValueError(f"`{name}` means different things in {where} and {module}: rename one of the two.")
    return where == module


def _imports(libraries: set[str], rooms: dict[str, set[str]]) -> str:
    """Return import statements, one per module."""
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
    """Return the published table of kinds: their classes, with explicit imports."""
    imports = [
        f"from .{kind.package.removeprefix(f'{PACKAGE.name}.drafts.')}.{kind.architectures[name]} import {name}"
        for name, kind in carried.items()
    ]
    classes = ", ".join(f'"{name}": {name}' for name in carried)
    return "\n".join(imports) + f"\n\n\n{_TABLE}_CLASSES = {{{classes}}}\n"
