"""Compiled regions: the elementwise work between a draft's matrix products, in few kernels instead of many.

A whole unroll has no one graph to compile, since it follows the answers of each batch. Its regions have one: they are
functions of tensors whose sizes are dynamic. Where they are not compiled, they are what their text says.
"""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


logger = logging.getLogger(__name__)

# devices whose kernels Triton writes
_WITH_TRITON = ("cuda", "xpu")
_mode = "auto"
_compiled: dict[Callable, Callable] = {}


def compile_regions(mode: str) -> None:
    """Say for this process whether regions are compiled in training.

    Args:
        mode: `"auto"` on GPUs, unless that fails there; `"on"` everywhere; `"off"` nowhere.
    """
    global _mode
    _mode = mode


def region(function: Callable) -> Callable:
    """A function of tensors that is compiled where regions are, when it is first called there.

    Its first argument is a tensor, `(rows, ...)`. It may change that one if it is contiguous, and has no gradient: an
    `autograd.Function` calls it. `training=False` runs it eagerly, for the few rows of a round of decoding. A single
    row is run eagerly too, because PyTorch gives sizes of 0 and 1 graphs of their own.
    """

    @wraps(function)
    def run(first: torch.Tensor, *rest: Any, training: bool = True) -> Any:
        wanted = _mode == "on" or (_mode == "auto" and first.device.type in _WITH_TRITON)
        if not (wanted and training) or len(first) < 2:
            return function(first, *rest)

        if function not in _compiled:
            _compiled[function] = torch.compile(function, dynamic=True)
        try:
            return _compiled[function](_plain(first), *(_plain(x.clone() if _inside(x) else x) for x in rest))
        except torch._dynamo.exc.TorchDynamoException as problem:  # nothing has been changed yet
            if _mode == "on":
                raise
            _give_up(problem)
            return function(first, *rest)

    return run


def _plain(x: Any) -> Any:
    """The same values in plain layout, as no view and without a wish for gradients: each of these has its own graph."""
    return x.detach().flatten().view(x.shape).data if isinstance(x, torch.Tensor) else x


def _inside(x: Any) -> bool:
    """Whether a tensor begins inside its storage, which has its own graph too."""
    return isinstance(x, torch.Tensor) and x.is_contiguous() and x.storage_offset() > 0


def _give_up(problem: Exception) -> None:
    compile_regions("off")
    said = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    logger.warning(
        "The draft is trained uncompiled, and slower, because `torch.compile` fails here (%s): install what it lacks, "
        "or set `compile_draft` to off.",
        said,
    )
