"""Operations that a step needs, the rate this machine can do them at, and the memory a function adds."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from functools import lru_cache

import torch

from ..drafts.row_layout import RowLayout
from ..supervision import SupervisionPlan


def needed_flops(config, plan: SupervisionPlan, documents: torch.Tensor, num_steps: int) -> dict[str, float]:
    """Matrix operations of an EAGLE-3 draft's forward and backward that its supervised rows need, in FLOP.

    A product counts twice its multiplications, thrice over (forward, both gradients) where both sides are trained or
    lead to what is; what a kernel recomputes does not count.

    Args:
        config: the draft's.
        plan: the supervised rows.
        documents: `(batch, length)`, negative on padding.
        num_steps: TTT steps.

    Returns:
        FLOP of the `projections` (MLP among them), of the `head` and of `attention`.
    """
    layout = RowLayout.of(plan.rows, documents)
    rows, keys = len(layout.rows), len(layout.keys)
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
    key_value = 2 * config.num_key_value_heads * width
    pairs = sum(
        (r.stop - r.start) * (k.stop - k.start) if not causal else (r.stop - r.start) * (r.stop - r.start + 1) // 2
        for r, blocks in layout.spans
        for k, causal in blocks
    )
    per_row = hidden * heads * width * 2 + 3 * hidden * config.intermediate_size  # q and o, MLP
    projections = 3 * rows * num_steps * per_row + 3 * rows * (num_steps - 1) * hidden * key_value
    projections += 3 * 2 * keys * hidden * key_value + 3 * rows * hidden * heads * width  # step 0, the tokens' halves
    projections += 2 * keys * config.num_taps * config.target_hidden_size * hidden  # no gradient for the features
    return {
        "projections": 2.0 * projections,
        "head": 2.0 * 3 * int(plan.counts.sum()) * hidden * config.draft_vocab_size,
        "attention": 2.0 * 6 * num_steps * pairs * heads * width,
    }


@lru_cache  # once a process: a sweep asks at every point
def matmul_limit(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of the best of a few large matrix products on this machine, now."""
    best = 0.0
    for m, n, k in ((2048, 2048, 2048), (4096, 1024, 1024), (1024, 8192, 576)):
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        a @ b
        best = max(best, *(2 * m * n * k / seconds(lambda a=a, b=b: a @ b, device) for _ in range(repeats)))
    return best


def seconds(function: Callable, device: torch.device) -> float:
    """Wall time of one call, the device's queue drained before and after."""
    drain(device)
    begun = time.perf_counter()
    function()
    drain(device)
    return time.perf_counter() - begun


def drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(function: Callable, device: torch.device) -> int | None:
    """Bytes that a call adds to what is held before it, at its peak; `None` where that cannot be seen."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - held
    if platform.system() != "Linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory would hide what the call takes
    with open("/proc/self/clear_refs", "w") as switch:
        switch.write("5")  # the high-water mark falls to what is held now
    held = _status("VmRSS")
    function()
    return _status("VmHWM") - held


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def alternating_medians(functions: dict[str, Callable[[], dict]], repeats: int) -> dict[str, dict]:
    """Each function `repeats` times, taking turns, so that all meet the same machine; medians of what they return."""
    runs = {name: [] for name in functions}
    for function in functions.values():
        function()  # warm
    for _ in range(repeats):
        for name, function in functions.items():
            runs[name].append(function())
    return {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
