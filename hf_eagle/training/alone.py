"""Let one run at a time write into a folder: two would delete and mix each other's checkpoints."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from ..door.locks import is_free


_HELD: set[int] = set()  # descriptors of this process's locks


@contextmanager
def writing_alone(argument: str, folder: str | Path, rank: int = 0) -> Iterator[None]:
    """Hold the lock of a folder that a run writes into; it ends with the process, however that ends.

    The first rank takes it for all, and all refuse together. The lock is on the folder itself, so no file is left.
    A missing folder is made, and removed if it is empty at the end.

    Args:
        argument: the argument that named the folder.
        folder: the folder of the run.
        rank: this process's rank; all ranks must enter.

    Raises:
        ValueError: if another process holds the lock.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    lock, refusal = _take(argument, folder) if rank == 0 else (None, None)

    try:
        refusal = _from_first_rank(refusal)
        if refusal is not None:
            raise ValueError(refusal)
        yield
    finally:
        if lock is not None:
            _HELD.discard(lock)
            os.close(lock)
        if is_new and rank == 0:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _take(argument: str, folder: Path) -> tuple[int | None, str | None]:
    """Return the lock's descriptor, `None` without one; and why it was refused, `None` if it was not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that cannot be written, which saving reports; Windows opens none
        return None, None

    if not is_free(lock):
        os.close(lock)
        return None, (
            f"`{argument}` {folder} is being written by another process: wait until it ends, or name another folder."
        )
    _HELD.add(lock)
    return lock, None


def _from_first_rank(refusal: str | None) -> str | None:
    if not dist.is_initialized():
        return refusal

    shared = [refusal]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _leave_locks_to_parent() -> None:
    """Close the lock in a forked worker: it may outlive its killed parent, and would block the resumed run."""
    for lock in _HELD:
        with suppress(OSError):
            os.close(lock)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks_to_parent)
