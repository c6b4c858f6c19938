"""Measure the time a function takes, the memory it adds, and how fast this machine multiplies matrices."""

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import lru_cache

import torch


# rows, columns and inner width of matrix products, large enough to be as fast as the device can
_SIZES = ((2048, 2048, 2048), (4096, 1024, 1024), (1024, 8192, 576))
_SIZES_OF_CUDA = ((8192, 8192, 8192),)


@lru_cache  # measured once a process, although a sweep asks at every point
def matmul_limit(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few large matrix products, measured now."""
    best = 0.0
    for m, n, k in _SIZES_OF_CUDA if device.type == "cuda" else _SIZES:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        a @ b
        best = max(best, *(2 * m * n * k / seconds(lambda a=a, b=b: a @ b, device) for _ in range(repeats)))
    return best


def seconds(function: Callable, device: torch.device) -> float:
    """Wall time of one call. Drains the device's queue before and after."""
    drain(device)
    begun = time.perf_counter()
    function()
    drain(device)
    return time.perf_counter() - begun


def drain(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(function: Callable, device: torch.device) -> int | None:
    """Peak bytes that a call adds to what was held before; `None` where that cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - held

    if platform.system() != "Linux":
        return None

    ctypes.CDLL(None).malloc_trim(0)  # or freed memory would hide what the call takes
    with open("/proc/self/clear_refs", "w") as switch:
        switch.write("5")  # resets the high-water mark to what is held now
    held = _status("VmRSS")
    function()
    return _status("VmHWM") - held


def room_of(device: torch.device) -> int | None:
    """Bytes of memory that a device has, used or not; `None` if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]

    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        return None


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def alternating_medians(functions: dict[str, Callable[[], dict]], repeats: int) -> dict[str, dict]:
    """Call all functions in turn, `repeats` times, under the same conditions. Returns the medians of their results."""
    runs = {name: [] for name in functions}
    for function in functions.values():
        function()  # warm

    for _ in range(repeats):
        for name, function in functions.items():
            runs[name].append(function())

    return {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
