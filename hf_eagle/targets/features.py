"""What a target says about a batch."""

from dataclasses import dataclass

import torch
from transformers import Cache


@dataclass
class TargetFeatures:
    """What a target says about a batch; at padding, nothing that means anything.

    Attributes:
        taps: residual streams at the tapped entries, before any norm, `(batch, length, taps * hidden)`, ascending ids;
            `None` without taps.
        last_hidden: `(batch, length, hidden)` after the final norm: what the head takes.
        past_key_values: the target's cache when `use_cache` was set.
        position_ids: `(3, batch, length)`, where the target has put the tokens of a batch with images (m-RoPE).
        embeddings: `(batch, length, hidden)` of a batch with images: what the first layer gets, those of tokens and, in
            the images' places, what the vision tower made of them.
    """

    taps: torch.Tensor | None
    last_hidden: torch.Tensor
    past_key_values: Cache | None = None
    position_ids: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None


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


def at_places(flat: TargetFeatures, places: torch.Tensor, shape: torch.Size) -> TargetFeatures:
    """Features `(1, tokens, ...)` at their flat places of a `shape` batch, zeros elsewhere."""

    def spread(x: torch.Tensor) -> torch.Tensor:
        if len(places) < shape.numel():
            x = x.new_zeros(shape.numel(), x.shape[-1]).index_copy_(0, places, x[0])
        return x.view(*shape, -1)

    taps = None if flat.taps is None else spread(flat.taps)
    return TargetFeatures(taps=taps, last_hidden=spread(flat.last_hidden))
