"""Operations that a step needs, the rate this machine can do them at, and the memory a function adds."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..drafts.eagle3.configuration_latent import EagleMLAConfig
from ..drafts.row_layout import RowLayout
from ..losses.supervision import SupervisionPlan


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
    hidden, of = config.hidden_size, _AttentionSizes.of(config)
    pairs = sum(
        (r.stop - r.start) * (k.stop - k.start) if not causal else (r.stop - r.start) * (r.stop - r.start + 1) // 2
        for r, blocks in layout.spans
        for k, causal in blocks
    )
    per_row = hidden * (of.query + of.output) + of.query_behind + 3 * hidden * config.intermediate_size
    projections = 3 * rows * num_steps * per_row
    projections += 3 * rows * (num_steps - 1) * (hidden * of.key_value + of.key_value_behind)
    # step 0, where the tokens' halves are apart from those of the features
    projections += 3 * keys * (2 * hidden * of.key_value + of.key_value_behind) + 3 * rows * hidden * of.query
    projections += 2 * keys * config.num_taps * config.target_hidden_size * hidden  # no gradient for the features
    return {
        "projections": 2.0 * projections,
        "head": 2.0 * 3 * int(plan.counts.sum()) * hidden * config.draft_vocab_size,
        "attention": 2.0 * 3 * num_steps * pairs * of.scores_and_sums,
    }


@dataclass(frozen=True)
class _AttentionSizes:
    """Widths of what projects a draft layer's input, and multiplications of a row in what follows.

    Attributes:
        query, key_value: width of the projections of the layer's input.
        query_behind, key_value_behind: multiplications that make queries, and keys and values, of them.
        output: width of what the output projection takes.
        scores_and_sums: multiplications of a row and one key that it sees.
    """

    query: int
    key_value: int
    query_behind: int
    key_value_behind: int
    output: int
    scores_and_sums: int

    @classmethod
    def of(cls, config) -> "_AttentionSizes":
        heads = config.num_attention_heads
        if not isinstance(config, EagleMLAConfig):
            width = config.head_dim
            return cls(heads * width, 2 * config.num_key_value_heads * width, 0, 0, heads * width, 2 * heads * width)
        rank, latent = config.q_lora_rank, config.kv_lora_rank
        queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        values = heads * config.v_head_dim
        return cls(
            query=rank or queries,
            key_value=latent + config.qk_rope_head_dim,
            query_behind=(rank or 0) * queries,
            key_value_behind=latent * (heads * config.qk_nope_head_dim + values),
            output=values,
            scores_and_sums=queries + values,
        )


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
    """Wait until a device has done what it was given."""
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
