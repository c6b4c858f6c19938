"""What a run asks for and cannot have is refused before anything is loaded."""

import json

import pytest
from tiny import random_chats, tiny_eagle1_pair, tiny_pair
from tiny_blocks import tiny_block_pair
from transformers import TrainerState

from hf_eagle import EagleTrainer, EagleTrainingArguments
from hf_eagle.drafts.kinds import KINDS
from hf_eagle.training.checkpoints import write_manifest
from hf_eagle.training.feasible import METRICS, check_draft_attention
from hf_eagle.training.run_arguments import RunArguments


EVALUATED = ["--eval_strategy", "steps", "--eval_share", "0.1"]


def refuse(tmp_path, *words):
    given = ["--target", "nowhere", "--train_data", "nowhere", "--output_dir", str(tmp_path / "out"), *words]
    return RunArguments.parse(given).refuse_before_loading()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_strategy", "steps"], "`eval_strategy` is steps, but there is nothing to evaluate on"),
        (["--eval_on_start"], "`eval_on_start` is True, but there is nothing to evaluate on"),
        (["--load_best_model_at_end", "--save_strategy", "no"], "`load_best_model_at_end` is True, but nothing is"),
        (["--save_strategy", "best"], "`save_strategy` is best, but nothing is evaluated"),
        ([*EVALUATED, "--save_strategy", "best"], "`save_strategy` is best, but `metric_for_best_model` is not set"),
        ([*EVALUATED, "--metric_for_best_model", "x"], "`metric_for_best_model` is x, which no evaluation measures"),
        ([*EVALUATED, "--metric_for_best_model", "eval_x"], "`metric_for_best_model` is eval_x, which no evaluation"),
        ([*EVALUATED, "--metric_for_best_model", "ce_loss"], "`metric_for_best_model` is ce_loss, which no"),
        ([*EVALUATED, "--metric_for_best_model", "acceptance_length"], "which is measured on prompts"),
        (["--attn_implementation", "banana"], "`attn_implementation` must be one of"),
        (["--optim", "banana_8bit"], "optim"),
        (["--report_to", "banana"], "`report_to` names banana"),
        (["--output_dir="], "`output_dir` names no folder"),
    ],
)
def test_what_cannot_be_had(tmp_path, capsys, words, message):
    with pytest.raises((ValueError, SystemExit)) as told:
        refuse(tmp_path, *words)
    said = capsys.readouterr().err or str(told.value)
    assert message in said and "\n" not in said.strip()


def test_flex_attention_has_no_backward_on_a_cpu(tmp_path):
    with pytest.raises(
        ValueError, match="`draft_attn_implementation` is flex_attention, which has no backward on a CPU"
    ):
        refuse(tmp_path, "--draft_attn_implementation", "flex_attention", "--use_cpu")


@pytest.mark.parametrize(
    "words",
    [
        [],
        EVALUATED,
        ["--eval_strategy", "epoch", "--eval_data", "nowhere"],
        *([*EVALUATED, "--metric_for_best_model", name] for name in ("loss", "eval_loss", "accuracy_step_3")),
        [*EVALUATED, "--metric_for_best_model", "acceptance_length", "--acceptance_prompts", "nowhere"],
        [*EVALUATED, "--metric_for_best_model", "regression_loss", "--method", "eagle1"],
        [*EVALUATED, "--load_best_model_at_end", "--save_steps", "20"],
        ["--metric_for_best_model", "loss"],
        ["--attn_implementation", "sdpa"],
    ],
)
def test_what_can_be_had(tmp_path, words):
    assert refuse(tmp_path, *words) is None


@pytest.mark.parametrize("given", [["--output_dir", "x"], []])
def test_a_null_is_no_folder(tmp_path, given):
    """The library would write into a folder of its own name."""
    (tmp_path / "run.yaml").write_text("target: nowhere\ntrain_data: nowhere\noutput_dir: null\n")
    run = RunArguments.parse(["--config", str(tmp_path / "run.yaml"), *given])
    if given:
        assert run.training.output_dir == "x"
        return
    with pytest.raises(ValueError, match="`output_dir` names no folder: set it to"):
        run.refuse_before_loading()


@pytest.mark.parametrize("kind", ["eagle1", "eagle3", "dflash"])
def test_promised_metrics_are_those_of_an_evaluation(tmp_path, kind):
    pair = {"eagle1": tiny_eagle1_pair, "eagle3": tiny_pair, "dflash": tiny_block_pair}[kind]
    args = EagleTrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=True)
    target, draft = pair()
    found = EagleTrainer(draft, args, target, train_dataset=random_chats(4), eval_dataset=random_chats(4)).evaluate()
    others = {"epoch", "eval_model_preparation_time", *(f"eval_accuracy_step_{step}" for step in range(7))}
    assert set(found) - others == {f"eval_{name}" for name in (*METRICS, *KINDS[kind].metrics)}


def test_a_recipe_for_gpus_names_their_attention():
    asked = RunArguments.parse(["--config", "qwen3-30b-a3b-eagle3", "--use_cpu"])
    assert asked.draft.draft_attn_implementation == "flex_attention"
    with pytest.raises(ValueError, match="has no backward on a CPU"):
        check_draft_attention(asked.draft, asked.training)


@pytest.mark.parametrize("argument", ["init_from", "resume_from_checkpoint"])
@pytest.mark.parametrize("method", [method for kind in KINDS.values() for method in kind.methods])
def test_a_draft_of_another_kind_is_no_start(tmp_path, method, argument):
    """Of all pairs of kinds, and before anything is loaded; EAGLE-1 and 2 are one kind."""
    for kind in KINDS.values():
        folder = tmp_path / kind.name / "checkpoint-1"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"architectures": [next(iter(kind.architectures))]}))
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
            (folder / name).write_text("of a draft")
        TrainerState(global_step=1).save_to_json(str(folder / "trainer_state.json"))
        write_manifest(folder)

        words = ["--method", method, f"--{argument}", str(folder)]
        if method in kind.methods:
            refuse(tmp_path, *words)
            continue
        first = next(iter(kind.methods))
        with pytest.raises(ValueError, match=rf"^`method` is {method} but `{argument}` \S+ was trained with {first}:"):
            refuse(tmp_path, *words)
