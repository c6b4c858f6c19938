"""Attention of the training-time test: a row sees the step-0 keys of its past, and its own key of every later step.

At step `s` row `i` attends, under one softmax, to the step-0 keys `j <= i` of its document and to its own keys of the
steps `1..s` (EAGLE-3, arXiv 2503.01840; contract section 2). Only the unrolled rows have queries. With a sliding window
of `W` it sees the last `W` of these, as a server's draft does: the step-0 keys `i + s - W < j <= i`.

`eager` is the readable form. `sdpa` and `flex_attention` never hold the scores: a fused kernel attends to the step-0
keys and returns its log-sum-exp, which merges the few own keys exactly. Memory is linear in length.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from .flash_cpu import added_to, expanded, flash, flash_backward, grouped, ungrouped
from .flex_context import by_flex, chosen_attention, lengthened, or_else
from .row_layout import Block, RowLayout


def eager_ttt_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own_keys: list[torch.Tensor],
    own_values: list[torch.Tensor],
    layout: RowLayout,
    scaling: float,
) -> torch.Tensor:
    """The readable form: all scores of a document at once, one softmax in float32.

    Args:
        query: `(N, heads, key_dim)` of the unrolled rows at this step.
        key, value: `(K, kv_heads, key_dim)` and `(K, kv_heads, value_dim)` of step 0, the rows `layout.keys`.
        own_keys, own_values: one `(N, kv_heads, ...)` for each of the steps `1..s`.
        layout: which row sees which key.
        scaling: factor on the scores.

    Returns:
        `(N, heads, value_dim)`.
    """
    q = query.unflatten(1, (key.shape[1], -1))  # (N, kv, group, dim)
    outputs = []
    for first_row, last_row, first_key, last_key in layout.documents:
        rows, keys = slice(first_row, last_row), slice(first_key, last_key)
        scores = torch.einsum("nkgd,tkd->nkgt", q[rows], key[keys]) * scaling
        hidden = layout.hidden(rows, keys, step=len(own_keys))
        scores = scores.masked_fill(hidden[:, None, None], torch.finfo(scores.dtype).min)

        own = [torch.einsum("nkgd,nkd->nkg", q[rows], k[rows])[..., None] * scaling for k in own_keys]
        weights = torch.cat([scores, *own], dim=-1).softmax(-1, dtype=torch.float32).to(value.dtype)

        out = torch.einsum("nkgt,tkd->nkgd", weights[..., : last_key - first_key], value[keys])
        for b, v in enumerate(own_values):
            out = out + weights[..., last_key - first_key + b, None] * v[rows, :, None]
        outputs.append(out)

    return torch.cat(outputs).flatten(1, 2)


class _FlashTTT(torch.autograd.Function):
    """Step-0 keys by PyTorch's flash kernel for CPUs, two blocks a span; own keys merged by log-sum-exp.

    The kernel's backward needs only the output and the log-sum-exp of a row. Given the MERGED ones, it returns the
    exact gradients of its block.
    """

    @staticmethod
    def forward(ctx, query, key, value, layout, scaling, *own):
        own_keys, own_values = own[: len(own) // 2], own[len(own) // 2 :]
        step = len(own_keys)
        q, k, v = grouped(query, key.shape[1]), expanded(key, query), expanded(value, query)
        result = torch.empty_like(query)
        out = grouped(result, key.shape[1])  # (kv, group, N, dim), a view of it
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)

        for rows, blocks in layout.spans_at(step):
            parts = []
            for block in blocks:
                keys, how = block[0], _how(layout, rows, block, step, scaling, q.dtype)
                parts.append(flash(q[:, :, rows], k[:, :, keys], v[:, :, keys], *how))
            out[:, :, rows], lse[:, :, rows] = _merge(parts)

        if own_keys:
            scores = _own_scores(q, own_keys, scaling)  # (kv, group, N, s)
            total = torch.logaddexp(lse, scores.logsumexp(-1))
            share = (scores - total[..., None]).exp().to(q.dtype)
            out.mul_((lse - total).exp().to(q.dtype)[..., None])
            for b, own_value in enumerate(own_values):
                out.addcmul_(share[..., b, None], _broadcast(own_value))
            lse = total

        # attention is one softmax over both sets, so save the merged output and log-sum-exp
        ctx.layout, ctx.scaling = layout, scaling
        ctx.save_for_backward(query, key, value, result, lse, *own)
        return result

    @staticmethod
    def backward(ctx, grad):
        query, key, value, result, lse, *own = ctx.saved_tensors
        own_keys, own_values = own[: len(own) // 2], own[len(own) // 2 :]
        layout, scaling, step = ctx.layout, ctx.scaling, len(own_keys)
        q, k, v = grouped(query, key.shape[1]), expanded(key, query), expanded(value, query)
        grad, out = (grouped(x.to(q.dtype), key.shape[1]) for x in (grad, result))

        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        dk, dv = (torch.zeros(x.shape[1], x.shape[0], x.shape[2], dtype=torch.float32) for x in (key, value))
        for rows, blocks in layout.spans_at(step):
            for block in blocks:
                keys, how = block[0], _how(layout, rows, block, step, scaling, q.dtype)
                parts = flash_backward(
                    *(grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows]),
                    *how,
                )
                for total, part in ((dq[:, :, rows], parts[0]), (dk[:, keys], parts[1]), (dv[:, keys], parts[2])):
                    total += part if total.dim() == 4 else part.sum(1)

        own_grads = []
        if own_keys:
            share = (_own_scores(q, own_keys, scaling) - lse[..., None]).exp()
            delta = (grad * out).sum(-1, dtype=torch.float32)
            d_own_keys, d_own_values = [], []
            for b, (own_key, own_value) in enumerate(zip(own_keys, own_values, strict=True)):
                d_score = share[..., b] * ((grad * _broadcast(own_value)).sum(-1, dtype=torch.float32) - delta)
                d_score = (d_score * scaling).to(q.dtype)[..., None]
                dq.addcmul_(d_score, _broadcast(own_key))
                d_own_keys.append((d_score * q).sum(1).transpose(0, 1))
                d_own_values.append((share[..., b, None].to(q.dtype) * grad).sum(1).transpose(0, 1))
            own_grads = d_own_keys + d_own_values

        dq = ungrouped(dq)
        dk, dv = dk.transpose(0, 1), dv.transpose(0, 1)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None, *own_grads


def _how(layout: RowLayout, rows: slice, block: Block, step: int, scaling: float, dtype: torch.dtype) -> tuple:
    """The kernel's arguments behind queries, keys and values, for a block of a span: causal, factor and mask."""
    keys, causal = block
    mask = added_to(layout.hidden(rows, keys, step), dtype) if causal is None else None
    return bool(causal), scaling, mask


def _broadcast(own: torch.Tensor) -> torch.Tensor:
    """`(N, kv, dim)` -> `(kv, 1, N, dim)`, a view that meets grouped queries."""
    return own.transpose(0, 1)[:, None]


def _own_scores(q: torch.Tensor, own_keys: tuple[torch.Tensor, ...], scaling: float) -> torch.Tensor:
    """Scores of each row with its own keys, float32 `(kv, group, N, s)`."""
    return torch.stack([(q * _broadcast(k)).sum(-1, dtype=torch.float32) for k in own_keys], dim=-1) * scaling


def _merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and log-sum-exps over disjoint sets of keys -> those over their union."""
    out, lse = parts[0]
    for other, other_lse in parts[1:]:
        total = torch.logaddexp(lse, other_lse)
        mine, theirs = ((x - total).exp()[..., None].to(out.dtype) for x in (lse, other_lse))
        out, lse = out * mine + other * theirs, total
    return out, lse


def flash_ttt_attention(query, key, value, own_keys, own_values, layout, scaling) -> torch.Tensor:
    """`eager_ttt_attention` in linear memory on a CPU, with the same arguments and result.

    Key and value widths may differ (MLA): the kernel needs one width, so the narrower side is padded with zeros, which
    changes neither scores nor sums.
    """
    wide, narrow = value.shape[-1], query.shape[-1]
    width = max(wide, narrow)
    dtype = query.dtype

    query, key, *own_keys = (_widen(x, width).to(dtype) for x in (query, key, *own_keys))
    value, *own_values = (_widen(x, width).to(dtype) for x in (value, *own_values))
    return _FlashTTT.apply(query, key, value, layout, scaling, *own_keys, *own_values)[..., :wide]


def _widen(x: torch.Tensor, width: int) -> torch.Tensor:
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


@or_else(eager_ttt_attention)
def flex_ttt_attention(query, key, value, own_keys, own_values, layout, scaling) -> torch.Tensor:
    """`eager_ttt_attention` with `flex_attention`, whose log-sum-exp is differentiable; for accelerators.

    Where it cannot run, `eager_ttt_attention` does, and a line of the log says so. On a CPU it runs uncompiled, in
    quadratic memory: only good for tests.
    """
    out, lse = by_flex(query, key, value, layout.flex_mask(len(own_keys)), scaling)
    if not own_keys:
        return out

    # the heads of a group read one own key: it is not repeated for them
    q = query.unflatten(1, (key.shape[1], -1))  # (N, kv, group, dim)
    scores = [(q * k[:, :, None]).sum(-1, dtype=torch.float32) * scaling for k in own_keys]
    weights = torch.stack([lse.view(q.shape[:-1]), *scores], dim=-1).softmax(-1).to(out.dtype)  # (N, kv, group, 1 + s)

    attended = (out.view(*q.shape[:-1], -1), *(v[:, :, None] for v in own_values))
    return sum(w[..., None] * v for w, v in zip(weights.unbind(-1), attended, strict=True)).flatten(1, 2)


def shared_by_steps(attend: Callable, x: torch.Tensor) -> torch.Tensor:
    """Step-0 keys or values in the form that an implementation makes of them, so that it does so once a batch."""
    return lengthened(x) if attend is flex_ttt_attention else x


def ttt_attention(implementation: str, device: torch.device) -> Callable:
    """The function behind an `attn_implementation`, see `chosen_attention`."""
    return chosen_attention(
        implementation, device, eager=eager_ttt_attention, flash=flash_ttt_attention, flex=flex_ttt_attention
    )
