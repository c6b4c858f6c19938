"""Refuse what a run cannot have: evaluations without data, metrics that none gives, kernels that are missing."""

import re
from typing import TYPE_CHECKING

from ..arguments.groups import DataArguments, DraftArguments


if TYPE_CHECKING:
    from ..arguments.training import EagleTrainingArguments

# what every evaluation measures, besides an accuracy for each step of the unroll
METRICS = (
    *("loss", "estimated_acceptance_length", "supervised_rows_per_second"),
    *("runtime", "samples_per_second", "steps_per_second"),
)
_ACCURACY = re.compile(r"accuracy_step_\d+")


def check_evaluations(data: DataArguments, training: "EagleTrainingArguments", own: tuple[str, ...] = ()) -> None:
    """Check that requested evaluations have data, and that they measure what the run selects checkpoints by.

    Args:
        own: the metrics that this kind of draft adds.

    Raises:
        ValueError: naming the argument that asks for them.
    """
    evaluates = training.eval_strategy != "no"
    asks = {"eval_strategy": evaluates, "eval_on_start": training.eval_on_start}
    name = next((name for name, asked in asks.items() if asked), None)
    if name is not None and not data.eval_data and data.eval_share == 0:
        value = getattr(training, name)
        raise ValueError(
            f"`{name}` is {getattr(value, 'value', value)}, but there is nothing to evaluate on: name `eval_data`, set "
            f"`eval_share`, or leave out `{name}`."
        )

    best = {
        "load_best_model_at_end": training.load_best_model_at_end,
        "save_strategy": training.save_strategy == "best",
    }

    name = next((name for name, asked in best.items() if asked), None)
    if name is not None and not evaluates:
        value = getattr(training, name)
        raise ValueError(
            f"`{name}` is {getattr(value, 'value', value)}, but nothing is evaluated while training: set "
            "`eval_strategy`, or leave it out."
        )

    if evaluates:
        _check_metric(training, [*METRICS, *own, *(["acceptance_length"] if data.acceptance_prompts else [])])


def _check_metric(training: "EagleTrainingArguments", known: list[str]) -> None:
    """Raise `ValueError` for a metric that no evaluation gives."""
    metric = training.metric_for_best_model
    if metric is None:
        if training.save_strategy == "best":
            raise ValueError("`save_strategy` is best, but `metric_for_best_model` is not set: name a metric.")
        return

    name = metric.removeprefix("eval_")
    if name == "acceptance_length" and name not in known:
        raise ValueError(
            "`metric_for_best_model` is acceptance_length, which is measured on prompts: name `acceptance_prompts`."
        )

    if name not in known and not _ACCURACY.fullmatch(name):
        raise ValueError(
            f"`metric_for_best_model` is {metric}, which no evaluation measures: name one of {', '.join(known)}, or "
            "accuracy_step_0."
        )


def check_draft_attention(draft: DraftArguments, training: "EagleTrainingArguments") -> None:
    """Raise `ValueError` for attention that the draft cannot be trained with on the device of a run."""
    if draft.draft_attn_implementation == "flex_attention" and training.device.type == "cpu":
        raise ValueError(
            "`draft_attn_implementation` is flex_attention, which has no backward on a CPU: set it to sdpa or eager."
        )
