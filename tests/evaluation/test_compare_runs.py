"""scripts/compare_runs.py: runs are told apart, and what is no run is named."""

import json

import pytest

from hf_eagle.evaluation.plots import plot_runs, plot_training
from scripts import compare_runs
from scripts.compare_runs import read_curves


def run(folder, losses, **more):
    folder.mkdir(parents=True)
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*history, {"train_loss": 1}], **more}))
    return str(folder)


def test_runs_are_named_by_their_folders_and_told_apart(tmp_path, monkeypatch):
    one, two = run(tmp_path / "a" / "out", [3, 2.5]), run(tmp_path / "b" / "out", [4])
    other = run(tmp_path / "other", [5])
    curves = read_curves([one, two, other, one + "/"])
    assert curves == {one: ([1, 2], [3, 2.5]), two: ([1], [4]), "other": ([1], [5])}
    monkeypatch.chdir(tmp_path / "other")
    assert list(read_curves(["."])) == ["other"]


@pytest.mark.parametrize(
    "state, sentence",
    [
        ({}, "lacks `log_history`"),
        ([], "must hold an object, but holds a list"),
        ({"log_history": None}, "must hold a list as `log_history`, but holds null"),
        ({"log_history": [3]}, r"must hold an object as `log_history\[0\]`, but holds a whole number"),
        ({"log_history": [{"step": 1, "loss": "low"}]}, r"must hold a number as `log_history\[0\].loss`"),
        ({"log_history": [{"step": 1, "loss": 1e308}]}, "logs a `loss` of 1e\\+308 at step 1, which cannot be drawn"),
        ({"log_history": [{"step": 1, "loss": -1e200}]}, "logs a `loss` of -1e\\+200 at step 1, which cannot be"),
        ({"log_history": [{"step": 10**200, "loss": 1}]}, "logs a `loss` of 1 at step 1e\\+200, which cannot be"),
        ({"log_history": [{"step": 1}]}, "logs no `loss` in its `log_history`"),
    ],
)
def test_a_state_that_holds_no_curve_is_named(tmp_path, state, sentence):
    folder = run(tmp_path / "first", [3])
    (tmp_path / "first" / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"first/trainer_state.json {sentence}.*give folders that training wrote"):
        read_curves([folder])


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e99, -1e99])
def test_a_run_that_diverged_is_drawn(tmp_path, odd):
    curves = read_curves([run(tmp_path / "one", [3, odd, odd]), run(tmp_path / "two", [odd, 2, odd])])
    assert plot_runs(curves, tmp_path / "curves.png").stat().st_size


def test_a_folder_without_a_state_is_named(tmp_path):
    with pytest.raises(ValueError, match="`runs` names .*, which holds no trainer_state.json"):
        read_curves([str(tmp_path)])


def test_no_picture_of_a_run_is_replaced_but_an_earlier_comparison_is(tmp_path):
    one, two = run(tmp_path / "one", [3, 2.5]), run(tmp_path / "two", [4, 3])
    plot_training([{"step": 1, "loss": 2.0}], f"{two}/training.png")
    plot_training([{"step": 1, "loss": 2.0}], tmp_path / "outside.png")

    def pass_door(picture):
        compare_runs.door(["--runs", one, two, "--output_png", str(picture)])

    with pytest.raises(ValueError, match="`output_png` .*training.png is a file of the input `runs` .*two: name a"):
        pass_door(f"{two}/training.png")

    pass_door(f"{two}/curves.png")
    plot_runs(read_curves([one, two]), f"{two}/curves.png")
    pass_door(f"{two}/curves.png")
    pass_door(tmp_path / "outside.png")
