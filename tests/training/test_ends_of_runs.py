"""How runs end: finished ones are left alone, and what trained on nothing leaves nothing."""

import json
import logging
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_chats, tiny_pair

from hf_eagle import EagleTrainer, EagleTrainingArguments
from hf_eagle.training.checkpoints import checkpoints
from hf_eagle.training.resuming import refuse_other_run, was_written_to_the_end
from hf_eagle.training.totals import logged_loss


def make_trainer(tmp_path, records=8, bare=(), stream=False, held_out=None, **fields):
    """A trainer of chats of which some have no answer; of a stream where told."""
    target, draft = tiny_pair(40)
    given = {"per_device_train_batch_size": 2, "ttt_steps": 2, "logging_steps": 1, "report_to": "none"}
    given |= {"train_sampling_strategy": "sequential", "disable_tqdm": True, "learning_rate": 1e-3}
    args = EagleTrainingArguments(output_dir=str(tmp_path / "run"), **{**given, **fields})
    chats = random_chats(records, seed=1)
    for i in bare:
        chats[i]["loss_mask"] = [0] * len(chats[i]["loss_mask"])
    data = IterableDataset.from_generator(lambda: iter(chats)) if stream else Dataset.from_list(chats)
    if not records and not stream:
        data = Dataset.from_dict({"input_ids": [], "loss_mask": []})
    return EagleTrainer(model=draft, args=args, target=target, train_dataset=data, eval_dataset=held_out)


def files_of(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def logged(trainer, name):
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


# ---- finished ----


@pytest.mark.parametrize(
    ("stream", "fields"),
    [
        (False, {"num_train_epochs": 1}),
        (False, {"num_train_epochs": 1.5}),
        (False, {"num_train_epochs": 1, "gradient_accumulation_steps": 3, "dataloader_drop_last": True}),
        (False, {"max_steps": 4, "save_strategy": "epoch"}),
        (False, {"max_steps": 6, "save_steps": 3}),  # in the middle of an epoch
        (True, {"max_steps": 4}),
        (True, {"max_steps": 6, "save_steps": 3}),
    ],
)
def test_a_finished_run_does_nothing_and_says_so(stream, fields, tmp_path, caplog):
    first = make_trainer(tmp_path, stream=stream, **fields)
    first.train()
    first.save_model()
    before = files_of(tmp_path / "run")
    again = make_trainer(tmp_path, stream=stream, **fields)
    with caplog.at_level(logging.WARNING):
        result = again.train(resume_from_checkpoint="last")
    assert again.nothing_to_do and not first.nothing_to_do
    assert f"already has all {first.state.global_step} steps of this run: there is nothing to train" in caplog.text
    assert files_of(tmp_path / "run") == before
    # its state and its weights are there, so that whoever saves or measures it now has the trained draft
    assert again.state.global_step == result.global_step == first.state.global_step
    assert all(torch.equal(x, first.model.state_dict()[name]) for name, x in again.model.state_dict().items())
    assert result.training_loss == pytest.approx(logged_loss(first.state.log_history))


def test_a_finished_run_with_more_to_do_goes_on(tmp_path):
    make_trainer(tmp_path, num_train_epochs=1).train()
    again = make_trainer(tmp_path, num_train_epochs=2)
    again.train(resume_from_checkpoint="last")
    assert not again.nothing_to_do and again.state.global_step == 8


def test_with_the_best_model_at_the_end_a_finished_run_has_it_again(tmp_path):
    fields = {"max_steps": 4, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.5}
    trainers = []
    for _ in range(2):
        held_out = Dataset.from_list(random_chats(4, seed=9))
        best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
        trainer = make_trainer(tmp_path, **fields, **best, held_out=held_out)
        trainer.train(resume_from_checkpoint="last")
        trainers.append(trainer)
    first, again = trainers
    assert again.nothing_to_do and 0 < first.state.best_global_step < 4
    assert torch.equal(first.model.lm_head.weight, again.model.lm_head.weight)


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0, 9) | st.none()), max_size=8))
def test_the_logged_loss_is_the_mean_over_steps(windows):
    history, losses, step = [{"step": 0, "eval_loss": 7.0}], [], 0
    for length, loss in windows:
        step += length
        history.append({"step": step, "learning_rate": 0.1, **({} if loss is None else {"loss": loss})})
        losses += [] if loss is None else [loss] * length
    found = logged_loss(history)
    assert found == pytest.approx(math.fsum(losses) / len(losses)) if losses else found is None


def test_what_is_written_to_the_end(tmp_path):
    assert not was_written_to_the_end(tmp_path, 4)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": []}))
    assert not was_written_to_the_end(tmp_path, 4)  # no draft
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert was_written_to_the_end(tmp_path, 4) and not was_written_to_the_end(tmp_path, 6)
    (tmp_path / "trainer_state.json").write_text("[]")
    with pytest.raises(ValueError, match="trainer_state.json must hold an object"):
        was_written_to_the_end(tmp_path, 4)


# ---- `last`, and nothing to go on from ----


@pytest.mark.parametrize("last", [True, "last", "true"])
def test_last_beside_a_finished_draft_is_refused_as_a_new_run(last, tmp_path):
    first = make_trainer(tmp_path, max_steps=2, save_strategy="no")
    first.train()
    first.save_model()
    before = files_of(tmp_path / "run")
    for ask in (None, last):
        with pytest.raises(FileExistsError, match="`output_dir` .* holds .*model.safetensors.*`--overwrite`"):
            make_trainer(tmp_path, max_steps=2, save_strategy="no").train(resume_from_checkpoint=ask)
    assert files_of(tmp_path / "run") == before
    make_trainer(tmp_path, max_steps=2, save_steps=1, overwrite=True).train(resume_from_checkpoint=last)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_last_in_an_empty_folder_begins(tmp_path):
    (tmp_path / "run").mkdir()
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 2 and not trainer.resumed


def test_what_a_killed_run_left_of_its_first_checkpoint_is_in_nobodys_way(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
    refuse_other_run(tmp_path, last=True)
    with pytest.raises(FileExistsError, match="another run"):
        refuse_other_run(tmp_path)


@pytest.mark.parametrize("text", ["", '{"architectures": ["Llama'])
def test_a_config_that_was_cut_is_overwritten_only_when_told_to(text, tmp_path):
    """What a run without checkpoints leaves that was ended while it saved its draft."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    fields = {"max_steps": 1, "save_strategy": "no"}
    with pytest.raises(FileExistsError, match="`output_dir` .* holds a config.json that is not JSON.*`--overwrite`"):
        make_trainer(tmp_path, **fields).train()
    for how, resume in (({"overwrite": True}, None), ({}, "last")):  # a run that is started again and again says `last`
        trainer = make_trainer(tmp_path, **fields, **how)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        assert json.loads((tmp_path / "run" / "config.json").read_text())["architectures"] == ["LlamaForCausalLMEagle3"]
        (tmp_path / "run" / "model.safetensors").unlink()
        (tmp_path / "run" / "config.json").write_text(text)


def test_a_checkpoint_without_states_goes_on_where_it_is_told_to(tmp_path, caplog):
    fields = {"max_steps": 8, "save_steps": 4, "save_only_model": True}
    make_trainer(tmp_path, **fields | {"max_steps": 4}).train()
    with pytest.raises(ValueError, match="no optimizer.pt and no scheduler.pt, .*`--ignore_missing_state`"):
        make_trainer(tmp_path, **fields).train(resume_from_checkpoint="last")
    trainer = make_trainer(tmp_path, **fields, ignore_missing_state=True)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint="last")
    assert "the optimizer's state, the learning rate schedule and the random numbers begin anew" in caplog.text
    assert logged(trainer, "learning_rate")[5] == pytest.approx(1e-3) and trainer.state.global_step == 8


def test_what_last_passes_over_is_said(tmp_path, caplog):
    make_trainer(tmp_path, max_steps=4, save_steps=2).train()
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").unlink()
    trainer = make_trainer(tmp_path, max_steps=4, save_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint="last")
    assert "checkpoint-4 is skipped: optimizer.pt is missing" in caplog.text and "begin anew" not in caplog.text


# ---- nothing to train on ----


def assert_nothing_saved(tmp_path):
    assert not checkpoints(tmp_path / "run") and not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("fields", [{"max_steps": 2}, {"num_train_epochs": 1}])
@pytest.mark.parametrize("more", [{"dataloader_drop_last": True}, {"records": 0}])
def test_no_step_is_refused_before_another_run_is_deleted(fields, more, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"another run's")
    trainer = make_trainer(tmp_path, per_device_train_batch_size=16, overwrite=True, **{"records": 8, **fields, **more})
    with pytest.raises(ValueError, match="`train_dataset`"):
        trainer.train()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == b"another run's"


def test_a_stream_of_nothing_took_no_step(tmp_path):
    with pytest.raises(ValueError, match="gave no batch, so no step was taken after step 0 and nothing is saved"):
        make_trainer(tmp_path, records=0, stream=True, max_steps=3).train()
    assert_nothing_saved(tmp_path)


@pytest.mark.parametrize("strategy", ["steps", "epoch", "no"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_run_that_never_saw_a_supervised_row_saves_nothing(stream, strategy, tmp_path):
    fields = {"save_strategy": strategy, "save_steps": 1, "max_steps": 2}  # less than a pass
    with pytest.raises(ValueError, match="`train_dataset` gave no supervised row in the steps up to 2"):
        make_trainer(tmp_path, bare=range(8), stream=stream, **fields).train()
    assert_nothing_saved(tmp_path)


def test_a_whole_epoch_without_a_row_stops(tmp_path):
    with pytest.raises(ValueError, match="gave no supervised row in the steps up to 4"):
        make_trainer(tmp_path, bare=range(8), max_steps=40, logging_strategy="no").train()


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_stream_stops_after_a_stated_number_of_steps(logging_steps, tmp_path):
    fields = {"max_steps": 8, "stream": True, "records": 16, "logging_steps": logging_steps, "save_strategy": "no"}
    stated = {"max_unsupervised_steps": 3, "bare": range(4, 16)}  # from the third step on
    with pytest.raises(ValueError, match=r"steps up to 5, in 3 steps one after the other \(`max_unsupervised_steps`\)"):
        make_trainer(tmp_path, **fields, **stated).train()
    trainer = make_trainer(tmp_path, **fields, max_unsupervised_steps=3, bare=range(4, 8))
    trainer.train()
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("value", [0, -1])
def test_a_number_of_steps_below_one_is_refused(value):
    with pytest.raises(ValueError, match=f"`max_unsupervised_steps` must be at least 1, got {value}"):
        EagleTrainingArguments(output_dir="nowhere", max_unsupervised_steps=value)


def test_a_window_without_a_row_is_counted_and_reported(tmp_path, caplog):
    """Steps of two records: the second, third and sixth have no answer."""
    fields = {"records": 14, "bare": [2, 3, 4, 5, 10, 11], "max_steps": 7}
    trainer = make_trainer(tmp_path, **fields, save_steps=4)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert logged(trainer, "windows_without_rows") == {2: 1, 3: 2, 6: 3}
    assert sorted(logged(trainer, "loss")) == [1, 4, 5, 7] == sorted(logged(trainer, "accuracy_step_0"))
    assert "No supervised row in the window up to step 6 (windows without one so far: 3)" in caplog.text
    # the count goes on where a run is resumed
    (tmp_path / "again" / "run").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "again" / "run" / "checkpoint-4")
    again = make_trainer(tmp_path / "again", **fields, save_steps=4)
    again.train(resume_from_checkpoint="last")
    assert logged(again, "windows_without_rows") == {2: 1, 3: 2, 6: 3}


def test_the_rest_of_an_epoch_without_a_row_is_no_whole_one(tmp_path):
    """Resumed in the middle of an epoch whose second half has no answers."""
    fields = {"bare": [4, 5, 6, 7], "save_steps": 2, "num_train_epochs": 2}
    make_trainer(tmp_path, **fields).train()
    for name in ("checkpoint-4", "checkpoint-6", "checkpoint-8"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    trainer = make_trainer(tmp_path, **fields)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 8 and logged(trainer, "windows_without_rows") == {3: 1, 4: 2, 7: 3, 8: 4}
