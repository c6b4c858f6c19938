"""What a target's head says: next-token distributions over a draft vocabulary, made in chunks of rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


# rows of logits -> of all tokens' logits; of a few tokens' where it was made for them
Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class FullOutlook:
    """What only the whole head can tell of a place; with it, a draft vocabulary's rows of the head suffice.

    Attributes:
        top: int64, the most probable next token.
        log_partition: float32, the log-sum-exp of all logits.
    """

    top: torch.Tensor
    log_partition: torch.Tensor

    def at(self, places: torch.Tensor) -> "FullOutlook":
        """Of those flat places alone."""
        return FullOutlook(self.top.flatten()[places], self.log_partition.flatten()[places])


@dataclass
class TargetDistribution:
    """A target's next-token distribution at `positions` places, as far as a draft vocabulary can see it.

    Attributes:
        probs: `(positions, draft_vocab)`, softmax over the draft vocabulary's logits only.
        argmax: `(positions,)` int64, the draft vocabulary's most probable id, as a DRAFT id.
        in_draft: bool `(positions,)`, whether that is the most probable one of the full vocabulary too.
        mass: `(positions,)` float32, what the draft vocabulary holds of the full softmax; `None` when not asked for.
    """

    probs: torch.Tensor
    argmax: torch.Tensor
    in_draft: torch.Tensor
    mass: torch.Tensor | None = None


def full_outlook(head: Head, hidden: torch.Tensor, chunk: int) -> FullOutlook:
    """Of `hidden`, `(positions, hidden)`, by a head of all tokens."""
    parts = []
    for rows in hidden.split(chunk):
        logits = head(rows)
        parts.append((_top(logits), logits.float().logsumexp(-1)))
    return FullOutlook(*_joined(parts))


def by_whole_head(
    head: Head, hidden: torch.Tensor, draft_ids: torch.Tensor | None, dtype: torch.dtype, with_mass: bool, chunk: int
) -> TargetDistribution:
    """The distribution by a head of all tokens; arguments as of [`FrozenTarget.distribution`]."""
    parts = []
    for rows in hidden.split(chunk):
        logits = head(rows)
        seen = logits if draft_ids is None else logits.index_select(-1, draft_ids)
        top = None if draft_ids is None else _top(logits)
        parts.append(_part(seen, draft_ids, top, logits.float().logsumexp(-1) if with_mass else None, dtype))
    return TargetDistribution(*_joined(parts))


def by_draft_head(
    head: Head,
    outlook: FullOutlook,
    hidden: torch.Tensor,
    draft_ids: torch.Tensor,
    dtype: torch.dtype,
    with_mass: bool,
    chunk: int,
) -> TargetDistribution:
    """The same by a head of `draft_ids` alone, when the outlook of the places is known."""
    parts, places = [], zip(*(x.split(chunk) for x in (hidden, outlook.top, outlook.log_partition)), strict=True)
    for rows, top, log_partition in places:
        parts.append(_part(head(rows), draft_ids, top, log_partition if with_mass else None, dtype))
    return TargetDistribution(*_joined(parts))


def _part(
    seen: torch.Tensor,
    draft_ids: torch.Tensor | None,
    top: torch.Tensor | None,
    log_partition: torch.Tensor | None,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """A chunk's share of the distribution's fields, from the logits that the draft vocabulary sees."""
    seen = seen.float()
    argmax = _top(seen)
    in_draft = torch.ones_like(argmax, dtype=torch.bool) if draft_ids is None else draft_ids[argmax] == top
    part = [seen.softmax(-1).to(dtype), argmax, in_draft]
    if log_partition is not None:
        # at most 1 but for features stored in eight bits, whose outlook is of the unrounded ones
        part.append(torch.exp(seen.logsumexp(-1) - log_partition).clamp(max=1))
    return part


def _top(logits: torch.Tensor) -> torch.Tensor:
    return logits.max(-1).indices  # the first of equal ones; on a CPU 4 times faster than an argmax of bfloat16


def _joined(parts: list) -> list[torch.Tensor]:
    return [torch.cat(column) for column in zip(*parts, strict=True)]
