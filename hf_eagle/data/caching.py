"""The cache files of `datasets`, and a disk that is too full for them."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from datasets import config


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def caching() -> Iterator[None]:
    """Records are read into cache files in here; if the disk is full, the error becomes one sentence.

    Raises:
        OSError: if there is no room.
    """
    try:
        yield
    except OSError as problem:
        if problem.errno not in _NO_ROOM:
            raise
        why = problem.strerror or problem
        raise OSError(
            f"The cache of data sets {config.HF_DATASETS_CACHE} cannot be written ({why}): make room, or name another "
            "folder in the environment variable HF_DATASETS_CACHE."
        ) from problem
