"""Runs with a DFlash draft: draws, ranks, FSDP2, resuming, both forms of its folder, costs, and the script."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import pad_batch, random_chats, tiny_llama
from tiny_blocks import tiny_block_pair
from tiny_files import write_chats, write_tiny_target
from torch.utils.flop_counter import FlopCounterMode
from workers import run_worker

from hf_eagle import EagleTrainer, EagleTrainingArguments, load_draft
from hf_eagle.benchmark.dry_run import dry_run, shapes_of
from hf_eagle.drafts.costs_base import RunShapes
from hf_eagle.drafts.dflash.training import BlockObjective, DFlashTraining, training_for
from hf_eagle.drafts.kinds import KINDS
from hf_eagle.training.run_arguments import RunArguments
from hf_eagle.training.step import TrainingStep


CHATS = random_chats(20, seed=1)


def trainer_of(folder, pair=None, **fields):
    target, draft = tiny_block_pair(draft_num_layers=2, share_k_norm=True) if pair is None else pair
    known = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1, "save_strategy": "no"}
    known |= {"learning_rate": 1e-2, "num_anchors": 3, "report_to": "none", "disable_tqdm": True}
    args = EagleTrainingArguments(output_dir=str(folder), **known | fields)
    data = Dataset.from_list(CHATS)
    return EagleTrainer(draft, args, target, train_dataset=data, eval_dataset=data.select(range(6)))


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- the same run, in other ways ----


@pytest.mark.parametrize("form", ["servers", "transformers"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(form, tmp_path):
    """In either form of the folder, with workers, from inside an epoch: the draws of its rest are the same."""
    fields = {"save_strategy": "steps", "save_steps": 3}

    def pair():
        return tiny_block_pair(draft_num_layers=2, share_k_norm=True, served_form=form)

    whole = trainer_of(tmp_path / "whole", pair(), **fields)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    resumed = trainer_of(tmp_path / "again", pair(), dataloader_num_workers=2, **fields)
    resumed.train(resume_from_checkpoint="last")
    assert_same(weights(resumed), weights(whole))
    assert logged(resumed) == logged(whole) and len(logged(whole)) == 10


@pytest.mark.parametrize("form", ["servers", "transformers"])
def test_the_best_checkpoint_is_loaded_at_the_end(form, tmp_path):
    pair = tiny_block_pair(draft_num_layers=2, served_form=form)
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # the first
    trainer = trainer_of(tmp_path, pair, **best, **steps)
    trainer.train()
    best = load_draft(trainer.state.best_model_checkpoint)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    for name, tensor in best.state_dict().items():
        if name not in best.lent_tensors:
            assert torch.equal(tensor, trainer.model.state_dict()[name]), name


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """One launch alone, and two of two ranks: the draft replicated, and sharded."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_llama().save_pretrained(folder / "target")
    for name, draft, count in (("alone", "ddp", 1), ("ddp", "ddp", 2), ("fsdp2", "fsdp2", 2)):
        args = {"per_device_train_batch_size": 4 // count, "max_steps": 6, "num_anchors": 3, "learning_rate": 1e-2}
        options = {"draft_num_layers": 2, "share_k_norm": True, "served_form": "transformers"}
        run = {"out": str(folder / name), "target": str(folder / "target"), "records": 20, "args": args, "prompts": 3}
        spec = {**run, "method": "dflash", "options": options, "save": True}
        run_worker(folder / f"launch_{name}", count, worker="sharded_training_worker.py", draft=draft, runs=[spec])
    return folder


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_ranks_end_as_one(way, ranks):
    logs = [json.loads((ranks / name / "log.json").read_text()) for name in ("alone", way)]
    for name in ("loss", "acceptance_length", "estimated_acceptance_length"):
        found, wanted = ([entry[name] for entry in log if name in entry] for log in reversed(logs))
        assert found == pytest.approx(wanted, rel=2e-4) and len(found) in (2, 6)
    stored = [load_file(ranks / name / "run" / "model.safetensors") for name in ("alone", way)]
    assert stored[0].keys() == stored[1].keys() and "encoder.fc.weight" in stored[0]
    for name, tensor in stored[0].items():
        torch.testing.assert_close(stored[1][name], tensor, rtol=1e-3, atol=2e-4, msg=name)


# ---- what a step costs ----


@pytest.mark.parametrize("loss", ["ce", "label", "dpace"])
def test_the_costs_are_those_that_pytorch_counts(loss):
    """Its counter does not see the flash kernel, nor the scores inside blocks, which are products of batches."""
    target, draft = tiny_block_pair(draft_num_layers=2)
    step = TrainingStep(target, DFlashTraining(BlockObjective(loss), 5, 9, draft.config.mask_token_id))
    batch = pad_batch(CHATS)
    plan = step.plan(batch)
    seen = step.target_features(batch, plan)
    with FlopCounterMode(display=False) as counted:
        lesson = step.teach(draft.train(), seen, plan, torch.ones(4))
        step.unroll(draft, batch, plan, lesson).loss.backward()
    operations = counted.get_flop_counts()["Global"]
    products = sum(n for op, n in operations.items() if "bmm" not in str(op) and "attention" not in str(op))

    needed = draft.kind.part("costs").costs_of(draft.config).needed_flops(plan, loss)
    assert needed["projections"] + needed["head"] == pytest.approx(products, rel=0.02)
    assert needed["attention"] > 0


def test_a_dry_run_counts_what_it_holds():
    target, draft = tiny_block_pair(draft_num_layers=2)
    run = dry_run(target.model.config, draft.config, RunShapes(rows=2, length=64, bf16=False))
    held = {holding.what: holding for holding in run.kept + run.draft_step}
    wanted = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    assert held["draft, trained, float32"].parameters == wanted and "DFlashDraftModel" in run.title
    fewer = dry_run(target.model.config, draft.config, RunShapes(rows=2, length=64, bf16=False, num_anchors=2))
    assert fewer.draft_step[2].bytes < run.draft_step[2].bytes


@pytest.mark.parametrize("loss", KINDS["dflash"].losses)
def test_a_dry_run_counts_what_its_loss_needs_of_the_target(loss, recipe):
    """Losses of tokens need nothing: a step keeps the target's hidden states only to make its distributions."""
    target, draft = tiny_block_pair()
    run = RunArguments.parse([*recipe, "--dry_run", "--loss", loss])
    shapes = shapes_of(target.model.config, run.target, run.data, run.dry_run, run.training, 1)
    assert shapes.loss == loss
    batch, step = pad_batch(CHATS), TrainingStep(target, training_for(run.training, draft.config))
    plan = step.plan(batch)
    objective = step.teach(
        draft, step.target_features(batch, plan), plan, torch.ones(draft.config.chain_length)
    ).objective
    bound = inspect.getclosurevars(objective).nonlocals["teacher"]

    what, held = draft.kind.part("costs").costs_of(draft.config).teacher(shapes)
    assert (held > 0) == (loss == "ce") == (bound is not None) and "hidden states" in what


# ---- as a user starts it ----


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Arguments of a run, and the files that they name."""
    folder = tmp_path_factory.mktemp("script")
    write_tiny_target(folder / "target")
    write_chats(folder / "chats.jsonl")
    (folder / "asked.txt").write_text("red green\n")
    return [
        *("--method", "dflash", "--target", str(folder / "target"), "--train_data", str(folder / "chats.jsonl")),
        *("--draft_num_layers", "2", "--block_size", "4", "--num_anchors", "6", "--served_form", "transformers"),
        *("--output_dir", str(folder / "draft"), "--max_steps", "2", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "4", "--eval_share", "0.25", "--disable_tqdm", "true"),
        *("--feature_store", str(folder / "store"), "--cache_mode", "first_epoch", "--store_dtype", "float32"),
        *("--acceptance_prompts", str(folder / "asked.txt"), "--acceptance_steps", "2", "--max_length", "64"),
        *("--report_to", "none"),
    ]


def script(name):
    import runpy

    return runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py"))


def test_the_scripts_train_describe_and_resume_it(recipe, caplog):
    from hf_eagle.evaluation.prompts import load_prompts

    train, run = script("train_eagle"), RunArguments.parse(recipe)
    run.refuse_other_methods()
    prompts = load_prompts(run.data.acceptance_prompts)
    trainer = train["build_trainer"](run, run.refuse_before_loading(), prompts)
    train["leave_results"](trainer, trainer.train())

    folder = Path(run.training.output_dir)
    draft, config = load_draft(folder), json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "muse_glimmer_assistant" and draft.config.block_size == 4
    assert f"The mask token of its blocks is {draft.config.mask_token_id}" in (folder / "README.md").read_text()
    assert json.loads((folder / "card_facts.json").read_text())["chain_length"] == 3
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert any("acceptance_length" in entry for entry in history)

    # the mask token is the draft's, whatever the data now hold
    again = RunArguments.parse([*recipe, "--resume_from_checkpoint", "last", "--max_steps", "3"])
    again.data.feature_store = None  # the first run still holds it
    resumed = train["build_trainer"](again, again.refuse_before_loading(), None)
    resumed.train(resume_from_checkpoint="last")
    assert resumed.state.global_step == 3 and resumed.model.config.mask_token_id == draft.config.mask_token_id

    # its head is the target's, so none of its rows is counted
    started = RunArguments.parse([*recipe, "--init_from", str(folder), "--output_dir", str(folder) + "-started"])
    started.data.feature_store = None
    with caplog.at_level("INFO"):
        train["build_trainer"](started, started.refuse_before_loading(), None)
    assert f"Started from {folder}." in caplog.text

    other = RunArguments.parse([*recipe, "--resume_from_checkpoint", "last", "--block_size", "5"])
    other.data.feature_store = None
    with pytest.raises(ValueError, match="`block_size` is 5 but .* was trained with 4"):
        train["build_trainer"](other, other.refuse_before_loading(), None)


def test_a_mask_token_of_held_out_data_is_refused_before_training(recipe, tmp_path):
    """An evaluation reads it, hours later."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe[recipe.index("--target") + 1])
    (mask,) = tokenizer.encode("Z", add_special_tokens=False)  # which no chat holds
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green Z blue"}]
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"messages": turns}))

    words = [*recipe, "--output_dir", str(tmp_path / "draft"), "--mask_token_id", str(mask)]
    run = RunArguments.parse([*words, "--eval_data", str(tmp_path / "held_out.jsonl")])
    run.data.feature_store = None
    with pytest.raises(ValueError, match=f"`mask_token_id` is {mask}, but the data hold that token"):
        script("train_eagle")["build_trainer"](run, run.refuse_before_loading(), None)


@pytest.mark.parametrize("given", [("--draft_vocab_size", "24"), ("--ttt_steps", "3"), ("--draft_attention", "mla")])
def test_arguments_of_other_kinds_are_refused(given, recipe):
    with pytest.raises(ValueError, match=f"`{given[0][2:]}` is {given[1]}, which means nothing to a DFlash draft"):
        RunArguments.parse([*recipe, *given]).refuse_other_methods()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--tap_ids", "5", "3"), "must be ascending and unique"),
        (("--tap_ids", "3", "8"), "must be entry ids between 1 and 7"),
        (("--mask_token_id", "5000"), "`mask_token_id` must be a row of the target's table"),
    ],
)
def test_a_shape_that_no_draft_can_have_is_refused_before_data_are_read(given, told, recipe, tmp_path):
    words = [*recipe, "--train_data", str(tmp_path / "nowhere.jsonl"), "--output_dir", str(tmp_path / "draft"), *given]
    with pytest.raises(ValueError, match=told):
        script("train_eagle")["build_trainer"](RunArguments.parse(words), None, None)


def test_its_shape_is_refused_for_an_eagle_draft(recipe):
    words = [word if word != "dflash" else "eagle3" for word in recipe]
    with pytest.raises(ValueError, match="`draft_num_layers` is 2, which means nothing to an EAGLE-3 draft"):
        RunArguments.parse(words).refuse_other_methods()
