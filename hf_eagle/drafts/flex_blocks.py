"""What the attentions of drafts share in `flex_attention`: its kernel, and masks that are told block by block."""

from collections.abc import Callable
from functools import lru_cache

import torch


BLOCK = 128  # rows and keys of a block of `flex_attention`


def ends_of_blocks(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and last id of every `BLOCK` ids."""
    starts = torch.arange(0, ids.numel(), BLOCK, device=ids.device)
    return ids[starts], ids[(starts + BLOCK - 1).clamp_max(ids.numel() - 1)]


def block_mask(met: torch.Tensor, full: torch.Tensor, visible: Callable, rows: int, keys: int):
    """A mask for `flex_attention`.

    Args:
        met: bool `(blocks of rows, blocks of keys)`, whether some row may see some key.
        full: the same, whether every row sees every key.
        visible: `(batch, head, row, key)` -> whether the row sees the key, for the other blocks.
        rows, keys: how many there are.
    """
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask.from_kv_blocks(
        *_listed(met & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(rows, keys),
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool `(rows, columns)` in the form of `flex_attention`: how many columns a row has, and their numbers first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


@lru_cache
def flex_kernel(device_type: str) -> Callable:
    """`flex_attention`, compiled on an accelerator; on a CPU it runs uncompiled, in quadratic memory."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device_type == "cpu" else torch.compile(flex_attention, dynamic=True)


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
