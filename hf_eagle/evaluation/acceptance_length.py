"""Acceptance length and its confidence interval."""

from collections.abc import Sequence

import torch


CONFIDENCE, RESAMPLES = 0.95, 2000


def acceptance_length(accepted: Sequence[int], drafts: Sequence[int]) -> float | None:
    """Return the average number of tokens per target forward pass, 1 + accepted / drafts; `None` without drafts."""
    return 1 + sum(accepted) / sum(drafts) if sum(drafts) else None


def confidence_interval(accepted: Sequence[int], drafts: Sequence[int]) -> list[float] | None:
    """
    Return the 95% interval of the acceptance length by the percentile bootstrap over prompts, with a fixed seed.

    It draws prompts, not rounds, since rounds of one answer resemble each other.

    Args:
        accepted, drafts: one number per prompt.

    Returns:
        `[low, high]`, or `None` with fewer than two prompts that drafted anything.
    """
    if sum(count > 0 for count in drafts) < 2:
        return None

    drawn = resampled(len(drafts))
    sums = [torch.tensor(values, dtype=torch.float64)[drawn].sum(1) for values in (accepted, drafts)]
    lengths = 1 + sums[0][sums[1] > 0] / sums[1][sums[1] > 0]  # a sample without drafts has no length
    return middle_of(lengths)


def resampled(count: int) -> torch.Tensor:
    """Return which of `count` prompts each sample of the bootstrap draws, `(samples, count)`, with a fixed seed."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))


def middle_of(values: torch.Tensor) -> list[float]:
    """Return the ends of the middle 95% of the samples' values, float64 `(samples,)`."""
    tail = (1 - CONFIDENCE) / 2
    return torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
