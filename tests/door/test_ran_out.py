"""An error that means that memory ran out is none of files, whatever library says it, and in whatever it is wrapped."""

import errno

import pytest
import torch

from hf_eagle.door.memory import ran_out_of_memory
from hf_eagle.door.reading import reading
from hf_eagle.door.writing import is_write_error


class SafetensorError(Exception):
    """As safetensors calls it."""


WRITER = "[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"
RAN_OUT = {
    "Python": MemoryError(),
    "an accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "an accelerator, by its driver": RuntimeError("CUDA error: out of memory"),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)."),
    "the CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "the CPU, on Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte."),
    "the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "safetensors": SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
}
OTHERS = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError(WRITER),
    SafetensorError("I/O error: No space left on device (os error 28)"),
    SafetensorError("I/O error: Disk quota exceeded (os error 122)"),
    ValueError("out of memory lane"),
]


def raised(problem, cause=None, hidden=False):
    """The error as a library raises it while it handles another one."""
    try:
        try:
            raise cause or KeyError()
        except Exception:
            if hidden:
                raise problem from None
            raise problem  # noqa: B904
    except Exception as found:
        return found


@pytest.mark.parametrize("problem", RAN_OUT.values(), ids=RAN_OUT)
def test_memory_is_told_from_a_full_disk_and_from_a_bad_file(problem):
    assert ran_out_of_memory(problem) and not is_write_error(problem)
    with pytest.raises(type(problem)) as found, reading("target", "you/model"):
        raise problem
    assert found.value is problem


@pytest.mark.parametrize("cause", RAN_OUT.values(), ids=RAN_OUT)
def test_a_writer_that_cannot_end_its_file_behind_it_is_no_full_disk(cause):
    """`torch.save` ends its archive after any error, and then says that this failed."""
    assert not is_write_error(raised(RuntimeError(WRITER), cause))
    assert is_write_error(raised(RuntimeError(WRITER), cause, hidden=True))


@pytest.mark.parametrize("problem", OTHERS)
def test_other_errors_are_none(problem):
    assert not ran_out_of_memory(raised(problem)) and not ran_out_of_memory(None)
