"""The contract of PyTorch's attention kernel for documents end to end, `varlen_attn`, written out with one mask."""

import torch


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Rows `(T, heads, dim)` attend inside `cu_seq[i] .. cu_seq[i + 1] - 1`, to at most `window_size` keys before and
    after their own, `-1` for all. Nothing of it waits for a device."""
    tokens, heads, width = query.shape
    assert key.shape == value.shape == (tokens, key.shape[1], width) and heads % key.shape[1] == 0
    assert enable_gqa or heads == key.shape[1]
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q.device == query.device
    assert isinstance(max_q, int) and max_q == max_k

    places = torch.arange(tokens, device=query.device)
    document = (places[:, None] >= cu_seq_q[1:]).sum(-1)
    behind, (before, after) = places[:, None] - places, window_size
    seen = document[:, None] == document
    seen &= behind <= (before if before >= 0 else tokens)
    seen &= -behind <= (after if after >= 0 else tokens)

    group = heads // key.shape[1]
    key, value = (x.repeat_interleave(group, 1, output_size=heads).transpose(0, 1).float() for x in (key, value))
    scores = (query.transpose(0, 1).float() @ key.transpose(1, 2)) * (width**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(0, 1).to(query.dtype)


def older_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """As PyTorch 2.11 has it, without groups of heads."""
    return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)
