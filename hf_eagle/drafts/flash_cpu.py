"""PyTorch's flash kernel for CPUs, as the attention of drafts calls it: forward and backward, with log-sum-exps.

The kernel's backward needs only the output and the log-sum-exp of a row. Given those of a softmax over more keys than
the kernel saw, it returns the exact gradients of the keys that it did see.
"""

import torch


# below this many scores in a block, the CPU kernel's backward is faster in float32 than bfloat16 (Xeon with AMX)
_FEW_SCORES = 2**17


def grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`(N, heads, dim)` -> `(kv, group, N, dim)`, a view: kv heads stand where the kernel expects the batch."""
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def ungrouped(x: torch.Tensor) -> torch.Tensor:
    """`(kv, group, N, dim)` -> `(N, heads, dim)`, the opposite of `grouped`."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def expanded(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """`(K, kv, dim)` -> `(kv, group, K, dim)`, a view: the heads of a group read one key."""
    return x.transpose(0, 1)[:, None].expand(-1, query.shape[1] // x.shape[1], -1, -1)


def added_to(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the kernel adds to scores: where `hidden` is true, the key weighs nothing."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)


def flash(q, k, v, causal: bool, scaling: float, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend, and return the output and the log-sum-exp of each row; `mask` is added to the scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scaling
    )


def flash_backward(grad, q, k, v, out, lse, causal: bool, scaling: float, mask=None):
    """Gradients of queries, keys and values, given the output and log-sum-exp of the whole softmax."""
    if q.dtype == torch.bfloat16 and q.shape[2] * k.shape[2] < _FEW_SCORES:
        grad, q, k, v, out = (x.float() for x in (grad, q, k, v, out))
        mask = None if mask is None else mask.float()
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scaling
    )
