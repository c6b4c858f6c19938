"""Try a forward that a model may not be able to run."""

from collections.abc import Callable
from typing import TypeVar

import torch


T = TypeVar("T")


def tried(run: Callable[[], T]) -> T | None:
    """Return what `run` returns, `None` if the model does not run so.

    Memory that runs out says nothing of a model, so that error is passed on.
    """
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None
