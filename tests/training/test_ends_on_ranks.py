"""The ends of runs on two ranks, replicated and sharded: both ranks end alike, and what was good is still there."""

import json

import pytest
from workers import run_worker

from hf_eagle.training.checkpoints import checkpoints, why_incomplete


ARGS = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 1, "save_total_limit": 1}


# where ranks learn of a loss that broke in step 3 on one of them, when no gradient tells
FOUND = {
    "next step": {"save_strategy": "no", "logging_steps": 9},
    "log": {"save_strategy": "no", "logging_steps": 1},
    "save": {"save_steps": 3, "logging_steps": 9},
    "evaluation": {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3},
    "end": {"save_strategy": "no", "max_steps": 3},
}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def ended(request, tmp_path_factory):
    """A folder with all runs, in one launch."""
    folder = tmp_path_factory.mktemp(request.param)
    weights = {"what": "weights", "step": 2}
    if request.param == "fsdp2":
        weights["rank"] = 1  # whose part of the weights breaks; a replica's breaks on all

    def told(name, fields=None, in_folder_of=None, **spec):
        # a run that continues another has its folder, and leaves its outcome beside
        out = folder / (in_folder_of or name)
        return {"out": str(folder / name), "args": {**ARGS, **(fields or {}), "output_dir": str(out / "run")}, **spec}

    only_model = {"save_only_model": True, "save_steps": 2}
    runs = [
        told("gradient", **{"break": {"what": "gradient", "step": 2, "rank": 1}}),
        told("last_gradient", {"save_strategy": "no"}, **{"break": {"what": "gradient", "step": 3, "rank": 1}}),
        told("loss", {"logging_steps": 9}, **{"break": {"what": "loss", "step": 2, "rank": 1}}),
        *(
            told(
                f"{what}, {found}", fields, **{"break": {"what": what, "step": 2, "rank": 1}, "scaled": what == "loss"}
            )
            for what in (("loss alone", "loss") if request.param == "ddp" else ("loss alone",))
            for found, fields in FOUND.items()
        ),
        told("weights", **{"break": weights}),
        told("last_weights", {"save_strategy": "no"}, **{"break": weights | {"step": 3}}),
        told("bare", bare=True),
        told("only_model", {**only_model, "max_steps": 2}),
        told("refused", only_model, "only_model", resume="last"),
        told("anew", {**only_model, "ignore_missing_state": True}, "only_model", resume="last"),
        told("whole", {"max_steps": 2}),
        told("finished", {"max_steps": 2}, "whole", resume="last"),
    ]
    run_worker(folder, 2, worker="ends_worker.py", draft=request.param, runs=runs)
    return folder


def outcome(folder, name):
    """What both ranks say alike, problems apart: each names its own records."""
    found = [json.loads((folder / name / f"outcome_{rank}.json").read_text()) for rank in (0, 1)]
    problems = [each.pop("problem") for each in found]
    assert found[0] == found[1]
    return found[0], problems


def assert_problems(folder, name, kind, *parts):
    _, problems = outcome(folder, name)
    for found in problems:
        assert found is not None and found[0] == kind, found
        assert all(part in found[1] for part in parts), found


def records_of(folder, name, step):
    """The records that each rank left of a step."""
    paths = [folder / name / "run" / f"broken-step-{step}-rank-{rank}.jsonl" for rank in (0, 1)]
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def test_a_gradient_that_is_no_number_stops_both_ranks_with_its_records(ended):
    assert_problems(ended, "gradient", "FloatingPointError", "gradient of step 3 is nan", "checkpoint-2 is complete")
    assert [p.name for p in checkpoints(ended / "gradient" / "run")] == ["checkpoint-2"]
    assert why_incomplete(ended / "gradient" / "run" / "checkpoint-2") is None
    first, second = records_of(ended, "gradient", 3)
    assert len(first) == len(second) == 2 and first != second
    assert all(any(record["loss_mask"]) for record in first + second)


def test_a_loss_that_is_no_number_on_one_rank_stops_both(ended):
    """If that rank stopped at once, the other would wait for its gradient."""
    assert_problems(ended, "loss", "FloatingPointError", "gradient of step 3 is nan", "checkpoint-2 is complete")
    first, second = outcome(ended, "loss")[1]
    assert "rank 1 had a loss of nan" in second[1] and "had a loss" not in first[1]


@pytest.mark.parametrize("found", FOUND)
@pytest.mark.parametrize("what", ["loss alone", "loss"])
def test_a_loss_that_breaks_no_gradient_stops_both_ranks(what, found, ended):
    """One made apart from the loss, or one that a loss scaler skips; the other rank would wait for ever."""
    name = f"{what}, {found}"
    if not (ended / name).is_dir():
        pytest.skip("a loss scaler is tried with a replicated draft")
    assert_problems(ended, name, "FloatingPointError", "so no rank goes on", "no complete checkpoint")
    first, second = outcome(ended, name)[1]
    assert first[1].startswith("The loss of another rank is NaN or infinite (this is rank 0)")
    assert second[1].startswith("The loss of step 3 is nan (this is rank 1)")
    assert [path.name for path in (ended / name / "run").glob("broken-*")] == ["broken-step-3-rank-1.jsonl"]
    assert not checkpoints(ended / name / "run")


def test_the_last_steps_gradient_is_looked_at_too(ended):
    assert_problems(ended, "last_gradient", "FloatingPointError", "gradient of step 4 is nan", "no complete checkpoint")
    assert not list((ended / "last_gradient" / "run").glob("*.safetensors"))


def test_weights_that_broke_are_not_saved_and_rotate_nothing_away(ended):
    message = ("The weights hold NaN or infinity after step 3 (fc.weight)", "checkpoint-2 is complete")
    assert_problems(ended, "weights", "FloatingPointError", *message)
    assert [p.name for p in checkpoints(ended / "weights" / "run")] == ["checkpoint-2"]
    assert_problems(ended, "last_weights", "FloatingPointError", "after step 4 (fc.weight)")
    assert not list((ended / "last_weights" / "run").glob("*.safetensors"))


def test_a_run_without_a_supervised_row_saves_nothing(ended):
    assert_problems(ended, "bare", "ValueError", "`train_dataset` gave no supervised row in the steps up to 2")
    assert not checkpoints(ended / "bare" / "run") and not list((ended / "bare" / "run").glob("*.safetensors"))


def test_a_checkpoint_of_the_model_alone_is_refused_unless_told(ended):
    missing = ("checkpoint-2 is not a complete checkpoint: it has no optimizer.pt and no scheduler.pt",)
    assert_problems(ended, "refused", "ValueError", *missing, "`--ignore_missing_state`")
    found, problems = outcome(ended, "anew")
    assert problems == [None, None] and found["step"] == 4
    # of four steps the last two: the schedule was begun anew
    assert found["learning_rates"][2] == pytest.approx(1e-4)


def test_a_finished_run_is_not_trained(ended):
    found, problems = outcome(ended, "finished")
    assert problems == [None, None] and found["nothing_to_do"] and found["step"] == 2
    assert not outcome(ended, "whole")[0]["nothing_to_do"]
