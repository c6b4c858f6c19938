"""A pretended accelerator: its tensors say that they lie on it, and hold their values on the CPU.

What is written for an accelerator runs on it with real values, FSDP2 and collectives of gloo included, and an operation
whose tensors lie on two devices raises, as it would there. PyTorch lets a device be written in Python, but it cannot be
taken back: [`pretend`] is for a process that does nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_iter, tree_map


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

# what is registered in them lasts as long as they do
_all_operations = torch.library.Library("_", "IMPL")
_operations = torch.library.Library("aten", "IMPL")


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
    _operations.impl("_local_scalar_dense", lambda x: x.held.item(), DISPATCH_KEY)
    _operations.impl("_copy_from", _copy, DISPATCH_KEY)
    torch.Tensor.pin_memory = lambda x, device=None: x  # a device in Python has no such memory


# ---- operations ----


def _run(operation, *args, **kwargs):
    """An operation on the values of its tensors; what it returns lies where they do, or where it was asked to be."""
    came = {id(x.held): x for x in tree_iter((args, kwargs)) if isinstance(x, PretendedTensor)}
    if came:
        _check_devices(operation, args, kwargs)
    args, kwargs, asked = *tree_map(_held, (args, kwargs)), kwargs.get("device")
    held = _histogram(*args) if operation is aten.histc.default else operation(*args, **kwargs)
    if any(x.shape != x.held.shape for x in came.values()):
        raise NotImplementedError(f"{operation} resizes a tensor.")
    if asked is not None and torch.device(asked).type != NAME:
        return held

    def shown(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return came[id(x)] if id(x) in came else PretendedTensor(x)  # changed in place, it is the tensor that came

    return tree_map(shown, held)


def _held(x: Any) -> Any:
    if isinstance(x, PretendedTensor):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x


def _check_devices(operation, args: tuple, kwargs: dict) -> None:
    name = operation.overloadpacket.__name__
    if name in _COPIES:
        return
    for x in tree_iter((args[0], args[2:]) if name in _INDEXING else (args, kwargs)):
        # a number may come from anywhere
        if isinstance(x, torch.Tensor) and not isinstance(x, PretendedTensor) and x.dim() > 0:
            raise MixedDevices(f"{operation}: a tensor {tuple(x.shape)} on {x.device} meets one on {NAME}.")


def _histogram(x: torch.Tensor, *form: int) -> torch.Tensor:
    """Of integers too, as accelerators can; a CPU cannot, and transformers' experts ask which of the two it is."""
    return torch.histc(x.float(), *form).to(x.dtype)


def _copy(source: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
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

    def wait_event(self, event: "_Done") -> None:
        pass

    def wait_stream(self, stream: "_Done") -> None:
        pass


class _Module(backend_registration._DummyBackendModule):
    """`torch.pretended`."""

    Stream = Event = _Done

    def set_device(self, device: torch.device | int) -> None:
        pass

    def current_stream(self, device: torch.device | int | None = None) -> _Done:
        return _Done()

    def get_device_properties(self, device: torch.device | int | None = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=80 * 2**30)

    @contextmanager
    def stream(self, stream: _Done) -> Iterator[None]:
        yield
