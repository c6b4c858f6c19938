"""What a target says about a batch."""

from dataclasses import dataclass

import torch
from transformers import Cache

from .distribution import FullOutlook


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
        outlook: of every place, where it is known already, `(batch, length)` each.
    """

    taps: torch.Tensor | None
    last_hidden: torch.Tensor
    past_key_values: Cache | None = None
    position_ids: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    outlook: FullOutlook | None = None


def at_places(flat: TargetFeatures, places: torch.Tensor, shape: torch.Size) -> TargetFeatures:
    """Features `(1, tokens, ...)` at their flat places of a `shape` batch, zeros elsewhere."""

    def spread(x: torch.Tensor) -> torch.Tensor:
        if len(places) < shape.numel():
            x = x.new_zeros(shape.numel(), x.shape[-1]).index_copy_(0, places, x[0])
        return x.view(*shape, -1)

    taps = None if flat.taps is None else spread(flat.taps)
    return TargetFeatures(taps=taps, last_hidden=spread(flat.last_hidden))
