"""A pretended accelerator: its tensors say that they lie on it, and hold their values on the CPU.

What is written for an accelerator runs on it with real values, FSDP2 and collectives of gloo included, and an operation
whose tensors lie on two devices raises, as it would there. PyTorch lets a device be written in Python, but it cannot be
taken back: [`pretend`] is for a process that does nothing else.

It has no float64, as some accelerators have none.

[`recorded`] tells what an accelerator makes slow: where the host waits for it, and how many operations and casts it is
asked for.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import backend_registration


if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    raise ImportError(f"A device in Python needs torch 2.10 or newer, and this is {torch.__version__}.")

aten = torch.ops.aten
NAME = "pretended"
DISPATCH_KEY = "PrivateUse1"
# operations that bring values from one device to another
_COPIES = ("_to_copy", "copy_")
# operations that bring their indices to what they index
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
# operations that PyTorch else lets an empty tensor be resized by, which a PretendedTensor cannot be
_SIZED_WHEN_FILLED = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m)
_SIZED_WHEN_FILLED += (aten.linspace.default, aten.randperm.default)

_MISSING = (torch.float64, torch.complex128)

# operations whose results have a size, or a place, that only the values tell: an accelerator sends it to the host
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave", "multinomial")
_WAITING += ("_unique", "_unique2", "unique_dim", "unique_dim_consecutive", "unique_consecutive")

# operations that autocast computes in half precision, of those that a draft and its target ask for
_HALF_IN_AUTOCAST = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm")
AUTOCAST_KEY = "AutocastPrivateUse1"

# what is registered in them lasts as long as they do
_all_operations = torch.library.Library("_", "IMPL")
_operations = torch.library.Library("aten", "IMPL")


@dataclass
class Record:
    """What the device was asked for.

    Attributes:
        waits: where the host waited for it, and how often: part, operation, and the line of hf_eagle that asked for it.
        operations: how often it was asked for each operation; views are none.
        casts: how many of these only changed a dtype.
        part: of the work that is recorded, named by whoever records.
    """

    waits: Counter = field(default_factory=Counter)
    operations: Counter = field(default_factory=Counter)
    casts: int = 0
    part: str = ""

    def wait(self, why: str) -> None:
        self.waits[self.part, why, _line()] += 1


_record: Record | None = None


@contextmanager
def recorded() -> Iterator[Record]:
    """Record what the device is asked for within the block."""
    global _record
    _record = record = Record()
    try:
        yield record
    finally:
        _record = None


def _line() -> str:
    """The innermost line of hf_eagle that runs, or what else runs, and through which library's line."""
    frame, through = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/hf_eagle/" in name and "site-packages" not in name:
            return f"{name.rpartition('/hf_eagle/')[2]}:{frame.f_lineno}{through}"
        if not through and name != __file__ and "/torch/" not in name:
            through = f" through {name.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return f"elsewhere{through}"


class MixedDevices(RuntimeError):
    """One operation was given tensors of two devices."""


class PretendedTensor(torch.Tensor):
    """A tensor on the pretended device; `held` are its values, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        form = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **form)

    def __init__(self, held: torch.Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, *args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"PretendedTensor({self.held!r})"

    # these two PyTorch has for no subclass

    def tolist(self) -> list:
        if _record is not None:
            _record.wait("tolist")
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:  # by which FSDP2 frees what it has gathered
        return self.held.untyped_storage()


def pretend() -> None:
    """From now on this process has one accelerator, the pretended one."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _all_operations.fallback(_run, DISPATCH_KEY)  # those that make tensors, and so get none
    for operation in _SIZED_WHEN_FILLED:
        _operations.impl(operation, partial(_run, operation), DISPATCH_KEY)
    # `torch.tensor(..., device=...)` reads and fills tensors past their `__torch_dispatch__`
    _operations.impl("_local_scalar_dense", _number, DISPATCH_KEY)
    _operations.impl("_copy_from", _copy, DISPATCH_KEY)
    _all_operations.fallback(torch.library.fallthrough_kernel, AUTOCAST_KEY)
    for name in _HALF_IN_AUTOCAST:
        _operations.impl(name, partial(_in_half, getattr(aten, name).default), AUTOCAST_KEY)
    torch.Tensor.pin_memory = lambda x, device=None: x  # a device in Python has no such memory
    torch.accelerator.synchronize = lambda device=None: None  # nor a queue to wait for


# ---- operations ----


def _run(operation, *args, **kwargs):
    """An operation on the values of its tensors; what it returns lies where they do, or where it was asked to be."""
    came = {id(x.held): x for x in _every([args, *kwargs.values()]) if isinstance(x, PretendedTensor)}
    if came:
        _check_devices(operation, args, kwargs)
    if _record is not None:
        _note(_record, operation, args, kwargs)
    asked = kwargs.get("device")
    args, kwargs = _changed(args, _held), {name: _changed(x, _held) for name, x in kwargs.items()}
    held = _histogram(*args) if operation is aten.histc.default else operation(*args, **kwargs)
    if any(x.shape != x.held.shape for x in came.values()):
        raise NotImplementedError(f"{operation} resizes a tensor.")
    if asked is not None and torch.device(asked).type != NAME:
        return held

    def shown(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if x.dtype in _MISSING:
            raise TypeError(f"{operation}: {NAME} has no {x.dtype}.")
        return came[id(x)] if id(x) in came else PretendedTensor(x)  # changed in place, it is the tensor that came

    return _changed(held, shown)


def _every(x: Any) -> Iterator[Any]:
    """What an operation's arguments hold, lists of tensors taken apart."""
    if isinstance(x, list | tuple):
        for part in x:
            yield from _every(part)
    else:
        yield x


def _changed(x: Any, change: Callable[[Any], Any]) -> Any:
    """The same with all that it holds changed. Some lines of PyTorch's trees do it too, in four times the time."""
    return type(x)(_changed(part, change) for part in x) if type(x) in (list, tuple) else change(x)


def _note(record: Record, operation, args: tuple, kwargs: dict) -> None:
    """Count one operation; those that an accelerator makes the host wait for by name."""
    name, given = operation.overloadpacket.__name__, args[0] if args else None
    if not operation.is_view:
        record.operations[name] += 1

    if name in _COPIES:
        there = isinstance(given, PretendedTensor)
        onto = there if name == "copy_" else torch.device(kwargs.get("device") or given.device).type == NAME
        came = isinstance(args[1], PretendedTensor) if name == "copy_" else there
        if onto != came and not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))):
            record.wait("a copy to the device" if onto else "a copy to the host")
        record.casts += name == "_to_copy" and onto == came and kwargs.get("dtype") not in (None, given.dtype)
    elif name in _INDEXING:
        for index in args[1]:
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                record.wait("a mask as an index")
            elif isinstance(index, torch.Tensor) and not isinstance(index, PretendedTensor):
                record.wait("an index on the host")
    elif name in _WAITING and kwargs.get("output_size") is None:
        record.wait("a number" if name == "_local_scalar_dense" else name)


def _in_half(operation, *args, **kwargs):
    """What autocast makes of an operation; it keeps no casts of weights, which only makes their number larger."""
    dtype = torch.get_autocast_dtype(NAME)

    def half(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, AUTOCAST_KEY))):
        return operation(*(half(x) for x in args), **kwargs)


def _number(x: PretendedTensor) -> bool | int | float:
    if _record is not None:
        _record.wait("a number")
    return x.held.item()


def _held(x: Any) -> Any:
    if isinstance(x, PretendedTensor):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x


def _check_devices(operation, args: tuple, kwargs: dict) -> None:
    name = operation.overloadpacket.__name__
    if name in _COPIES:
        return
    for x in _every((args[0], args[2:]) if name in _INDEXING else (args, *kwargs.values())):
        # a number may come from anywhere
        if isinstance(x, torch.Tensor) and not isinstance(x, PretendedTensor) and x.dim() > 0:
            raise MixedDevices(f"{operation}: a tensor {tuple(x.shape)} on {x.device} meets one on {NAME}.")


def _histogram(x: torch.Tensor, *form: int) -> torch.Tensor:
    """Of integers too, as accelerators can; a CPU cannot, and transformers' experts ask which of the two it is."""
    return torch.histc(x.float(), *form).to(x.dtype)


def _copy(source: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if _record is not None and isinstance(source, PretendedTensor) != isinstance(to, PretendedTensor):
        if not non_blocking:
            _record.wait("a copy")
    _held(to).copy_(_held(source))
    return to


# ---- what `torch.cuda` is to CUDA ----


class _Done:
    """A stream, or an event: whatever this device was asked to do has been done."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream: "_Done | None" = None) -> "_Done":
        return self

    def record_event(self, event: "_Done | None" = None) -> "_Done":
        return self

    def synchronize(self) -> None:
        if _record is not None:
            _record.wait("an event")

    def wait_event(self, event: "_Done") -> None:
        pass

    def wait_stream(self, stream: "_Done") -> None:
        pass


class _Module(backend_registration._DummyBackendModule):
    """`torch.pretended`."""

    Stream = Event = _Done

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def set_device(self, device: torch.device | int) -> None:
        pass

    def current_stream(self, device: torch.device | int | None = None) -> _Done:
        return _Done()

    def get_device_properties(self, device: torch.device | int | None = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=80 * 2**30)

    @contextmanager
    def stream(self, stream: _Done) -> Iterator[None]:
        yield
