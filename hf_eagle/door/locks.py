"""Locks of files and folders: one process at a time may write there."""

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def is_free(file) -> bool:
    """Lock an open file or folder until it is closed or the process ends; return `False` if another process has it.

    Where the system or the file system has no locks, everything is free.

    Args:
        file: a file object, or the descriptor of a file or folder.
    """
    if fcntl is None:
        return True

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
