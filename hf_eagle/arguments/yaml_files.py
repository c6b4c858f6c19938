"""Read YAML files with limits, so that a small file cannot stand for gigabytes, and with words as they were written.

YAML takes `no`, `off`, `on` and `yes` for truth values, and 1.10 for a number. For an argument that takes text, they
stay text.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ..door.json_files import is_special


MOST_BYTES = 2**18  # of a file; recipes have a few thousand
MOST_VALUES = 20_000  # in a file; what an alias stands for counts each time
MOST_LEVELS = 50


def read_yaml(path: str | Path, argument: str) -> dict:
    """Return the names and values in a YAML file; `no` and `yes` stay words, since no type is known here.

    Args:
        path: the file.
        argument: the argument that named it, for errors.

    Raises:
        ValueError: naming the argument and the file, if it cannot be read, is not a mapping, or is too large.
    """
    loader, node = _composed(path, argument, _Words)
    return _constructed(loader, node, f"`{argument}` {path}")


class _Words(yaml.SafeLoader):
    """Leaves `no` and `yes` as they are written: arguments of truth values take these words too."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in known if not tag.endswith(":bool")]
        for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Words.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|false|on|off)$", re.IGNORECASE), [*"tTfFoO"]
)


def read_words(path: str | Path, argument: str, kind_of: Callable[[str], tuple[type, bool]]) -> dict[str, list[str]]:
    """Return the values in a YAML file as words of a command line, by argument; nulls are left out.

    Args:
        path: the file, which maps names of arguments to values.
        argument: the argument that named it, for errors.
        kind_of: returns the type of an argument's values (`str` for text), and whether it takes several of them;
            raises `ValueError` for an unknown argument.

    Raises:
        ValueError: as `read_yaml`, and naming an argument whose value it cannot take.
    """
    where = f"`{argument}` {path}"
    loader, node = _composed(path, argument)

    found = {}
    for key, value in node.value:
        name = loader.construct_object(key, deep=True)
        if not isinstance(name, str):
            raise ValueError(f"{where} must map names of arguments to values, but {name!r} is not a name.")
        kind, several = kind_of(name)

        # a list becomes several words, a mapping one word of JSON, and anything else the word as written
        if isinstance(value, yaml.SequenceNode):
            if not several:
                raise ValueError(f"{where} gives `{name}` a list, but it takes one value.")
            found[name] = [_word(loader, one, kind, f"{where}: a value of `{name}`") for one in value.value]
        elif isinstance(value, yaml.MappingNode):
            try:
                found[name] = [json.dumps(_constructed(loader, value, where))]
            except TypeError as problem:
                raise ValueError(f"{where} gives `{name}` values that JSON does not have: {problem}.") from None
        elif not value.tag.endswith(":null"):
            found[name] = [_word(loader, value, kind, f"{where}: `{name}`")]
    return found


def _composed(
    path: str | Path, argument: str, kind: type[yaml.SafeLoader] = yaml.SafeLoader
) -> tuple[yaml.SafeLoader, yaml.MappingNode]:
    """Return a file's nodes, and the loader that constructs values from them; refuse too many nodes."""
    where = f"`{argument}` {path}"
    if is_special(path):
        raise ValueError(f"{where} cannot be read: it is no ordinary file; name another.")

    # counted before anything is constructed: aliases can stand for gigabytes
    try:
        size = Path(path).stat().st_size
        if size > MOST_BYTES:
            raise ValueError(
                f"{where} has {size:,} bytes, more than any recipe (at most {MOST_BYTES:,}): name another file."
            )
        loader = kind(Path(path).read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            _count(node, {}, MOST_LEVELS)
            _refuse_repeated(node, where)
            loader.flatten_mapping(node)
    except FileNotFoundError:
        raise ValueError(f"{where} cannot be read: there is no such file.") from None
    except OSError as problem:
        raise ValueError(f"{where} cannot be read: {problem.strerror or problem}.") from None
    except (UnicodeError, yaml.YAMLError) as problem:
        raise ValueError(f"{where} cannot be read as YAML: {_in_a_line(problem)}.") from None
    except (_TooMuch, RecursionError) as problem:
        said = str(problem) if isinstance(problem, _TooMuch) else f"more than {MOST_LEVELS} levels"
        raise ValueError(f"{where} cannot be read: it holds {said}; write it without aliases, and flat.") from None

    if not isinstance(node, yaml.MappingNode):
        kind = {yaml.SequenceNode: "list", yaml.ScalarNode: "text"}.get(type(node), "nothing")
        raise ValueError(f"{where} must hold `argument: value` lines, got {kind}.")
    return loader, node


class _TooMuch(Exception):
    """A file has too many values or levels; the text says which."""


def _count(node: yaml.Node, known: dict[int, int], levels: int) -> int:
    """The number of values below a node, with an alias counted wherever it stands; nothing is constructed."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise _TooMuch("an alias of what it is part of")
        return known[id(node)]

    if levels == 0:
        raise _TooMuch(f"more than {MOST_LEVELS} levels")

    known[id(node)] = 0
    inside = node.value if not isinstance(node, yaml.ScalarNode) else []
    parts = [part for pair in inside for part in pair] if isinstance(node, yaml.MappingNode) else inside
    total = 1 + sum(_count(part, known, levels - 1) for part in parts)

    if total > MOST_VALUES:
        raise _TooMuch(f"more than {MOST_VALUES:,} values, its aliases written out")
    known[id(node)] = total
    return total


def _refuse_repeated(node: yaml.Node, where: str) -> None:
    """Raise `ValueError` for a name that stands twice in a mapping: YAML would let the last one win without a word."""
    if isinstance(node, yaml.ScalarNode):
        return

    if isinstance(node, yaml.MappingNode):
        seen = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            first = seen.setdefault(key.value, key)
            if first is not key:
                lines = f"{first.start_mark.line + 1} and {key.start_mark.line + 1}"
                raise ValueError(f"{where} gives `{key.value}` twice, in lines {lines}: leave one out.")

    for part in node.value:
        for child in part if isinstance(part, tuple) else [part]:
            _refuse_repeated(child, where)


def _constructed(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> Any:
    """Return the value of a node; raise `ValueError` if it has none, such as the date 2024-99-99."""
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, TypeError, OverflowError, yaml.YAMLError) as problem:
        raise ValueError(f"{where} cannot be read as YAML: {_in_a_line(problem)}.") from None


def _in_a_line(problem: Exception) -> str:
    """Return the YAML parser's message, with line and column but without its excerpt of the file."""
    if not isinstance(problem, yaml.MarkedYAMLError) or problem.problem_mark is None:
        return " ".join(str(problem).split())

    mark, context = problem.problem_mark, f"{problem.context}, " if problem.context else ""
    return f"{context}{problem.problem} (line {mark.line + 1}, column {mark.column + 1})"


def _word(loader: yaml.SafeLoader, node: yaml.Node, kind: type, where: str) -> str:
    """Return one value as a word of a command line."""
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null"):
        raise ValueError(f"{where} must be one text or number, but is a list, a mapping or null.")
    return node.value if kind is str else str(_constructed(loader, node, where))
