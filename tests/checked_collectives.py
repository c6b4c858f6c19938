"""Collectives that refuse a view: the memory under one is not what its shape says, and may be somebody else's."""

import torch.distributed as dist


def check_collectives() -> None:
    """From now on `dist.broadcast` and `dist.all_reduce` of this process take whole tensors of their own only."""
    broadcast, all_reduce = dist.broadcast, dist.all_reduce

    def checked_broadcast(tensor, src=None, group=None, async_op=False, group_src=None):
        source = group_src == dist.get_rank(group) if src is None else src == dist.get_rank()
        _check(tensor, written=not source)
        return broadcast(tensor, src, group, async_op, group_src)

    def checked_all_reduce(tensor, *args, **kwargs):
        _check(tensor, written=True)
        return all_reduce(tensor, *args, **kwargs)

    dist.broadcast, dist.all_reduce = checked_broadcast, checked_all_reduce


def _check(tensor, written: bool) -> None:
    assert tensor.is_contiguous(), f"a collective of strides {tensor.stride()} and shape {tuple(tensor.shape)}"
    assert not (written and tensor._is_view()), "a collective writes over what is a part of another tensor"
