"""Report a disk that is too full for the cache files of `datasets`."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from datasets import config


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def caching() -> Iterator[None]:
    """Turn the error of a full disk into one sentence while the block writes cache files.

    Raises:
        OSError: if the disk is full or read-only.
    """
    try:
        yield
    except (OSError, ValueError) as problem:
        full = _no_room(problem)
        if full is None:
            raise
        raise OSError(
            f"The cache of data sets {config.HF_DATASETS_CACHE} cannot be written ({full.strerror or full}): make "
            "room, or name a different folder in the environment variable HF_DATASETS_CACHE."
        ) from problem


def _no_room(problem: BaseException) -> OSError | None:
    """The error of a full disk that led to this one: `datasets` then closes a file twice, a `ValueError`."""
    while problem is not None:
        if isinstance(problem, OSError) and problem.errno in _NO_ROOM:
            return problem
        problem = problem.__context__
    return None
