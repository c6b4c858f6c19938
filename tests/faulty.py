"""Faults of a file system, for root too: what may not be read or written, and a disk that is full.

faulty.py FAULT SCRIPT ARGUMENTS    runs a script under one of `FAULTS`, or under none
"""

import ctypes
import os
import resource
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path


_CAPABILITIES_VERSION = 0x20080522  # of capset(2)
_PASS_ALL = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: root reads and writes whatever the mode says


@contextmanager
def as_anybody() -> Iterator[None]:
    """Modes of files hold for this process, which may be root's."""
    if os.geteuid():
        yield
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    found = (ctypes.c_uint32 * 6)()  # twice effective, permitted, inheritable
    assert libc.capget(header, found) == 0
    less = (ctypes.c_uint32 * 6)(found[0] & ~_PASS_ALL, *found[1:])
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, found) == 0


@contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """No file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FAULTS = {"unreadable": as_anybody, "full": full_disk}


def relay() -> None:
    """Go on in a child whose standard error is a pipe, which no limit of a file's size holds for; end as it does."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(sink, 2)
        return
    os.close(sink)
    with open(source, "rb") as said:
        os.write(2, said.read())
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    fault, *sys.argv = sys.argv[1:]
    if fault == "full":
        relay()
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    status = 0
    with FAULTS.get(fault, nullcontext)():
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        sys.stdout.flush()
    os._exit(status)  # at once: to tidy up takes longer than the rest
