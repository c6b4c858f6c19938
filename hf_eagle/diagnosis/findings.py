"""What one trial of a cause found, and whether that is more than noise."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..evaluation.acceptance_length import acceptance_length, resampled
from .causes import cause_of


CONFIDENCE = 0.99  # of the interval of a gain: many changes are tried, and few may seem to help by chance
Counts = tuple[list[int], list[int]]  # accepted tokens and drafts, by prompt


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        cause: its row in the table of causes.
        evidence: what was seen, a sentence without its full stop.
        change: what was changed, to follow "with"; `None` if nothing was.
        acceptance_length: with the change.
        gain: by how much the acceptance length is larger than as it is; `None` if that was not measured.
        interval: the 99% interval of the gain.
        bound: whether no more than this can be gained, and less is likely.
        likely: how much of a bound is likely to be gained, where that can be told: this decides whether it is named.
        seen: for a cause that shows without a gain, whether it does.
        decoded: acceptance length with the change by decoding itself, of what is told.
        details: further numbers, for the JSON file.
    """

    cause: str
    evidence: str
    change: str | None = None
    acceptance_length: float | None = None
    gain: float | None = None
    interval: list[float] | None = None
    bound: bool = False
    likely: float | None = None
    seen: bool = False
    decoded: float | None = None
    details: dict[str, Any] | None = None

    def named(self, length: float | None) -> bool:
        """Whether this is told as a cause, if the acceptance length is `length` as it is."""
        if self.gain is None or length is None:
            return self.seen
        sure = self.bound or (self.interval is not None and self.interval[0] > 0)
        gain = self.gain if self.likely is None else self.likely
        return self.seen or (sure and gain >= cause_of(self.cause).least * length)

    def as_json(self) -> dict[str, Any]:
        """For the JSON file."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def counts_of(measurement) -> Counts:
    """The counts of a [`Measurement`], by prompt."""
    runs = measurement.runs
    return [sum(run.accepted_per_position) for run in runs], [run.drafts for run in runs]


def gain_over(base: Counts, other: Counts) -> dict[str, Any]:
    """Return fields of a [`Finding`]: the acceptance length of `other`, and how much more that is than that of `base`.

    The bootstrap draws prompts. Of the same prompts it draws the same ones for both.
    """
    lengths = [acceptance_length(*counts) for counts in (base, other)]
    if None in lengths:
        return {"acceptance_length": lengths[1]}
    return {
        "acceptance_length": lengths[1],
        "gain": lengths[1] - lengths[0],
        "interval": _interval(base, other),
    }


def _interval(base: Counts, other: Counts) -> list[float] | None:
    if any(sum(count > 0 for count in drafts) < 2 for _, drafts in (base, other)):
        return None

    drawn = [_drawn_lengths(counts) for counts in (base, other)]
    difference = drawn[1] - drawn[0]
    difference = difference[difference.isfinite()]  # a sample without drafts has no length
    tail = (1 - CONFIDENCE) / 2
    return torch.quantile(difference, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()


def _drawn_lengths(counts: Counts) -> torch.Tensor:
    sums = [_per_draw(values) for values in counts]
    return 1 + sums[0] / sums[1]


def _per_draw(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[resampled(len(values))].sum(1)
