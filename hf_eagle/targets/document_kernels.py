"""Causal attention of documents that lie end to end: by one kernel for all of them, or by one for each.

One for each is the plain way, and the CPU's. On a GPU that would be hundreds of small launches in each layer, so there
one kernel for all takes the places where documents begin, if PyTorch has it.
"""

import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch.nn.functional import pad, scaled_dot_product_attention


logger = logging.getLogger(__name__)

# devices with the kernel for all documents, and heads that it takes
_WITH_VARLEN = ("cuda",)
_HALF = (torch.bfloat16, torch.float16)
_WIDEST = 256
_failed = False


def attend_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: list[int],
    bounds_there: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention inside documents.

    Args:
        query, key, value: `(1, heads, N, head_dim)`; keys and values may have fewer heads, values another width.
        bounds: document `i` is `bounds[i] .. bounds[i + 1] - 1`.
        bounds_there: the same in int32, on the device.
        scaling: factor on the scores, `None` for the usual one.
        window: keys that a query sees, including its own; `None` for all.

    Returns:
        `(1, N, heads, value_dim)`.
    """
    global _failed
    width, scaling = value.shape[-1], query.shape[-1] ** -0.5 if scaling is None else scaling
    if width < query.shape[-1]:  # the fused kernels want one width (twice as fast on CPU as without them)
        value = pad(value, (0, query.shape[-1] - width))

    if _takes_varlen(query, key, value):
        try:
            return _all_at_once(query, key, value, bounds, bounds_there, scaling, window)[..., :width]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            _failed = True
            said = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            logger.warning("The target attends once a document, and slower: PyTorch's kernel for all fails (%s).", said)
    return _one_by_one(query, key, value, bounds, scaling, window)[..., :width]


# ---- all documents in one kernel ----


@lru_cache
def _varlen() -> Callable | None:
    """The kernel of PyTorch 2.11 and newer; 2.10 has it without a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys() else None


def _takes_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    width = query.shape[-1]
    fits = query.device.type in _WITH_VARLEN and query.dtype in _HALF and width % 8 == 0 and width <= _WIDEST
    alike = all(x.dtype == query.dtype and x.shape[-1] == width for x in (key, value))
    shared = key.shape[1] == value.shape[1] and query.shape[1] % key.shape[1] == 0
    return fits and alike and shared and query.shape[2] > 0 and not _failed and _varlen() is not None


def _all_at_once(query, key, value, bounds, bounds_there, scaling, window) -> torch.Tensor:
    kernel, grouped = _varlen(), query.shape[1] != key.shape[1]
    if grouped and not _takes_groups(kernel):
        key, value, grouped = _repeated(key, query), _repeated(value, query), False

    behind = -1 if window is None else window - 1  # a query's own key is not counted
    rows = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # (N, heads, head_dim)
    where = (bounds_there, bounds_there, longest_of(bounds), longest_of(bounds))
    groups = {"enable_gqa": True} if grouped else {}
    return kernel(*rows, *where, scale=scaling, window_size=(behind, 0), **groups)[None]


@lru_cache
def _takes_groups(kernel: Callable) -> bool:
    """Whether the kernel takes fewer keys than queries; that of PyTorch 2.11 does not."""
    return "enable_gqa" in inspect.signature(kernel).parameters


# ---- one document after another ----


def _one_by_one(query, key, value, bounds: list[int], scaling, window) -> torch.Tensor:
    masked_or_wide = query.shape[-1] > _WIDEST or (window is not None and longest_of(bounds) > window)
    if query.shape[1] != key.shape[1] and needs_own_keys(query.device, query.dtype, masked_or_wide):
        key, value = (_repeated(x, query) for x in (key, value))

    arguments = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}

    length = length_of_all(bounds)
    if length is not None:
        together = (x[0].unflatten(1, (-1, length)).transpose(0, 1) for x in (query, key, value))
        return _attend(*together, window, arguments).transpose(1, 2).flatten(0, 1)[None]

    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    for start, stop in pairwise(bounds):
        attended = _attend(*(x[:, :, start:stop] for x in (query, key, value)), window, arguments)
        output[:, start:stop] = attended.transpose(1, 2)
    return output


def length_of_all(bounds: list[int]) -> int | None:
    """The length of each document, `None` if they differ in length."""
    lengths = {end - start for start, end in pairwise(bounds)}
    return lengths.pop() if len(lengths) == 1 else None


def longest_of(bounds: list[int]) -> int:
    """The length of the longest document, 0 without one."""
    return max((end - start for start, end in pairwise(bounds)), default=0)


def needs_own_keys(device: torch.device, dtype: torch.dtype, masked_or_wide: bool = False) -> bool:
    """Whether PyTorch would hold all scores if query heads shared keys: on a GPU, its fused kernels take shared keys in
    half precision only, without a mask, and for heads of up to 256."""
    return device.type != "cpu" and (masked_or_wide or dtype not in _HALF)


def _repeated(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values `(1, kv_heads, N, dim)`, once for each head of the queries."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1, output_size=query.shape[1])


def _attend(query, key, value, window: int | None, arguments: dict) -> torch.Tensor:
    """Causal attention in documents of one length: `(documents, heads, length, head_dim)`."""
    if window is None or query.shape[2] <= window:
        return scaled_dot_product_attention(query, key, value, is_causal=True, **arguments)
    return _slide(query, key, value, window, arguments)


def _slide(query, key, value, window: int, arguments: dict) -> torch.Tensor:
    """Attend in documents longer than the window, in blocks of queries: a block's mask is `(window, 2 * window)`."""
    blocks, length, device = [], query.shape[2], query.device
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(start - window + 1, 0)

        behind = torch.arange(start, stop, device=device)[:, None] - torch.arange(first, stop, device=device)
        seen = (behind >= 0) & (behind < window)
        rows = query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop]
        blocks.append(scaled_dot_product_attention(*rows, attn_mask=seen, **arguments))
    return torch.cat(blocks, dim=2)


# ---- compiled ----


@torch.library.custom_op(
    "hf_eagle::attend_documents",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor bounds, Tensor bounds_there, float? scaling, int? window)"
    " -> Tensor",
)
def attend_documents_compiled(query, key, value, bounds, bounds_there, scaling, window):
    """`attend_documents` as one operation of a graph, which is the same for any documents: `bounds` is a tensor too, on
    the CPU."""
    return attend_documents(query, key, value, bounds.tolist(), bounds_there, scaling, window).contiguous()


@attend_documents_compiled.register_fake
def _(query, key, value, bounds, bounds_there, scaling, window):
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
