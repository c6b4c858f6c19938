"""Attention of a batch's blocks: each row sees the context before its block's anchor, and all rows of its block.

`eager` is the readable form. `sdpa` and `flex_attention` never hold the scores of the context: a fused kernel attends
to it and returns the log-sum-exp of its scores, with which the few scores inside the block are merged exactly. Memory
is linear in length.
"""

from collections.abc import Callable

import torch

from ..flash_cpu import expanded, flash, flash_backward, grouped, ungrouped
from ..flex_context import by_flex, chosen_attention, or_else
from .plan import BlockLayout


def eager_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own_key: torch.Tensor,
    own_value: torch.Tensor,
    layout: BlockLayout,
    scaling: float,
) -> torch.Tensor:
    """The readable form: all scores at once, one softmax in float32.

    Args:
        query: `(N, heads, dim)` of the rows of all blocks.
        key, value: `(K, kv_heads, dim)` of the context, the tokens `layout.keys`.
        own_key, own_value: `(N, kv_heads, dim)` of the blocks' rows.
        layout: which block sees which part of the context.
        scaling: factor on the scores.

    Returns:
        `(N, heads, dim)`.
    """
    q = query.unflatten(1, (key.shape[1], -1))  # (N, kv, group, dim)
    block = torch.arange(layout.rows, device=query.device) // layout.size
    place = torch.arange(len(key), device=query.device)
    context = (layout.begin[block, None] <= place) & (place < layout.end[block, None])
    visible = torch.cat([context, block[:, None] == block], dim=1)

    scores = torch.einsum("nkgd,tkd->nkgt", q, torch.cat([key, own_key])) * scaling
    scores = scores.masked_fill(~visible[:, None, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return torch.einsum("nkgt,tkd->nkgd", weights, torch.cat([value, own_value])).flatten(1, 2)


class _FlashBlocks(torch.autograd.Function):
    """Attend to the context with PyTorch's flash kernel for CPUs, a chunk of blocks at a time, and merge own keys."""

    @staticmethod
    def forward(ctx, query, key, value, own_key, own_value, layout, scaling):
        kv_heads, size = key.shape[1], layout.size
        q, k, v = grouped(query, kv_heads), expanded(key, query), expanded(value, query)
        result = torch.empty_like(query)
        out = grouped(result, kv_heads)  # (kv, group, N, dim), a view of it
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)

        for blocks, keys in layout.chunks:
            rows, mask = _rows(blocks, size), layout.hidden(blocks, keys, q.dtype)
            parts = flash(q[:, :, rows], k[:, :, keys], v[:, :, keys], False, scaling, mask)
            out[:, :, rows], lse[:, :, rows] = parts

        # attention is one softmax over both sets, so save the merged output and log-sum-exp
        scores = _own_scores(q, own_key, size, scaling)
        total = torch.logaddexp(lse, scores.logsumexp(-1).flatten(2))
        share = (scores - total.unflatten(2, (-1, size))[..., None]).exp()
        out.mul_((lse - total).exp().to(q.dtype)[..., None])
        out.add_((share.to(q.dtype) @ _by_block(own_value, size)).flatten(2, 3))

        ctx.layout, ctx.scaling = layout, scaling
        ctx.save_for_backward(query, key, value, own_key, own_value, result, total)
        return result

    @staticmethod
    def backward(ctx, grad):
        query, key, value, own_key, own_value, result, lse = ctx.saved_tensors
        layout, scaling, kv_heads, size = ctx.layout, ctx.scaling, key.shape[1], ctx.layout.size
        q, k, v = grouped(query, kv_heads), expanded(key, query), expanded(value, query)
        grad, out = (grouped(x.to(q.dtype), kv_heads) for x in (grad, result))

        dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        dk, dv = (torch.zeros(kv_heads, len(key), key.shape[2], dtype=torch.float32) for _ in range(2))
        for blocks, keys in layout.chunks:
            rows, mask = _rows(blocks, size), layout.hidden(blocks, keys, q.dtype)
            parts = flash_backward(
                *(grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows]),
                *(False, scaling, mask),
            )
            dq[:, :, rows] = parts[0]
            dk[:, keys] += parts[1].sum(1)
            dv[:, keys] += parts[2].sum(1)

        # inside the blocks, (kv, group, A, size, ...)
        q, grad, out = (x.unflatten(2, (-1, size)).float() for x in (q, grad, out))
        share = (_own_scores(q.flatten(2, 3), own_key, size, scaling) - lse.unflatten(2, (-1, size))[..., None]).exp()
        d_weight = grad @ _by_block(own_value, size).float().transpose(-1, -2)
        d_score = share * (d_weight - (grad * out).sum(-1, keepdim=True)) * scaling
        dq += (d_score @ _by_block(own_key, size).float()).flatten(2, 3)

        d_own = ((x.transpose(-1, -2) @ y).sum(1).flatten(1, 2) for x, y in ((d_score, q), (share, grad)))
        found = (ungrouped(dq), *(x.transpose(0, 1) for x in (dk, dv, *d_own)))
        given = (query, key, value, own_key, own_value)
        return *(x.to(like.dtype) for x, like in zip(found, given, strict=True)), None, None


def _rows(blocks: slice, size: int) -> slice:
    return slice(blocks.start * size, blocks.stop * size)


def _by_block(own: torch.Tensor, size: int) -> torch.Tensor:
    """`(N, kv, dim)` -> `(kv, 1, A, size, dim)`, a view that broadcasts over the queries of a group."""
    return own.transpose(0, 1).unflatten(1, (-1, size))[:, None]


def _own_scores(q: torch.Tensor, own_key: torch.Tensor, size: int, scaling: float) -> torch.Tensor:
    """Scores of each row with the rows of its block, float32 `(kv, group, A, size, size)`."""
    return q.unflatten(2, (-1, size)).float() @ _by_block(own_key, size).float().transpose(-1, -2) * scaling


def flash_block_attention(query, key, value, own_key, own_value, layout, scaling) -> torch.Tensor:
    """`eager_block_attention` in linear memory on a CPU, with the same arguments and result."""
    parts = (x.to(query.dtype) for x in (key, value, own_key, own_value))
    return _FlashBlocks.apply(query, *parts, layout, scaling)


@or_else(eager_block_attention)
def flex_block_attention(query, key, value, own_key, own_value, layout, scaling) -> torch.Tensor:
    """`eager_block_attention` with `flex_attention`, whose log-sum-exp is differentiable; for accelerators.

    Where it cannot run, `eager_block_attention` does, and a line of the log says so. On a CPU it runs uncompiled, in
    quadratic memory: only good for tests.
    """
    out, lse = by_flex(query, key, value, layout.flex_mask, scaling)

    size, kv_heads = layout.size, key.shape[1]
    scores = _own_scores(grouped(query, kv_heads), own_key, size, scaling)
    lse = lse.transpose(0, 1).unflatten(0, (kv_heads, -1)).unflatten(2, (-1, size))  # (kv, group, A, size)
    weights = torch.cat([lse[..., None], scores], dim=-1).softmax(-1).to(out.dtype)

    of_context = grouped(out, kv_heads).unflatten(2, (-1, size))
    merged = weights[..., :1] * of_context + weights[..., 1:] @ _by_block(own_value, size)
    return ungrouped(merged.flatten(2, 3))


def block_attention(implementation: str, device: torch.device) -> Callable:
    """The function behind an `attn_implementation`, see `chosen_attention`."""
    return chosen_attention(
        implementation, device, eager=eager_block_attention, flash=flash_block_attention, flex=flex_block_attention
    )
