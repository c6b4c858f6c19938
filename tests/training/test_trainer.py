"""`EagleTrainer` in one process: evaluation, logs, checkpoints, and what it refuses."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from reference import reference_loss
from tiny import random_chats, tiny_llama, tiny_pair
from transformers import TrainerCallback

from hf_eagle import EagleTrainer, EagleTrainingArguments, FrozenTarget, load_draft
from hf_eagle.losses.objectives import estimated_acceptance_length


RECORDS = random_chats(16, seed=1)


def make_trainer(tmp_path, pair=None, records=RECORDS, **fields):
    target, draft = pair or tiny_pair(40)
    defaults = {"ttt_steps": 3, "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 2}
    defaults |= {"report_to": "none", "disable_tqdm": True}
    args = EagleTrainingArguments(output_dir=str(tmp_path / "run"), **{**defaults, **fields})
    data = Dataset.from_list(records)
    return EagleTrainer(model=draft, args=args, target=target, train_dataset=data, eval_dataset=data)


def test_evaluation_is_the_reference_before_and_after_training(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=1e-2)
    weights = torch.tensor([0.8**s for s in range(3)])

    def wanted():
        sums, correct, rows = reference_loss(trainer.model, trainer.target.model, RECORDS, 3)
        loss = float((weights * sums.detach() / torch.tensor(rows)).sum() / weights.sum())
        return loss, [c / r for c, r in zip(correct, rows, strict=True)]

    for _ in range(2):
        loss, accuracies = wanted()
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert [metrics[f"eval_accuracy_step_{s}"] for s in range(3)] == pytest.approx(accuracies, abs=1e-4)
        estimate = estimated_acceptance_length(accuracies)
        assert metrics["eval_estimated_acceptance_length"] == pytest.approx(estimate, abs=1e-3)
        if trainer.state.global_step == 0:
            trainer.train()
            trained = loss
    assert loss < trained


def test_training_logs_say_what_matters(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    first = trainer.state.log_history[0]
    for name in ("loss", "accuracy_step_0", "accuracy_step_2", "estimated_acceptance_length"):
        assert name in first
    assert first["supervised_rows_per_second"] > 0
    assert 1 <= first["estimated_acceptance_length"] <= 4


def test_the_estimate_counts_chains():
    assert estimated_acceptance_length([0.5, 0.5, 0.0, 1.0]) == pytest.approx(1 + 0.5 + 0.25)


def test_what_is_saved_is_a_draft_and_nothing_of_the_target(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: p.clone() for name, p in trainer.target.model.state_dict().items()}
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
        again = load_draft(folder, trainer.target)
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    for name, tensor in trainer.target.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in trainer.target.model.parameters()}
    assert id(trainer.model.embed_tokens.weight) not in trained


def test_bf16_training_follows_float32(tmp_path):
    curves = {}
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path / str(bf16), bf16=bf16, max_steps=8, logging_steps=1, learning_rate=3e-3)
        trainer.train()
        curves[bf16] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert trainer.model.lm_head.weight.dtype == torch.float32
    assert curves[True] == pytest.approx(curves[False], rel=0.03)
    assert curves[True] != curves[False]


def test_two_tap_methods_train_the_same(tmp_path):
    curves = []
    for method in ("hooks", "output_hidden_states"):
        _, draft = tiny_pair(40)
        target = FrozenTarget(tiny_llama(), tap_method=method)
        trainer = make_trainer(tmp_path / method, (target, draft), logging_steps=1)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[0] == curves[1]


# ---- what is refused ----


def test_a_folder_with_another_run_is_refused_unless_told(tmp_path):
    make_trainer(tmp_path).train()
    kept = (tmp_path / "run" / "checkpoint-4" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds another run \(checkpoint-4\): continue it with"):
        make_trainer(tmp_path).train()
    assert (tmp_path / "run" / "checkpoint-4" / "model.safetensors").read_bytes() == kept
    make_trainer(tmp_path, overwrite=True, max_steps=2).train()
    assert not (tmp_path / "run" / "checkpoint-4").exists()
    assert (tmp_path / "run" / "checkpoint-2").exists()


def test_another_target_is_refused(tmp_path):
    _, draft = tiny_pair()
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {**tiny_llama().config.to_dict(), "hidden_size": 64, "head_dim": 16}
    other = FrozenTarget(LlamaForCausalLM(LlamaConfig(**fields)))
    with pytest.raises(ValueError, match="vocabulary 96 and hidden size 32, this target has 96 and 64"):
        make_trainer(tmp_path, (other, draft))


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path):
    make_trainer(tmp_path).train()
    with pytest.raises(
        ValueError, match=r"does not fit this draft: .*lm_head.weight is \[40, 32\] instead of \[24, 32\]"
    ):
        make_trainer(tmp_path, tiny_pair(24)).train(resume_from_checkpoint="last")


def test_resuming_takes_the_checkpoints_mapping(tmp_path):
    from tiny import tiny_mapping

    make_trainer(tmp_path).train()
    target, draft = tiny_pair(40)
    draft.set_vocabulary(tiny_mapping(40, seed=9))
    trainer = make_trainer(tmp_path, (target, draft), max_steps=6)
    trainer.train(resume_from_checkpoint="last")
    assert torch.equal(trainer.model.d2t, tiny_mapping(40, seed=0).d2t)


def test_compiling_the_draft_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`torch_compile` cannot work: .* use `compile_target` for the target"):
        EagleTrainingArguments(output_dir=str(tmp_path), torch_compile=True)


def test_nan_stops_the_run(tmp_path):
    target, draft = tiny_pair()
    with torch.no_grad():
        draft.fc.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="The loss is nan at step 0"):
        make_trainer(tmp_path, (target, draft)).train()


def test_data_without_a_supervised_row_stop_the_run(tmp_path):
    """Answers of one token: not an empty mask, but a server drafts nothing in them."""
    records = [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 0]}] * 8
    with pytest.raises(ValueError, match="`train_dataset` gave no supervised row in the steps up to 2"):
        make_trainer(tmp_path, records=records).train()


def test_no_taps_in_the_config_is_refused(tmp_path):
    target, draft = tiny_pair()
    draft.config.eagle_aux_hidden_state_layer_ids = None
    with pytest.raises(ValueError, match="names no taps"):
        make_trainer(tmp_path, (target, draft))


SAVING = """
import sys; sys.path[:0] = {paths!r}
import resource, signal
from pathlib import Path
from test_trainer import make_trainer
from transformers import TrainerCallback

class Full(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:  # from here on no file may grow beyond 20 kB, as on a full disk
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

trainer = make_trainer(Path({out!r}), save_steps=2)
trainer.add_callback(Full())
trainer.train()
"""


def test_a_disk_that_fills_up_loses_nothing(tmp_path):
    """A real write error in the second checkpoint: one sentence, the first checkpoint whole, no torn folder left."""
    assert resource.RLIMIT_FSIZE  # a limit on file size fails writes as a full disk does
    paths = [str(folder) for folder in Path(__file__).resolve().parents[:3]]
    code = SAVING.format(paths=paths, out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "checkpoint-4 could not be written" in last and "checkpoint-2 is complete" in last, done.stderr[-3000:]
    assert not (tmp_path / "run" / "checkpoint-4").exists()
    trainer = make_trainer(tmp_path, save_steps=2)
    trainer.train(resume_from_checkpoint="last")
    assert json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


def test_a_batch_that_was_cut_is_planned_anew(tmp_path):
    """Its plan travelled with the whole of it."""
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator([RECORDS[0], RECORDS[1]])
    cut = {name: x[:, :12] if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    bare = {name: x for name, x in cut.items() if name != "plan"}
    assert torch.equal(trainer.compute_loss(trainer.model, cut), trainer.compute_loss(trainer.model, bare))


def test_every_pass_over_a_stream_is_drawn_anew(tmp_path):
    seen = []

    class Passes(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(trainer._plans.draw.epoch)

    stream = Dataset.from_list(RECORDS[:4]).to_iterable_dataset()
    args = EagleTrainingArguments(
        output_dir=str(tmp_path / "stream"), report_to="none", disable_tqdm=True, save_strategy="no",
        ttt_steps=2, per_device_train_batch_size=2, max_steps=6,
    )  # fmt: skip
    target, draft = tiny_pair(40)
    trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=stream, callbacks=[Passes()])
    trainer.train()
    assert seen == [0, 0, 1, 1, 2, 2]


def test_the_token_of_the_hub_is_in_no_file_and_is_kept_for_pushing(tmp_path):
    trainer = make_trainer(tmp_path, hub_token="hf_kept_here", save_steps=2)
    trainer.train()
    trainer.save_model()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path.name for path in files].count("training_args.bin") == 3
    assert not [path for path in files if b"hf_kept_here" in path.read_bytes()]
    assert trainer.args.hub_token == "hf_kept_here"
