"""Out of memory: one sentence that names the step, the batch and what saves most, in every phase of a run."""

import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import VOCAB, random_chats, tiny_eagle1_pair, tiny_pair
from tiny_blocks import tiny_block_pair
from tiny_mla import tiny_mla_pair
from tiny_tokenizer import word_tokenizer

from hf_eagle import EagleTrainer, EagleTrainingArguments
from hf_eagle.door.printer import told
from hf_eagle.evaluation.prompts import Prompt
from hf_eagle.training import acceptance
from hf_eagle.training.acceptance import AcceptanceLengthCallback
from hf_eagle.training.checkpoints import checkpoints
from hf_eagle.training.memory import LESS_OF_TARGET as LESS
from hf_eagle.training.memory import savings_of
from hf_eagle.training.target_of_run import load_target


CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB."
RECORDS = random_chats(16, seed=1)


def make(tmp_path, pair=tiny_pair, peft=None, **fields):
    target, draft = pair()
    fields = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 9, **fields}
    fields = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"} | fields
    args = EagleTrainingArguments(output_dir=str(tmp_path / "run"), **fields)
    data = Dataset.from_list(RECORDS)
    return EagleTrainer(draft, args, target, train_dataset=data, eval_dataset=data, peft_config=peft)


def running_out(monkeypatch, owner, name, error, at=1):
    """Let a method run out of memory at its call number `at`."""
    method, calls = getattr(owner, name), []

    def run(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            raise error
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, run)


ERRORS = {
    "an accelerator": torch.OutOfMemoryError(CUDA),
    "the host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("where", ["target", "forward", "backward", "optimizer"])
def test_a_step_that_runs_out_is_one_sentence_with_its_batch_and_what_to_lower(where, error, tmp_path, monkeypatch):
    trainer = make(tmp_path)
    owner, name = {
        "target": (trainer.target.model, "forward"),
        "forward": (trainer.model, "forward"),
        "backward": (trainer.accelerator, "backward"),
        "optimizer": (torch.optim.AdamW, "step"),
    }[where]
    running_out(monkeypatch, owner, name, error, at=2)

    with pytest.raises(torch.OutOfMemoryError) as found:
        trainer.train()
    assert found.value.__cause__ is error
    said = str(found.value)
    assert re.match(r"Out of memory in step 2, on a batch of 4 x \d+ tokens \(.+\): save memory with what helps", said)
    assert told(found.value) == said and said.count("Out of memory") == 1  # the verb prints it as it is
    sizes = [float(size) for size in re.findall(r"\(([\d.e-]+) GiB\)", said)]
    assert len(sizes) >= 3 and sizes == sorted(sizes, reverse=True)


PAIRS = {"EAGLE-3": tiny_pair, "whole vocabulary": lambda: tiny_pair(None), "latent": tiny_mla_pair}
PAIRS["EAGLE-1"] = tiny_eagle1_pair
EVERYTHING = {"`max_length`", "`per_device_train_batch_size`", "`activation_checkpointing`", "`draft_vocab_size`"}
EVERYTHING |= {"a `feature_store`"}


def advised(trainer, batch=None) -> dict[str, float]:
    named = {re.search(r"(a )?`\w+`", what)[0]: size for what, size in savings_of(trainer, batch)}
    assert all(size > 0 for size in named.values())
    return named


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_each_kind_is_told_what_it_has(pair, tmp_path):
    trainer = make(tmp_path, pair)
    one_step = {"`draft_vocab_size`", "`activation_checkpointing`"}  # it has the target's vocabulary, and one step
    wanted = EVERYTHING - (one_step if "EAGLE-1" in trainer.model.kind.title else set())
    assert advised(trainer).keys() == wanted


def test_what_is_done_already_is_not_advised(tmp_path):
    trainer = make(tmp_path, per_device_train_batch_size=1, activation_checkpointing=True)
    assert advised(trainer).keys() == {"`max_length`", "`draft_vocab_size`", "a `feature_store`"}
    trainer.feature_cache = object()
    assert advised(trainer).keys() == {"`max_length`", "`draft_vocab_size`"}


@pytest.mark.parametrize("adapter", [False, True])
def test_several_ranks_are_told_to_share(adapter, tmp_path, monkeypatch):
    trainer = make(tmp_path, peft=LoraConfig(r=2) if adapter else None)
    monkeypatch.setattr(type(trainer.args), "world_size", 4)
    found = advised(trainer)
    assert found["`target_sharding`"] > 0 and ("`fsdp2`" in found) == (not adapter)


def test_a_served_target_is_not_advised_to_be_spread_or_stored(tmp_path, monkeypatch):
    """Its layers take no memory here."""
    trainer = make(tmp_path)
    monkeypatch.setattr(type(trainer.args), "world_size", 4)
    monkeypatch.setattr(trainer.target, "runs_here", False)
    assert not advised(trainer).keys() & {"`target_sharding`", "a `feature_store`"}


def test_ranks_that_share_a_draft_share_what_its_vocabulary_saves(tmp_path, monkeypatch):
    """Weight, gradient and moments of its head; what a step makes of the head is whole on each rank."""
    trainer, found = make(tmp_path), {}
    monkeypatch.setattr(type(trainer.args), "world_size", 4)
    for sharded in (False, True):
        trainer.is_fsdp_enabled = sharded
        found[sharded] = advised(trainer)["`draft_vocab_size`"]
    head = trainer.model.lm_head.weight.numel() // 2 * 4 * 4
    assert found[False] - found[True] == pytest.approx(head * 3 / 4)


def test_blocks_are_counted_as_the_run_draws_them(tmp_path):
    """As many of a row as the run asks for; packed, of each of its conversations."""
    batch = {"input_ids": torch.ones(2, 600).long(), "loss_mask": torch.ones(2, 600)}
    few, many = (savings_of(make(tmp_path, tiny_block_pair, num_anchors=n), batch)[0][1] for n in (2, 512))
    packed = savings_of(make(tmp_path, tiny_block_pair, num_anchors=2), {**batch, "documents": batch["input_ids"]})
    assert few < many < packed[0][1]
    label = savings_of(make(tmp_path, tiny_block_pair, num_anchors=512, loss="label"), batch)[0][1]
    assert label < many


def test_the_larger_batch_is_told_first_and_the_larger_target_before_it(tmp_path):
    trainer = make(tmp_path)
    mask = torch.ones(64, 512)
    found = advised(trainer, {"input_ids": mask.long(), "loss_mask": mask})
    assert max(found, key=found.get) == "`per_device_train_batch_size`"
    few = advised(trainer, {"input_ids": mask[:2, :4].long(), "loss_mask": mask[:2, :4]})
    assert few["a `feature_store`"] == found["a `feature_store`"] > few["`per_device_train_batch_size`"]


def test_an_evaluation_has_a_batch_size_of_its_own(tmp_path, monkeypatch):
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2)
    running_out(monkeypatch, trainer, "prediction_step", torch.OutOfMemoryError(CUDA))
    message = (
        "^Out of memory in the evaluation after step 2 .*: lower `per_device_eval_batch_size` .2., then `max_length`"
    )
    with pytest.raises(torch.OutOfMemoryError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("fields", "when", "step"),
    [
        ({}, {"every_steps": 2}, 2),  # in the loop of steps
        ({"eval_strategy": "steps", "eval_steps": 3}, {}, 3),  # in an evaluation
    ],
)
@pytest.mark.parametrize(("size", "lower"), [(None, "`batch_size` than 8"), (1, "`max_new_tokens`")])
def test_a_measurement_of_acceptance_has_a_batch_size_of_its_own(
    fields, when, step, size, lower, tmp_path, monkeypatch
):
    trainer = make(tmp_path, **fields)
    prompts = [Prompt([{"role": "user", "content": "w10 w20"}], None, 0)]
    given = {**when, "batch_size": size, "max_new_tokens": 4}
    trainer.add_callback(AcceptanceLengthCallback(trainer, word_tokenizer(VOCAB, 2), prompts, **given))
    running_out(monkeypatch, acceptance, "decode_prompts", torch.OutOfMemoryError(CUDA))
    told = (
        f"^Out of memory while acceptance was measured after step {step} .CUDA.*: give .* a lower {lower}, or shorter"
    )
    with pytest.raises(torch.OutOfMemoryError, match=told):
        trainer.train()


@pytest.mark.parametrize("name", ["save_pretrained", "state_dict"])
def test_a_save_that_runs_out_is_no_full_disk_and_leaves_no_half_checkpoint(name, tmp_path, monkeypatch):
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    running_out(
        monkeypatch, trainer.model, name, torch.OutOfMemoryError(CUDA), at=2 if name == "save_pretrained" else 4
    )
    message = r"^Out of memory while the checkpoint of step 4 was saved .*checkpoint-2 is complete: free memory"
    with pytest.raises(torch.OutOfMemoryError, match=message) as found:
        trainer.train()
    assert "could not be written" not in str(found.value) and "disk" not in str(found.value)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]

    running_out(monkeypatch, trainer.model, "save_pretrained", MemoryError())
    with pytest.raises(
        torch.OutOfMemoryError, match="^Out of memory while the draft was saved .MemoryError.: .*complete"
    ):
        trainer.save_model()


def test_a_smaller_batch_is_still_looked_for(tmp_path, monkeypatch):
    """`auto_find_batch_size` knows a library's error by its text."""
    trainer = make(tmp_path, auto_find_batch_size=True)
    running_out(monkeypatch, trainer.model, "forward", torch.OutOfMemoryError(CUDA))
    trainer.train()
    assert trainer._train_batch_size < 4 and trainer.state.global_step == 4


def test_a_target_that_does_not_fit_is_said_where_it_is_loaded(tmp_path, monkeypatch):
    from hf_eagle.arguments.groups import TargetArguments
    from hf_eagle.targets.target import FrozenTarget

    running_out(monkeypatch, FrozenTarget, "from_pretrained", torch.OutOfMemoryError(CUDA))
    with pytest.raises(torch.OutOfMemoryError, match=f"^Out of memory while the target was loaded .*: {LESS}"):
        load_target(TargetArguments(target="any"))
    running_out(monkeypatch, FrozenTarget, "to", torch.OutOfMemoryError(CUDA))
    with pytest.raises(torch.OutOfMemoryError, match=f"^Out of memory while the target was moved .*: {LESS}"):
        make(tmp_path)


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    trainer, error = make(tmp_path), RuntimeError("a kernel failed")
    running_out(monkeypatch, trainer.model, "forward", error)
    with pytest.raises(RuntimeError) as found:
        trainer.train()
    assert found.value is error
