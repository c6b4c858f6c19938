"""Numbers that are none: found before anything is written, told with their records, and nothing good is lost."""

import json

import pytest
import torch
from distributed.ends_worker import breaking_trainer
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCAB, pad_batch, random_chats
from tiny_tokenizer import word_tokenizer

from hf_eagle.training.checkpoints import checkpoints, why_incomplete
from hf_eagle.training.health import all_numbers, records_of
from hf_eagle.training.watch import StepWatch


ARGS = {"per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "no", "logging_steps": 100}


def trainer_that_breaks(tmp_path, what, step, **fields):
    return breaking_trainer({"out": str(tmp_path), "args": {**ARGS, **fields}, "break": {"what": what, "step": step}})


def left_records(tmp_path):
    """Step -> the records that were left of it."""
    found = {}
    for path in (tmp_path / "run").glob("broken-step-*-rank-0.jsonl"):
        found[int(path.name.split("-")[2])] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


# what is fetched first behind the broken step: the next one's loss, a log, a save, the end of the run
@pytest.mark.parametrize(
    ("step", "fields"),
    [
        (2, {}),
        (2, {"gradient_accumulation_steps": 2, "num_train_epochs": 3, "max_steps": 4}),
        (2, {"logging_steps": 3}),
        (2, {"save_strategy": "steps", "save_steps": 3}),
        (2, {"max_grad_norm": 0.0}),
        (5, {}),
        (5, {"logging_steps": 6}),
    ],
    ids=["next loss", "accumulated", "log", "save", "not clipped", "end", "last log"],
)
def test_a_broken_gradient_is_found_wherever_a_value_is_fetched_next(step, fields, tmp_path):
    trainer = trainer_that_breaks(tmp_path, "gradient", step, **fields)
    with pytest.raises(FloatingPointError, match=f"gradient of step {step + 1} is nan, .* `learning_rate`"):
        trainer.train()
    assert trainer.state.global_step == step + 1  # and not a step further
    (records,) = left_records(tmp_path).values()
    assert left_records(tmp_path).keys() == {step + 1}
    assert len(records) == 2 * fields.get("gradient_accumulation_steps", 1)
    known = [(record["input_ids"], record["loss_mask"]) for record in random_chats(8, seed=1)]
    assert all((record["input_ids"], record["loss_mask"]) in known for record in records)  # without their padding
    assert not checkpoints(tmp_path / "run") and not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("what", ["gradient", "weights"])
def test_the_last_good_checkpoint_and_draft_stay(what, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    breaking_trainer({"out": str(tmp_path), "args": {**ARGS, **saving, "max_steps": 2}}).train()
    trainer = trainer_that_breaks(tmp_path, what, 3, **saving)
    trainer.save_model()
    draft = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(FloatingPointError, match="checkpoint-3 is complete, and stays"):
        trainer.train(resume_from_checkpoint="last")
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        trainer.save_model()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == draft
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert why_incomplete(tmp_path / "run" / "checkpoint-3") is None


def test_a_checkpoint_of_the_same_step_is_not_written_over(tmp_path):
    """Resumed from an older one, the run comes to a step that was saved before."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    breaking_trainer({"out": str(tmp_path), "args": {**ARGS, **saving}}).train()
    before = {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoint-4").iterdir()}
    with pytest.raises(FloatingPointError):
        trainer_that_breaks(tmp_path, "weights", 3, **saving).train(str(tmp_path / "run" / "checkpoint-2"))
    assert {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoint-4").iterdir()} == before


def test_weights_that_break_in_the_last_step_fail_the_run(tmp_path):
    trainer = trainer_that_breaks(tmp_path, "weights", 5)
    with pytest.raises(FloatingPointError, match=r"after step 6 \(fc.weight\), so they are not saved"):
        trainer.train()
    assert left_records(tmp_path).keys() == {6}


def test_weights_that_break_earlier_show_in_the_next_loss(tmp_path):
    trainer = trainer_that_breaks(tmp_path, "weights", 2)
    with pytest.raises(FloatingPointError, match="The loss is nan at step 3: .* The 2 records that rank 0 had in that"):
        trainer.train()


def test_an_adapter_is_looked_at_as_it_would_be_merged(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from tiny import tiny_pair

    from hf_eagle import EagleTrainer, EagleTrainingArguments

    target, draft = tiny_pair(40)
    args = EagleTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    data = Dataset.from_list(random_chats(4))
    trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=data, peft_config=LoraConfig(r=2))
    trainer.refuse_broken()
    with torch.no_grad():  # B is zero, and no number times zero is no number
        next(x for name, x in trainer.model.named_parameters() if "q_proj.lora_A" in name).fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"\(midlayer.self_attn.q_proj.weight\)"):
        trainer.save_model()


def test_a_gradient_of_half_precision_is_the_scalers_business(tmp_path):
    trainer = trainer_that_breaks(tmp_path, "gradient", 0, max_steps=1)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer._get_grad_norm(trainer.model, torch.tensor(float("inf")))
    assert trainer.watch.norm is None


def test_no_step_waits_for_its_gradient(tmp_path):
    """What is fetched in a step is one tensor, whatever it holds."""
    trainer = trainer_that_breaks(tmp_path, "nothing", 0)
    fetched, tolist, batch, rows = [], torch.Tensor.tolist, pad_batch(random_chats(2)), torch.tensor([3, 2])
    trainer.state.global_step = 1
    trainer.watch = StepWatch(norm=torch.tensor(1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda x: fetched.append(tuple(x.shape)) or tolist(x))
        for name in ("item", "__bool__", "__float__"):
            patch.setattr(torch.Tensor, name, lambda x: pytest.fail("a second fetch"))
        trainer.model.train()
        trainer.look_at(torch.tensor(2.0), batch, rows)
    assert fetched == [(3,)] and trainer.watch.norm is None and trainer.watch.supervised_step == 1


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_numbers_are_numbers(values):
    x = torch.tensor(values, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        assert all_numbers(x.to(dtype)) == bool(torch.isfinite(x.to(dtype)).all())
    assert all_numbers(torch.empty(0))


def test_records_are_told_without_padding_and_with_text():
    chats = random_chats(5, seed=3)
    chats[2]["loss_mask"] = [0] * len(chats[2]["loss_mask"])
    tokenizer = word_tokenizer(VOCAB, 2)
    for side in ("left", "right"):
        found = list(records_of([pad_batch(chats[:3], side), pad_batch(chats[3:], side)], tokenizer))
        wanted = [chat for chat in chats if any(chat["loss_mask"])]
        assert [{k: x[k] for k in ("input_ids", "loss_mask")} for x in found] == wanted
        assert [x["text"] for x in found] == [tokenizer.decode(chat["input_ids"]) for chat in wanted]
