"""The bounds of numbers: declared with each argument, as its type, and checked in one place. No torch.

    max_new_tokens: Count = field(default=64, metadata={"help": "Longest answer, in tokens."})

A number of a type without bounds must be finite and lie within 32 bits.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


LIMIT = 2**31 - 1  # what counters in C hold; no argument needs more


@dataclass(frozen=True)
class Bounds:
    """The numbers that an argument takes: from `least`, or above `above`, up to `most`, or below `below`.

    Args:
        kind: `int` or `float`, which takes whole numbers too.
        many: for a list of such numbers.
    """

    least: float | None = None
    most: float = LIMIT
    above: float | None = None
    below: float | None = None
    kind: type = float
    many: bool = False

    def refuse(self, value: Any) -> str | None:
        """What a value must be, as the rest of a sentence; `None` if it is that."""
        if not isinstance(value, Integral if self.kind is int else Real) or isinstance(value, bool):
            return "a whole number" if self.kind is int else "a number"
        if not math.isfinite(value):
            return "a finite number"

        least = -self.most if self.least is self.above is None else self.least
        most = self.most if self.below is None else None

        limits = (
            ("at least", least, operator.ge),
            ("above", self.above, operator.gt),
            ("below", self.below, operator.lt),
            ("at most", most, operator.le),
        )

        stated = [(word, limit, holds(value, limit)) for word, limit, holds in limits if limit is not None]
        if all(holds for *_, holds in stated):
            return None

        # the limit of 32 bits is not mentioned, unless the number exceeds it
        return " and ".join(
            f"{word} {_told(limit)}" for word, limit, holds in stated if abs(limit) != LIMIT or not holds
        )

    def told(self) -> str:
        """What is taken, for `--help`: `at least 1`, `0 to 100`; empty if only the 32 bits limit it."""
        most = None if self.most == LIMIT else self.most
        if self.least is not None and most is not None and self.above is self.below is None:
            return f"{_told(self.least)} to {_told(most)}"

        limits = (("at least", self.least), ("above", self.above), ("below", self.below), ("at most", most))
        return " and ".join(f"{word} {_told(limit)}" for word, limit in limits if limit is not None)


def _told(limit: float) -> str:
    return f"{limit:,}" if abs(limit) >= 10_000 else f"{limit:g}"


# types of numeric arguments
Count = Annotated[int, Bounds(least=1)]
Whole = Annotated[int, Bounds(least=0)]
Seed = Annotated[int, Bounds(least=0, most=2**32 - 1)]
Workers = Annotated[int, Bounds(least=1, most=4096)]  # processes, or connections
Depth = Annotated[int, Bounds(least=1, most=64)]  # steps that a draft is unrolled, or tokens of its chain
Rows = Annotated[int, Bounds(least=1, most=65_536)]  # of a batch
Turns = Annotated[int, Bounds(least=1, most=1000)]  # of a chat
Repeats = Annotated[int, Bounds(least=1, most=1000)]  # runs of the same
Width = Annotated[int, Bounds(least=1, most=2**17)]  # of a layer, or of a part of it
Shown = Annotated[int, Bounds(least=0, most=10_000)]  # conversations on a page or a screen
Positive = Annotated[float, Bounds(above=0)]
Weight = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, below=1)]
Mass = Annotated[float, Bounds(above=0, most=1)]
Temperature = Annotated[float, Bounds(least=0, most=100)]  # above it, nothing is left of a distribution
Seconds = Annotated[float, Bounds(above=0, most=86400)]  # a day


def check_numbers(args: Any, values: Mapping[str, Any] | None = None) -> None:
    """Check the numbers among arguments; an argument that is `None` is skipped.

    Args:
        args: a dataclass of arguments, or its class.
        values: by name; the fields of `args` if `None`.

    Raises:
        ValueError: naming the first argument outside its bounds.
    """
    group = args if isinstance(args, type) else type(args)
    for name, bounds in bounds_of(group).items():
        value = getattr(args, name) if values is None else values.get(name)
        if value is None:
            continue

        for one in value if bounds.many and isinstance(value, (list, tuple)) else [value]:
            wanted = bounds.refuse(one)
            if wanted is not None:
                raise ValueError(f"`{name}` must be {wanted}, got {one!r}.")


@cache
def bounds_of(group: type) -> dict[str, Bounds]:
    """The bounds of every number among the fields of a dataclass of arguments.

    For fields inherited from a library, they are in its `_bounds`.
    """
    found, stated = {}, getattr(group, "_bounds", {})
    for name, hint in get_type_hints(group, include_extras=True).items():
        bounds = _bounds_in(hint) if name in group.__dataclass_fields__ else None
        if bounds is not None:
            found[name] = _of_kind(stated[name], bounds.kind, bounds.many) if name in stated else bounds
    return found


def _bounds_in(hint: Any, many: bool = False) -> Bounds | None:
    """The bounds that a type states; `None` for what is not a number."""
    outer = get_origin(hint)
    if outer in (Union, UnionType):
        return next((found for part in get_args(hint) if (found := _bounds_in(part, many))), None)

    if outer is list:
        return _bounds_in(get_args(hint)[0], many=True)
    if outer is Annotated:
        kind, *stated = get_args(hint)
        bounds = next((one for one in stated if isinstance(one, Bounds)), Bounds())
        return _of_kind(bounds, kind, many) if kind in (int, float) else None
    return Bounds(kind=hint, many=many) if hint in (int, float) else None


def _of_kind(bounds: Bounds, kind: type, many: bool) -> Bounds:
    return Bounds(bounds.least, bounds.most, bounds.above, bounds.below, kind, many)
