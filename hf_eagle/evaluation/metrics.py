"""`evaluate.Metric`s of drafts. Instantiate the classes: nothing is fetched by name, so they work offline."""

import datasets
import evaluate

from ..losses.objectives import estimated_acceptance_length
from .acceptance_length import acceptance_length, confidence_interval


IGNORED = -100  # a reference that does not count, as in `transformers`


class AcceptanceLength(evaluate.Metric):
    """
    Acceptance length from counts of decoded prompts: 1 + accepted tokens / drafts, with its 95% interval.

    Example:
        >>> metric = AcceptanceLength()
        >>> for run in runs:
        ...     metric.add(accepted_tokens=sum(run.accepted_per_position), drafts=run.drafts)
        >>> metric.compute()
        {'acceptance_length': 1.475, 'acceptance_length_interval': [1.42, 1.53]}
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Average number of tokens per forward pass of the target.",
            citation="https://arxiv.org/abs/2503.01840",
            inputs_description="One entry per prompt: `accepted_tokens`, of all its drafts, and `drafts`, its rounds.",
            features=datasets.Features({name: datasets.Value("int64") for name in ("accepted_tokens", "drafts")}),
        )

    def _compute(self, accepted_tokens, drafts):
        return {
            "acceptance_length": acceptance_length(accepted_tokens, drafts),
            "acceptance_length_interval": confidence_interval(accepted_tokens, drafts),
        }


class StepAccuracy(evaluate.Metric):
    """
    Share of rows whose token the draft's step `s` predicts correctly, for every step, and an acceptance length.

    Steps are teacher-forced (step `s` sees the right tokens before it), so the length is only an estimate.

    Example:
        >>> StepAccuracy().compute(predictions=[[5, 7], [5, 8]], references=[[5, 7], [6, 8]])
        {'accuracy_step_0': 0.5, 'accuracy_step_1': 1.0, 'estimated_acceptance_length': 2.0}
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of a draft at each step of its training-time test.",
            citation="https://arxiv.org/abs/2503.01840",
            inputs_description=f"Token ids: per row a list, one entry per step; references of {IGNORED} do not count.",
            features=datasets.Features(
                {name: datasets.List(datasets.Value("int64")) for name in ("predictions", "references")}
            ),
        )

    def _compute(self, predictions, references):
        accuracies = []
        for guesses, truths in zip(zip(*predictions, strict=True), zip(*references, strict=True), strict=True):
            counted = [guess == truth for guess, truth in zip(guesses, truths, strict=True) if truth != IGNORED]
            accuracies.append(sum(counted) / max(len(counted), 1))

        return {
            **{f"accuracy_step_{step}": value for step, value in enumerate(accuracies)},
            "estimated_acceptance_length": estimated_acceptance_length(accuracies),
        }
