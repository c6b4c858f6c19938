"""`flex_attention` of rows to earlier tokens, for accelerators: compiled once for training and once for evaluation.

PyTorch compiles another graph for sizes of 0 and 1, for sizes that happen to be equal, and for each new value of
anything but a tensor. So there are always at least two blocks of rows and of keys, every size that depends on the batch
is marked as dynamic, and of a batch the compiled function gets tensors only.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad


if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

logger = logging.getLogger(__name__)

BLOCK = 128  # rows and keys of a block of the mask
_NO_ROW = 2**62  # after every row
# devices without the kernel's backward pass
_WITHOUT_BACKWARD = ("mps",)
# what its Triton kernels take
_NARROWEST, _WIDEST = 16, 256

# heads wider than this count as 256, for which PyTorch's own blocks exceed the shared memory of many devices
_WIDE = 128
_FORWARD_16_BIT = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 2, "fwd_num_warps": 4}
_BACKWARD_16_BIT = {f"bwd_BLOCK_{side}": 32 for side in ("M1", "N1", "M2", "N2")}
_BACKWARD_16_BIT |= {"bwd_num_stages": 2, "bwd_num_warps": 4}
# the backward pass in float32 is left to PyTorch: its blocks of 16 are the smallest
_FORWARD_32_BIT = {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 16, "fwd_num_stages": 2, "fwd_num_warps": 4}

_failures: dict[str, str] = {}  # of compilation, by the type of the device


class CannotAttend(Exception):
    """Why `flex_attention` cannot run here."""


def why_not_flex(device: torch.device, key_dim: int, value_dim: int) -> str | None:
    """Why heads of these widths cannot attend with `flex_attention` on a device; `None` if they can."""
    if device.type == "cpu":  # uncompiled, for tests
        return None
    if device.type in _WITHOUT_BACKWARD:
        return f"it has no backward pass on {device.type}"

    narrow, wide = min(key_dim, value_dim), max(key_dim, value_dim)
    if narrow < _NARROWEST:
        return f"it needs heads of at least {_NARROWEST}, and this draft's have {narrow}"
    if wide > _WIDEST:
        return f"it takes heads of at most {_WIDEST}, and this draft's have {wide}"
    return _failures.get(device.type)


def kernel_options(key_dim: int, value_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of the kernel's blocks that fit 99 KiB of shared memory, the least that today's devices have; empty where
    those that PyTorch chooses do."""
    if max(key_dim, value_dim) <= _WIDE:
        return {}
    return _FORWARD_32_BIT if dtype == torch.float32 else _FORWARD_16_BIT | _BACKWARD_16_BIT


@dataclass
class FlexMask:
    """Which row sees which key, in at least two blocks of each.

    Attributes:
        ids: rows, documents of rows, keys, documents of keys, and in a window the first key that each row may see:
            int64, ascending. If they are few, the last row is repeated, and keys are added that no row sees.
        blocks: a `BlockMask`, of the blocks of keys that a block of rows sees in full, or in part.
    """

    ids: tuple[torch.Tensor, ...]
    blocks: "BlockMask"

    @classmethod
    def of(
        cls,
        rows: torch.Tensor,
        row_documents: torch.Tensor,
        keys: torch.Tensor,
        key_documents: torch.Tensor,
        first_keys: torch.Tensor | None = None,
    ) -> "FlexMask":
        """A row sees the keys of its document that do not come after it, in a window those from its `first_keys`."""
        from torch.nn.attention.flex_attention import BlockMask

        rows, row_documents, key_documents = (_repeat_last(ids) for ids in (rows, row_documents, key_documents))
        keys = pad(keys, (0, _missing(len(keys))), value=_NO_ROW)

        # rows, keys and documents ascend, so a block's first and last entries bound what is in it
        (first_row, last_row), (row_document, last_row_document) = (_ends_of_blocks(x) for x in (rows, row_documents))
        (first_key, last_key), (key_document, last_document) = (_ends_of_blocks(x) for x in (keys, key_documents))

        met = (first_key <= last_row[:, None]) & (key_document <= last_row_document[:, None])
        met &= last_document >= row_document[:, None]
        full = (last_key <= first_row[:, None]) & (key_document == last_row_document[:, None])
        full &= last_document == row_document[:, None]

        ids = (rows, row_documents, keys, key_documents)
        if first_keys is not None:
            ids = (*ids, _repeat_last(first_keys))
            lowest, highest = _ends_of_blocks(ids[-1])
            met &= last_key >= lowest[:, None]
            full &= first_key >= highest[:, None]

        blocks = BlockMask.from_kv_blocks(
            *_listed(met & ~full), *_listed(full), BLOCK_SIZE=BLOCK, seq_lengths=(len(rows), len(keys))
        )
        return cls(ids, blocks)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of `blocks`, by its names for them."""
        sides = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")
        return {name: getattr(self.blocks, name) for name in (*sides, *(f"full_{side}" for side in sides))}


def lengthened(x: torch.Tensor) -> torch.Tensor:
    """`(n, ...)`, contiguous, and padded with rows of zeros to two blocks if it has fewer."""
    return pad(x, (0, 0) * (x.dim() - 1) + (0, _missing(len(x)))) if _missing(len(x)) else x.contiguous()


def by_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: FlexMask, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to keys of earlier tokens.

    Args:
        query: `(N, heads, key_dim)`.
        key, value: `(K, kv_heads, key_dim)` and `(K, kv_heads, value_dim)`, may be `lengthened`.

    Returns:
        What rows attend to, `(N, heads, value_dim)`, and the log-sum-exp of their scores, `(N, heads)`.

    Raises:
        CannotAttend: if the kernel does not take these heads, or PyTorch does not compile it here.
    """
    why = why_not_flex(query.device, query.shape[-1], value.shape[-1])
    if why is not None:
        raise CannotAttend(why)

    ids, blocks = mask.ids, mask.tensors
    operands = [_trained(lengthened(x)) for x in (query, key, value)]
    for x in (*operands, *ids):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    for x in blocks.values():  # (1, 1, blocks) and (1, 1, blocks, blocks)
        torch._dynamo.maybe_mark_dynamic(x, [2, 3][: x.dim() - 2])

    options = kernel_options(query.shape[-1], value.shape[-1], query.dtype)
    try:
        out, lse = _kernel(query.device.type)(*operands, ids, blocks, scaling, options)
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as problem:
        said = " ".join((str(problem).strip() or type(problem).__name__).splitlines()[:2])
        _failures[query.device.type] = f"PyTorch does not compile it here ({said})"
        raise CannotAttend(_failures[query.device.type]) from problem
    return out[: len(query)], lse[: len(query)]


@lru_cache
def _kernel(device_type: str) -> Callable:
    # as one graph: after too many recompilations it would silently run uncompiled, in quadratic memory
    return _attend if device_type == "cpu" else torch.compile(_attend, fullgraph=True)


def _attend(query, key, value, ids, blocks, scaling, options) -> tuple[torch.Tensor, torch.Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    rows, row_documents, keys, key_documents, *first_keys = ids

    def visible(batch, head, row, key):
        seen = (row_documents[row] == key_documents[key]) & (keys[key] <= rows[row])
        return seen & (keys[key] >= first_keys[0][row]) if first_keys else seen

    mask = BlockMask(seq_lengths=(len(rows), len(keys)), **blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)
    out, aux = flex_attention(
        *(x.transpose(0, 1)[None] for x in (query, key, value)),  # (1, heads, rows or keys, dim)
        block_mask=mask,
        scale=scaling,
        enable_gqa=True,
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )
    return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)


def _trained(x: torch.Tensor) -> torch.Tensor:
    """The same tensor, which in training always requires a gradient: the graph depends on which tensors do."""
    return x.detach().requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x


def _missing(count: int) -> int:
    """How many rows it takes to fill up two blocks."""
    return max(0, 2 * BLOCK - count)


def _repeat_last(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids, ids[-1:].expand(_missing(len(ids)))])


def _ends_of_blocks(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and last id of every block."""
    starts = torch.arange(0, len(ids), BLOCK, device=ids.device)
    return ids[starts], ids[(starts + BLOCK - 1).clamp_max(len(ids) - 1)]


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool `(rows, columns)` in the form of a `BlockMask`: each row's count, and its columns before all others."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def or_else(eager: Callable) -> Callable:
    """Let a function that calls `by_flex` give way to `eager`, of the same arguments, where that cannot attend."""

    def decorate(attend: Callable) -> Callable:
        @wraps(attend)
        def run(*args):
            try:
                return attend(*args)
            except CannotAttend as why:
                say_eager(str(why))
                return eager(*args)

        return run

    return decorate


@lru_cache
def say_eager(why: str) -> None:
    """Warn, once for each reason."""
    logger.warning("The draft attends without `flex_attention`, slower and in quadratic memory: %s.", why)


def chosen_attention(implementation: str, device: torch.device, eager: Callable, flash: Callable, flex: Callable):
    """The function behind an `attn_implementation`; `sdpa` is the device's fused kernel.

    Raises:
        ValueError: for another implementation.
    """
    if implementation == "sdpa":
        return flash if device.type == "cpu" else flex

    known = {"eager": eager, "flex_attention": flex}
    if implementation not in known:
        raise ValueError(
            f"`attn_implementation` of a draft must be one of eager, sdpa, flex_attention, got {implementation!r}."
        )
    return known[implementation]
