"""Estimate the length of a text before a filter, method or operator of a chat template makes it.

One such call can take all memory: `|replace`, `.ljust`, `'%999999999d' % 1`. Estimates are upper bounds, cheap compared
with the call, and tight enough that no real template comes near a limit.
"""

import re
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any


_NUMBER = re.compile(r"\d{5,}")  # a width in a format string
_KEPT = (str, bytes)


def extent(value: Any, known: dict[int, int] | None = None) -> int:
    """Return the approximate length of a value as text; a repeated item of a list counts twice, but is visited once."""
    if isinstance(value, _KEPT):
        return len(value)
    if not isinstance(value, (list, tuple, dict)):
        return 8
    known = {} if known is None else known

    if id(value) not in known:
        known[id(value)] = 2  # in case it contains itself
        parts = (*value, *value.values()) if isinstance(value, dict) else value
        known[id(value)] = 2 + sum([2 + (len(p) if type(p) is str else extent(p, known)) for p in parts])
    return known[id(value)]


def formatted(text: Any, given: Iterable[Any]) -> int:
    """Return the size for `%`, `format` and the like, from the widths that a text names and the values put into it."""
    if not isinstance(text, _KEPT):
        return 0
    text, given = text if isinstance(text, str) else text.decode(errors="replace"), list(given)

    # a width may be a value too: `%*d`, `{:{}}`
    widths = [abs(one) for one in given if isinstance(one, int)] if "*" in text or re.search(r"\{[^}]*\{", text) else []

    places = text.count("%") + text.count("{")
    widest = max([*map(int, _NUMBER.findall(text)), *widths, *map(extent, given)], default=0)
    return len(text) + places * widest


def _padded(text, width=80, *_, **__) -> int:
    return width


def _replaced(text, old="", new="", *_, **__) -> int:
    old, new = str(old), str(new)
    longest = (len(text) + 1) * len(new)
    if longest < 4096 or not old:
        return len(text) + longest
    return len(text) + str(text).count(old) * len(new)


def _with_tabs(text, tabsize=8) -> int:
    return len(text) + text.count("\t" if isinstance(text, str) else b"\t") * max(tabsize, 0)


def _indented(text, width=4, *_, **__) -> int:
    return len(text) + (1 + text.count("\n")) * (len(width) if isinstance(width, str) else width)


def _wrapped(text, width=79, break_long_words=True, wrapstring=None, *_, **__) -> int:
    return len(text) + len(text) // max(width, 1) * len(wrapstring or "")


def _linked(text, *given, **named) -> int:
    return 4 * len(text) + len(str(text).split()) * sum(map(extent, (*given, *named.values())))


def _filled(items, linecount, *_, **__) -> int:
    return linecount


def _translated(text, table) -> int:
    return len(text) * max(map(extent, table.values()), default=1) if isinstance(table, dict) else len(text)


def _as_json(value, *given, indent=None, separators=None, **__) -> int:
    size = extent(value)
    deep = len(indent) if isinstance(indent, str) else indent or 0
    return size * (1 + deep) if deep > 16 else size


_METHODS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _padded),
    "replace": _replaced,
    "expandtabs": _with_tabs,
    "translate": _translated,
    "join": lambda text, items=(): extent(items) + len(text) * len(items) if hasattr(items, "__len__") else 0,
    "format": lambda text, *given, **named: formatted(text, (*given, *named.values())),
    "format_map": lambda text, named: formatted(text, named.values()),
}
FILTERS: dict[str, Callable[..., int]] = {
    "center": _padded,
    "replace": _replaced,
    "indent": _indented,
    "wordwrap": _wrapped,
    "urlize": _linked,
    "batch": _filled,
    "slice": _filled,
    "tojson": _as_json,
    "format": _METHODS["format"],
    **dict.fromkeys(
        ("string", "pprint", "xmlattr", "e", "escape", "forceescape"), lambda value, *_, **__: extent(value)
    ),
}


def made_by_call(called: Any, given: tuple, named: dict) -> int:
    """Return the size of a method's result; 0 for methods that make no long text."""
    size = _METHODS.get(getattr(called, "__name__", None))
    if size is None:
        return 0

    owner = getattr(getattr(called, "__wrapped__", called), "__self__", None)  # the sandbox wraps `format`
    return _asked(size, owner, given, named) if isinstance(owner, (*_KEPT, int)) else 0


def checked_filter(name: str, run: Callable, check: Callable[[int], None]) -> Callable:
    """Wrap a filter so that it first passes the size of its result to `check`."""
    first = int(hasattr(run, "jinja_pass_arg"))  # jinja passes a further argument before the value
    size = FILTERS[name]

    @wraps(run)
    def checked(*given, **named):
        check(_asked(size, given[first], given[first + 1 :], named))
        return run(*given, **named)

    return checked


def checked_gathering(run: Callable, check: Callable[[int], None]) -> Callable:
    """Wrap `join` or `sum`, which make one value of many: all items are collected, then sized."""

    @wraps(run)
    def checked(context, items, *given, **named):
        items = items if isinstance(items, (list, tuple, str)) else list(items)
        between = named.get("d", given[0] if given else "")
        check(extent(items) + len(items) * extent(between))
        return run(context, items, *given, **named)

    return checked


def _asked(size: Callable[..., int], value: Any, given: tuple, named: dict) -> int:
    try:
        found = size(value, *given, **named)
    except (AttributeError, TypeError, ValueError):  # the call itself reports a wrong argument better
        return 0
    return found if isinstance(found, int) else 0
