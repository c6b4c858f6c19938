"""A target's output for a batch: features of its tokens, and next-token distributions in chunks of rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import Cache


# rows of hidden states -> rows of logits, of all tokens or of those it was made for
Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class HeadSummary:
    """What only the whole head knows of a place. With it, the head's rows of a draft vocabulary suffice.

    Attributes:
        top: int64, the most probable next token.
        log_partition: float32, the log-sum-exp of all logits.
    """

    top: torch.Tensor
    log_partition: torch.Tensor

    def at(self, indices: torch.Tensor) -> "HeadSummary":
        """Only of those flat indices."""
        return HeadSummary(self.top.flatten()[indices], self.log_partition.flatten()[indices])


@dataclass
class TargetFeatures:
    """A target's output for a batch. Values at padding are meaningless.

    Attributes:
        taps: residual streams at the tapped entries, before any norm, `(batch, length, taps * hidden)`, ascending ids;
            `None` without taps.
        last_hidden: `(batch, length, hidden)` after the final norm: the head's input.
        past_key_values: the target's cache when `use_cache` was set.
        position_ids: `(3, batch, length)`, the target's positions for a batch with images (m-RoPE).
        embeddings: `(batch, length, hidden)` of a batch with images: the first layer's input, token embeddings and, in
            the images' places, the vision tower's output.
        head_summary: of every place, if already known, `(batch, length)` each.
    """

    taps: torch.Tensor | None
    last_hidden: torch.Tensor
    past_key_values: Cache | None = None
    position_ids: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    head_summary: HeadSummary | None = None


def at_indices(flat: TargetFeatures, indices: torch.Tensor, shape: torch.Size) -> TargetFeatures:
    """Features `(1, tokens, ...)` at their flat indices of a `shape` batch, zeros elsewhere."""

    def spread(x: torch.Tensor) -> torch.Tensor:
        if len(indices) < shape.numel():
            x = x.new_zeros(shape.numel(), x.shape[-1]).index_copy_(0, indices, x[0])
        return x.view(*shape, -1)

    taps = None if flat.taps is None else spread(flat.taps)
    return TargetFeatures(taps=taps, last_hidden=spread(flat.last_hidden))


@dataclass
class TargetDistribution:
    """A target's next-token distribution at `positions` places, as far as a draft vocabulary can see it.

    Attributes:
        probs: `(positions, draft_vocab)`, softmax over the draft vocabulary's logits only.
        argmax: `(positions,)` int64, the draft vocabulary's most probable id, as a DRAFT id.
        in_draft: bool `(positions,)`, whether it is also the most probable of the full vocabulary.
        mass: `(positions,)` float32, the draft vocabulary's share of the full softmax; `None` unless asked for.
    """

    probs: torch.Tensor
    argmax: torch.Tensor
    in_draft: torch.Tensor
    mass: torch.Tensor | None = None


def summarize_head(head: Head, hidden: torch.Tensor, chunk: int) -> HeadSummary:
    """The summary of `hidden`, `(positions, hidden)`, from a head of all tokens."""
    parts = []
    for rows in hidden.split(chunk):
        logits = head(rows)
        parts.append((_top(logits), logits.float().logsumexp(-1)))

    return HeadSummary(*_joined(parts))


def by_whole_head(
    head: Head, hidden: torch.Tensor, draft_ids: torch.Tensor | None, dtype: torch.dtype, with_mass: bool, chunk: int
) -> TargetDistribution:
    """The distribution from a head of all tokens; arguments as in [`FrozenTarget.distribution`]."""
    parts = []
    for rows in hidden.split(chunk):
        logits = head(rows)
        seen = logits if draft_ids is None else logits.index_select(-1, draft_ids)
        top = None if draft_ids is None else _top(logits)
        parts.append(_part(seen, draft_ids, top, logits.float().logsumexp(-1) if with_mass else None, dtype))

    return TargetDistribution(*_joined(parts))


def by_draft_head(
    head: Head,
    head_summary: HeadSummary,
    hidden: torch.Tensor,
    draft_ids: torch.Tensor,
    dtype: torch.dtype,
    with_mass: bool,
    chunk: int,
) -> TargetDistribution:
    """The same from a head of `draft_ids` only, where the summary of the places is known."""
    parts, columns = [], (hidden, head_summary.top, head_summary.log_partition)
    for rows, top, log_partition in zip(*(x.split(chunk) for x in columns), strict=True):
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

    # at most 1, except for features stored in eight bits, whose summary is that of the unrounded ones
    if log_partition is not None:
        part.append(torch.exp(seen.logsumexp(-1) - log_partition).clamp(max=1))
    return part


def _top(logits: torch.Tensor) -> torch.Tensor:
    return logits.max(-1).indices  # the first of equals; on a CPU 4 times as fast as an argmax of bfloat16


def _joined(parts: list) -> list[torch.Tensor]:
    return [torch.cat(column) for column in zip(*parts, strict=True)]
