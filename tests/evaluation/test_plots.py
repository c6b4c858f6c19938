import math

import pytest
from PIL import Image

from hf_eagle.evaluation.plots import (
    plot_acceptance,
    plot_acceptance_history,
    plot_growth,
    plot_runs,
    plot_serving,
    plot_sweep,
    plot_training,
    series,
)


ACCEPTANCE = {"drafts": 200, "accepted_per_position": [80, 30, 10], "acceptance_length": 1.6}


def log_history(steps: int, evaluations: bool) -> list[dict]:
    """What the Trainer keeps of a run: losses every 10 steps, evaluations every 50, a summary at the end."""
    history = []
    for step in range(10, steps + 1, 10):
        accuracy = {f"accuracy_step_{s}": (0.5 - 0.1 * s) * (1 - math.exp(-step / 50)) for s in range(3)}
        history.append({"step": step, "loss": 9 * math.exp(-step / 50) + 4, "epoch": step / 100} | accuracy)
        if evaluations and step % 50 == 0:
            history.append({"step": step, "eval_loss": 5.0} | {f"eval_{name}": v for name, v in accuracy.items()})
    return [*history, {"step": steps, "train_runtime": 12.0, "train_loss": 5.5}]


def colors(path) -> set:
    return {color for _, color in Image.open(path).convert("RGB").getcolors(maxcolors=1 << 24)}


def has_color(path, hex_color: str) -> bool:
    return tuple(int(hex_color[i : i + 2], 16) for i in (1, 3, 5)) in colors(path)


def test_training_plot_shows_evaluations_only_where_there_were_some(tmp_path):
    from hf_eagle.evaluation.plots import EVAL, TRAIN

    with_them = plot_training(log_history(200, True), tmp_path / "with.png")
    without = plot_training(log_history(200, False), tmp_path / "without.png")
    assert has_color(with_them, TRAIN) and has_color(with_them, EVAL)
    assert has_color(without, TRAIN) and not has_color(without, EVAL)
    assert Image.open(with_them).size == (1260, 476)


def test_a_run_without_a_logged_loss_gives_no_plot(tmp_path):
    assert plot_training([{"step": 3, "train_runtime": 1.0}], tmp_path / "none.png") is None
    assert not list(tmp_path.iterdir())


def test_a_single_logged_step_can_be_drawn(tmp_path):
    assert plot_training(log_history(10, False), tmp_path / "one.png").stat().st_size > 1000


def test_runs_and_growth_are_drawn(tmp_path):
    curves = {"float32": ([10, 20, 30], [3.0, 2.0, 1.5]), "bf16": ([10, 20], [3.1, 2.1])}
    assert Image.open(plot_runs(curves, tmp_path / "runs.png")).size == (1260, 476)
    panels = {"seconds": {"fast": [1.0, 2.1], "eager": [4.0, 15.0]}, "MiB": {"fast": [10.0, 20.0]}}
    assert Image.open(plot_growth("length", [512, 1024], panels, tmp_path / "growth.png")).size == (1260, 476)


def test_a_resumed_run_counts_each_step_once_with_its_last_value():
    history = [{"step": 20, "loss": 3.0}, {"step": 10, "loss": 5.0}, {"step": 20, "loss": 2.0}, {"step": 30, "x": 1}]
    assert series(history, "loss") == ([10, 20], [5.0, 2.0])


@pytest.mark.parametrize("by_category", [None, {"math": 1.9, "writing": 1.2, "empty": None}])
def test_acceptance_plot_has_a_second_half_for_categories(tmp_path, by_category):
    path = plot_acceptance(ACCEPTANCE | {"acceptance_length_by_category": by_category}, tmp_path / "a.png")
    assert Image.open(path).width == (1260 if by_category else 693)


@pytest.mark.parametrize("counts", [[0, 0, 0], [200, 200, 200]])
def test_none_and_all_accepted_can_be_drawn(tmp_path, counts):
    assert plot_acceptance(ACCEPTANCE | {"accepted_per_position": counts}, tmp_path / "a.png").exists()


def test_nothing_drafted_gives_no_plot(tmp_path):
    nothing = {"drafts": 0, "accepted_per_position": [0, 0, 0], "acceptance_length": None}
    assert plot_acceptance(nothing, tmp_path / "none.png") is None
    assert not list(tmp_path.iterdir())


def test_measured_acceptance_over_training_is_drawn_where_it_was_measured(tmp_path):
    history = log_history(100, True)
    assert plot_acceptance_history(history, tmp_path / "none.png") is None
    history += [{"step": step, "eval_acceptance_length": 1 + step / 100} for step in (40, 80)]
    history += [{"step": 60, "acceptance_length": 1.6}]
    path = plot_acceptance_history(history, tmp_path / "some.png")
    assert has_color(path, "#d1793b") and not has_color(path, "#3b6fb6")
    history += [{"step": step, "estimated_acceptance_length": 1.3 + step / 100} for step in (40, 80)]
    path = plot_acceptance_history(history, tmp_path / "both.png")
    assert has_color(path, "#d1793b") and has_color(path, "#3b6fb6")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("alone", [20.0, None])
def test_a_sweep_shows_the_target_alone_where_it_was_run(tmp_path, alone):
    sweep = [
        {"num_speculative_tokens": k, "acceptance_length": length, "tokens_per_second": 20 + k}
        | {"target_only_tokens_per_second": alone}
        for k, length in ((1, 1.3), (2, 1.5), (3, None))
    ]
    path = plot_sweep(sweep, tmp_path / "sweep.png")
    assert has_color(path, "#d1793b") == (alone is not None) and has_color(path, "#3b6fb6")
    assert plot_sweep([], tmp_path / "none.png") is None


def test_serving_has_a_line_a_batch_size(tmp_path):
    entries = [
        {"num_speculative_tokens": k, "batch_size": size, "speedup": 1 + k / size, "tokens_per_second": 20.0 * size}
        for k in (0, 1, 3)
        for size in (1, 8)
    ]
    one = plot_serving([entry for entry in entries if entry["batch_size"] == 1], tmp_path / "one.png")
    two = plot_serving(entries, tmp_path / "two.png")
    # the darkest and the lightest shade of two lines; one line has the dark one alone
    assert has_color(one, "#440154") and not has_color(one, "#9ed93a")
    assert has_color(two, "#440154")
    assert len(colors(two) - colors(one)) > 20
