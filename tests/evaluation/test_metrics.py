"""Metrics of drafts: no network, the numbers of plain arithmetic, an interval that holds what it promises."""

import random

import pytest

from hf_eagle.evaluation.acceptance_length import acceptance_length, confidence_interval
from hf_eagle.evaluation.metrics import AcceptanceLength, StepAccuracy


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a metric asked for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


def test_acceptance_length_adds_up_prompts():
    metric = AcceptanceLength()
    for accepted, drafts in ((3, 4), (0, 2), (5, 3)):
        metric.add(accepted_tokens=accepted, drafts=drafts)
    found = metric.compute()
    assert found["acceptance_length"] == 1 + 8 / 9
    low, high = found["acceptance_length_interval"]
    assert 1.0 <= low < 1 + 8 / 9 < high <= 1 + 5 / 3
    again = AcceptanceLength().compute(accepted_tokens=[3, 0, 5], drafts=[4, 2, 3])
    assert again == found


def test_nothing_drafted_has_no_length():
    assert acceptance_length([0, 0], [0, 0]) is None
    assert confidence_interval([0, 0], [0, 0]) is confidence_interval([3], [4]) is None
    assert confidence_interval([3, 0], [4, 0]) is None


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """300 experiments of 40 prompts: 95% coverage would be below 0.90 or at 1 with a probability under 1e-4."""
    generator = random.Random(0)
    covered = 0
    for _ in range(300):
        drafts = [generator.randint(5, 30) for _ in range(40)]
        # prompts differ in how easy they are; 0.5 on average
        accepted = [
            sum(generator.random() < p for _ in range(d)) for d in drafts for p in [generator.uniform(0.2, 0.8)]
        ]
        low, high = confidence_interval(accepted, drafts)
        covered += low <= 1.5 <= high
    assert 0.90 < covered / 300 < 1


def test_step_accuracy_leaves_out_what_is_ignored():
    predictions = [[5, 7, 1], [5, 8, 1], [4, 8, 2], [4, 9, 2]]
    references = [[5, 7, 1], [6, 8, -100], [4, 9, 2], [4, -100, 3]]
    found = StepAccuracy().compute(predictions=predictions, references=references)
    accuracies = [found[f"accuracy_step_{step}"] for step in range(3)]
    assert accuracies == [3 / 4, 2 / 3, 2 / 3]
    estimate = 1 + 3 / 4 + 3 / 4 * 2 / 3 + 3 / 4 * (2 / 3) ** 2
    assert found["estimated_acceptance_length"] == pytest.approx(estimate)


def test_metrics_are_metrics_of_evaluate():
    import evaluate

    combined = evaluate.combine([AcceptanceLength()])
    assert combined.compute(accepted_tokens=[1, 1], drafts=[1, 1])["acceptance_length"] == 2.0
    for metric in (AcceptanceLength, StepAccuracy):
        assert issubclass(metric, evaluate.Metric) and metric().description
