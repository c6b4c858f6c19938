"""Metrics of the TTT steps: sums stay on the device, and are divided when read."""

import time
from functools import lru_cache

import torch

from ..drafts.training_base import DraftTraining
from ..losses.objectives import estimated_acceptance_length


@lru_cache
def widest_float(device: torch.device) -> torch.dtype:
    """The dtype that a device sums in: float64, or float32 where there is none, as on MPS."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


class StepTotals:
    """Sums per TTT step since the last report, kept on the device until they are read."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.started = time.perf_counter()

    def add(self, **sums: torch.Tensor) -> None:
        """Add one batch's sums, each `(steps,)`."""
        for name, value in sums.items():
            value = value.detach()
            value = value.to(widest_float(value.device))
            self.sums[name] = value if name not in self.sums else self.sums[name] + value

    def metrics(self, accelerator, training: DraftTraining) -> dict[str, float]:
        """Means over all ranks: loss and its parts, accuracies, estimated acceptance length, rows per second.

        Without a supervised row there is nothing to divide by, so only rows per second are returned, zero.
        """
        if not self.sums:
            return {}

        reduced = {name: accelerator.reduce(value, reduction="sum") for name, value in sorted(self.sums.items())}
        total = {name: value.cpu().double() for name, value in reduced.items()}
        if not total["rows"].any() and total["loss"].isfinite().all():
            return {"supervised_rows_per_second": 0.0}

        rows = total["rows"].clamp_min(1)
        accuracies = (total["correct"] / rows).tolist()
        elapsed = time.perf_counter() - self.started
        factors = training.step_factors(total["rows"])
        means = {
            name: float((factors * value).sum())
            for name, value in total.items()
            if name not in ("correct", "leading", "rows")
        }
        # of rows that are right up to a step, where they were counted; else what is right at each step alone
        leading = (total["leading"] / rows).tolist() if "leading" in total else None
        length = estimated_acceptance_length(accuracies) if leading is None else 1 + sum(leading)

        return {
            **means,
            **{f"accuracy_step_{step}": round(value, 4) for step, value in enumerate(accuracies)},
            "estimated_acceptance_length": round(length, 4),
            # significant digits, not decimals: zero must mean that there was no row
            "supervised_rows_per_second": float(f"{float(total['rows'][0]) / elapsed:.4g}"),
        }


def logged_loss(log_history: list[dict]) -> float | None:
    """The mean loss of a run's steps, from what it logged of their windows; `None` if it logged none."""
    before, steps, total = 0, 0, 0.0
    for entry in (x for x in log_history if "learning_rate" in x):  # only those of training
        window, before = entry["step"] - before, entry["step"]
        if "loss" in entry:
            steps, total = steps + window, total + window * entry["loss"]

    return total / steps if steps else None
