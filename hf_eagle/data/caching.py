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
    except OSError as problem:
        if problem.errno not in _NO_ROOM:
            raise
        why = problem.strerror or problem
        raise OSError(
            f"The cache of data sets {config.HF_DATASETS_CACHE} cannot be written ({why}): make room, or name a "
            "different folder in the environment variable HF_DATASETS_CACHE."
        ) from problem
