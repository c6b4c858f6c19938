"""Attention of the training-time test: the step-0 keys of a row's past, and its own key of every later step.

At step `s` row `i` attends, under one softmax, to the step-0 keys `j <= i` of its document and to its own keys of the
steps `1..s` (EAGLE-3, arXiv 2503.01840; contract section 2). Only the rows that are unrolled have queries; every row
of the batch has a step-0 key.
"""

from dataclasses import dataclass

import torch


@dataclass
class RowLayout:
    """Where the unrolled rows of a `(batch, length)` grid lie, and what each of them may see.

    Attributes:
        rows: `(N,)` flat ids `b * length + t`, ascending.
        padded: `(N,)` flat ids into a `(batch, width)` grid which holds the rows of each sequence side by side.
        width: the most rows any sequence has.
        visible: bool `(batch, width, length)`: whether a row sees a step-0 key.
    """

    rows: torch.Tensor
    padded: torch.Tensor
    width: int
    visible: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, documents: torch.Tensor) -> "RowLayout":
        """For these rows of a batch whose tokens belong to `documents` `(batch, length)`, negative on padding."""
        batch, length = documents.shape
        sequence, place = rows // length, rows % length
        counts = torch.bincount(sequence, minlength=batch)
        first = counts.cumsum(0) - counts
        width = int(counts.max())
        padded = sequence * width + torch.arange(rows.numel(), device=rows.device) - first[sequence]

        causal = torch.arange(length, device=rows.device)[None, :] <= place[:, None]
        same = documents[sequence] == documents.flatten()[rows][:, None]
        visible = torch.zeros(batch * width, length, dtype=torch.bool, device=rows.device)
        visible[padded] = causal & same
        return cls(rows=rows, padded=padded, width=width, visible=visible.view(batch, width, length))

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """`(N, ...)` -> `(batch, width, ...)`, zeros where a sequence has fewer rows."""
        batch = self.visible.shape[0]
        grid = x.new_zeros(batch * self.width, *x.shape[1:]).index_copy(0, self.padded, x)
        return grid.view(batch, self.width, *x.shape[1:])

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `pad`."""
        return x.flatten(0, 1)[self.padded]


def eager_ttt_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own_keys: list[torch.Tensor],
    own_values: list[torch.Tensor],
    layout: RowLayout,
    scaling: float,
) -> torch.Tensor:
    """The readable form: all scores side by side, one softmax in float32.

    Args:
        query: `(N, heads, head_dim)` of the unrolled rows at this step.
        key, value: `(batch, length, kv_heads, head_dim)` of step 0.
        own_keys, own_values: one `(N, kv_heads, head_dim)` for each of the steps `1..s`.
        layout: where the rows lie and what they see.
        scaling: factor on the scores.

    Returns:
        `(N, heads, head_dim)`.
    """
    groups = query.shape[1] // key.shape[2]
    q = layout.pad(query).unflatten(2, (-1, groups))  # (batch, width, kv, group, dim)
    scores = torch.einsum("bwkgd,btkd->bkgwt", q, key) * scaling
    scores = scores.masked_fill(~layout.visible[:, None, None], torch.finfo(scores.dtype).min)

    if own_keys:
        own_k, own_v = (layout.pad(torch.stack(x, dim=1)) for x in (own_keys, own_values))  # (batch, width, s, kv, dim)
        scores = torch.cat([scores, torch.einsum("bwkgd,bwskd->bkgws", q, own_k) * scaling], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)

    length = key.shape[1]
    out = torch.einsum("bkgwt,btkd->bwkgd", weights[..., :length], value)
    if own_keys:
        out = out + torch.einsum("bkgws,bwskd->bwkgd", weights[..., length:], own_v)
    return layout.unpad(out.flatten(2, 3))
