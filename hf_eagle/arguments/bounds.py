"""Bounds of numeric arguments: declared in the type of each, and checked in one place. This needs no torch.

    max_new_tokens: Count = field(default=64, metadata={"help": "Longest answer, in tokens."})

A number whose type has no bounds must be finite and fit into a signed integer of 32 bits.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


LIMIT = 2**31 - 1  # the largest signed integer of 32 bits; a type may state another limit


@dataclass(frozen=True)
class Bounds:
    """The range of a numeric argument. Without a lower bound it begins at `-LIMIT`.

    Args:
        least: smallest number.
        most: largest number; does not count if there is `below`.
        above: all numbers are greater than this.
        below: all numbers are smaller than this.
        kind: `int`, or `float`, with which whole numbers are accepted too.
        many: whether the argument is a list of such numbers.
    """

    least: float | None = None
    most: float = LIMIT
    above: float | None = None
    below: float | None = None
    kind: type = float
    many: bool = False

    def violation(self, value: Any) -> str | None:
        """Return what a value must be, as the rest of a sentence that says "must be"; `None` if it is allowed."""
        if not isinstance(value, Integral if self.kind is int else Real) or isinstance(value, bool):
            return "a whole number" if self.kind is int else "a number"
        if not math.isfinite(value):
            return "a finite number"

        least = -LIMIT if self.least is None and self.above is None else self.least
        most = self.most if self.below is None else None

        limits = (
            ("at least", least, operator.ge),
            ("above", self.above, operator.gt),
            ("below", self.below, operator.lt),
            ("at most", most, operator.le),
        )

        checked = [(word, limit, compare(value, limit)) for word, limit, compare in limits if limit is not None]
        if all(holds for *_, holds in checked):
            return None

        # the default limits are mentioned only if they are what the number exceeds
        return " and ".join(
            f"{word} {_shown(limit)}" for word, limit, holds in checked if abs(limit) != LIMIT or not holds
        )

    def told(self) -> str:
        """Return the range in words for `--help`: `at least 1`, `0 to 100`; empty for the default range."""
        most = None if self.most == LIMIT else self.most
        if self.least is not None and most is not None and self.above is None and self.below is None:
            return f"{_shown(self.least)} to {_shown(most)}"

        limits = (("at least", self.least), ("above", self.above), ("below", self.below), ("at most", most))
        return " and ".join(f"{word} {_shown(limit)}" for word, limit in limits if limit is not None)


def _shown(limit: float) -> str:
    return f"{limit:,}" if abs(limit) >= 10_000 else f"{limit:g}"


# types of numeric arguments
Count = Annotated[int, Bounds(least=1)]
Whole = Annotated[int, Bounds(least=0)]
Seed = Annotated[int, Bounds(least=0, most=2**32 - 1)]
Workers = Annotated[int, Bounds(least=1, most=4096)]  # processes, or connections
Depth = Annotated[int, Bounds(least=1, most=64)]  # TTT steps, or tokens that a draft proposes in a row
Rows = Annotated[int, Bounds(least=1, most=65_536)]  # rows of a batch
Turns = Annotated[int, Bounds(least=1, most=1000)]  # turns of a chat
Repeats = Annotated[int, Bounds(least=1, most=1000)]  # repetitions of a measurement
Port = Annotated[int, Bounds(least=1, most=65_535)]
Width = Annotated[int, Bounds(least=1, most=2**17)]  # width of a layer, or of a part of it
Shown = Annotated[int, Bounds(least=0, most=10_000)]  # conversations on a page or a screen
Positive = Annotated[float, Bounds(above=0)]
Weight = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, below=1)]
Mass = Annotated[float, Bounds(above=0, most=1)]
Temperature = Annotated[float, Bounds(least=0, most=100)]  # at higher ones, all tokens are about equally likely
Seconds = Annotated[float, Bounds(above=0, most=86400)]  # a day


def check_numbers(args: Any, values: Mapping[str, Any] | None = None) -> None:
    """Check every number among arguments, except those that are `None`.

    Args:
        args: a dataclass of arguments, or its class.
        values: the arguments' values by name; those of `args` if `None`.

    Raises:
        ValueError: if an argument is outside its bounds; the message names the first one.
    """
    group = args if isinstance(args, type) else type(args)
    for name, bounds in bounds_of(group).items():
        value = getattr(args, name) if values is None else values.get(name)
        if value is None:
            continue

        for item in value if bounds.many and isinstance(value, (list, tuple)) else [value]:
            requirement = bounds.violation(item)
            if requirement is not None:
                raise ValueError(f"`{name}` must be {requirement}, got {item!r}.")


@cache
def bounds_of(group: type) -> dict[str, Bounds]:
    """Return the bounds of every numeric field of a dataclass of arguments.

    The types of fields inherited from a library cannot state bounds, so those are in the dataclass's `_bounds`.
    """
    found, inherited = {}, getattr(group, "_bounds", {})
    for name, hint in get_type_hints(group, include_extras=True).items():
        bounds = _bounds_in(hint) if name in group.__dataclass_fields__ else None
        if bounds is not None:
            found[name] = _with_kind(inherited[name], bounds.kind, bounds.many) if name in inherited else bounds
    return found


def _bounds_in(hint: Any, many: bool = False) -> Bounds | None:
    """Return the bounds that a type states, the default ones if it states none; `None` if it is not a number's."""
    outer = get_origin(hint)
    if outer in (Union, UnionType):
        found = [_bounds_in(part, many) for part in get_args(hint)]
        return next((bounds for bounds in found if bounds is not None), None)

    if outer is list:
        return _bounds_in(get_args(hint)[0], many=True)
    if outer is Annotated:
        kind, *stated = get_args(hint)
        bounds = next((item for item in stated if isinstance(item, Bounds)), Bounds())
        return _with_kind(bounds, kind, many) if kind in (int, float) else None
    return Bounds(kind=hint, many=many) if hint in (int, float) else None


def _with_kind(bounds: Bounds, kind: type, many: bool) -> Bounds:
    return Bounds(bounds.least, bounds.most, bounds.above, bounds.below, kind, many)
