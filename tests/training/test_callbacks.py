"""Acceptance measured during training: the number that decoding gives, on every rank, and what goes by it."""

import json

import pytest
import torch
from datasets import Dataset
from tiny import VOCAB, random_chats, tiny_pair
from tiny_tokenizer import word_tokenizer
from transformers import LlamaForCausalLM
from workers import losses, run_worker

from hf_eagle import EagleTrainer, EagleTrainingArguments, FrozenTarget, load_draft
from hf_eagle.arguments.groups import DataArguments
from hf_eagle.evaluation import acceptance
from hf_eagle.evaluation.acceptance import measure_acceptance
from hf_eagle.evaluation.prompts import Prompt
from hf_eagle.training.acceptance import AcceptanceLengthCallback


ARGS = {
    "max_steps": 6,
    "ttt_steps": 3,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "constant",
}
ACCEPTANCE = {"prompts": 5, "max_new_tokens": 24, "batch_size": 2}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "acceptance_length"}
PROMPTS = [Prompt([{"role": "user", "content": f"w{10 + i} w{20 + i} w{30 + 2 * i}"}], None, i) for i in range(5)]


def run(out, ranks=1, acceptance=None, **args):
    spec = {"acceptance": ACCEPTANCE | acceptance} if acceptance is not None else {}
    size = 8 // ranks
    run_worker(out, ranks=ranks, records=16, args={**ARGS, "per_device_train_batch_size": size} | args, **spec)
    return json.loads((out / "log.json").read_text())


def measured(history, key="acceptance_length"):
    return {entry["step"]: entry[key] for entry in history if key in entry}


def measure_folder(folder):
    """As a user would: the saved draft, by `measure_acceptance`, prompt by prompt."""
    target, _ = tiny_pair(40)
    draft = load_draft(folder, target)
    return measure_acceptance(
        target, draft, word_tokenizer(VOCAB, 2), PROMPTS, max_new_tokens=24, compare_to_target=False, progress=False
    )["acceptance_length"]


def test_is_what_decoding_gives_and_leaves_training_alone(tmp_path):
    history = run(tmp_path / "with", acceptance={"every_steps": 2}, save_strategy="steps", save_steps=2)
    assert sorted(measured(history)) == [2, 4, 6]
    for step, length in measured(history).items():
        assert length == pytest.approx(measure_folder(tmp_path / "with" / "run" / f"checkpoint-{step}"), abs=1e-4)
    run(tmp_path / "without")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_ranks_share_the_prompts_and_agree(tmp_path):
    alone = run(tmp_path / "alone", acceptance={"every_steps": 3}, **EVALUATED)
    ranks = run(tmp_path / "ranks", ranks=2, acceptance={"every_steps": 3}, **EVALUATED)
    for key in ("acceptance_length", "eval_acceptance_length"):
        assert measured(ranks, key) == pytest.approx(measured(alone, key), abs=1e-4)
    known = [json.loads((tmp_path / "ranks" / f"acceptance_{rank}.json").read_text()) for rank in (0, 1)]
    assert known[0] == known[1] > 1


def test_more_ranks_than_prompts(tmp_path):
    history = run(tmp_path, ranks=2, acceptance={"every_steps": 3, "prompts": 1})
    assert sorted(measured(history)) == [3, 6]


def test_the_best_model_is_the_one_that_accepts_most(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    history = run(tmp_path, acceptance={}, max_steps=12, learning_rate=2e-2, **EVALUATED, **saved)
    found = measured(history, "eval_acceptance_length")
    best, step = json.loads((tmp_path / "best.json").read_text())
    assert sorted(found) == [2, 4, 6, 8, 10, 12] and len(set(found.values())) > 1
    assert best == max(found.values()) == found[step]
    # every measurement is in the record of an evaluation, beside the loss
    assert all("eval_loss" in entry for entry in history if "eval_acceptance_length" in entry)
    # the best draft is in the model again
    reloaded = json.loads((tmp_path / "acceptance_0.json").read_text())
    assert reloaded == pytest.approx(best, abs=1e-4)


def test_early_stopping_goes_by_it(tmp_path):
    # nothing is learnt, so nothing gets better: it stops after `patience` evaluations behind the first
    saved = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    history = run(tmp_path, acceptance={"patience": 2}, max_steps=40, learning_rate=0.0, **EVALUATED, **saved)
    assert sorted(measured(history, "eval_acceptance_length")) == [2, 4, 6]


class Deaf(LlamaForCausalLM):
    """It obeys no mask, so it decodes prompts only one at a time."""

    def forward(self, *args, attention_mask=None, **kwargs):
        return super().forward(*args, **kwargs)


class TestErrors:
    def call(self, tmp_path, prompts=PROMPTS, target=None, **arguments):
        usual, draft = tiny_pair(40)
        target = usual if target is None else target
        args = EagleTrainingArguments(output_dir=str(tmp_path), report_to="none")
        data = Dataset.from_list(random_chats(4))
        trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=data)
        return AcceptanceLengthCallback(trainer, word_tokenizer(VOCAB, 2), prompts, **arguments)

    def test_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="`prompts` is empty"):
            self.call(tmp_path, prompts=[], every_steps=1)
        with pytest.raises(ValueError, match="`every_steps` must be at least 1, but is 0"):
            self.call(tmp_path, every_steps=0)
        with pytest.raises(ValueError, match="`every_steps` is unset and `eval_strategy` is 'no'"):
            self.call(tmp_path)
        with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
            self.call(tmp_path, every_steps=1, batch_size=0)

    def test_a_target_that_decodes_only_alone_is_measured_alone_and_said(self, tmp_path, caplog):
        model = tiny_pair(40)[0].model
        deaf = Deaf(model.config)
        deaf.load_state_dict(model.state_dict())
        deaf = FrozenTarget(deaf, tiny_pair(40)[0].tap_ids)

        with caplog.at_level("INFO"):
            callback = self.call(tmp_path, target=deaf, every_steps=1, max_new_tokens=12)
        assert "Every prompt is decoded alone: `target` is a Deaf, which does not obey a 4-D" in caplog.text
        found = callback.measure()
        caplog.clear()
        assert found == self.call(tmp_path, every_steps=1, max_new_tokens=12).measure() and "alone" not in caplog.text

        for asked in ({"batch_size": 8}, {"method": "tree"}):
            with pytest.raises(ValueError, match="`target` is a Deaf, which does not obey a 4-D attention mask"):
                self.call(tmp_path, target=deaf, every_steps=1, **asked)

    def test_nothing_to_draft(self, tmp_path):
        callback = self.call(tmp_path, every_steps=1, max_new_tokens=1)
        with pytest.raises(ValueError, match="The target answered all `prompts` with one token"):
            callback.measure()

    def test_the_target_answers_once(self, tmp_path, monkeypatch):
        """Only the draft changes from one measurement to the next; each is what decoding gives."""
        callback = self.call(tmp_path, every_steps=1, max_new_tokens=12, batch_size=2)
        answered, answer = [], acceptance.continued_answers
        monkeypatch.setattr(acceptance, "continued_answers", lambda *a, **k: answered.append(1) or answer(*a, **k))
        target, draft = callback.trainer.target, callback.trainer.model
        found = []
        for step in range(4):
            callback.trainer.state.global_step = step
            found.append(callback.measure())
            decoding = (target, draft.eval(), callback.tokenizer, PROMPTS)
            asked = {"max_new_tokens": 12, "compare_to_target": False, "progress": False}
            assert found[-1] == measure_acceptance(*decoding, **asked)["acceptance_length"]
            with torch.no_grad():
                for weight in (p for p in draft.parameters() if p.requires_grad):
                    weight += 0.3 * torch.randn_like(weight) * weight.std()
        assert len(answered) == 3 and len(set(found)) > 1

    def test_a_draft_in_training_is_in_training_afterwards(self, tmp_path):
        callback = self.call(tmp_path, every_steps=1, max_new_tokens=4)
        draft = callback.trainer.model.train()
        before = torch.get_rng_state()
        callback.measure()
        assert draft.training and torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("training", [True, False])
    def test_also_after_a_measurement_that_failed(self, training, tmp_path, monkeypatch):
        callback = self.call(tmp_path, every_steps=1, max_new_tokens=4)
        draft = callback.trainer.model.train(training)
        monkeypatch.setattr(acceptance, "transcribe", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            callback.measure()
        assert draft.training == training

    def test_steps_without_prompts(self):
        with pytest.raises(ValueError, match="`acceptance_steps` is 3, but `acceptance_prompts` names no file"):
            DataArguments(train_data=["chats.jsonl"], acceptance_steps=3)
        with pytest.raises(ValueError, match="`acceptance_num_prompts` must be at least 1, got 0"):
            DataArguments(train_data=["chats.jsonl"], acceptance_num_prompts=0)
