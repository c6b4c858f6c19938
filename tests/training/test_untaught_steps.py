"""Steps whose rows all lie outside the draft's vocabulary: counted, told, and told apart from steps without a row."""

import pytest
import torch
from test_trainer import make_trainer
from tiny import VOCAB, pad_batch, random_chats, tiny_pair

from hf_eagle import EagleConfig
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.vocabulary import VocabularyMapping
from hf_eagle.losses.supervision import SupervisionPlan, supervised_steps


RECORDS = random_chats(8, seed=3)


def answers(target, record) -> set[int]:
    """The target's own tokens at the rows that a record supervises."""
    batch = pad_batch([record])
    documents = torch.zeros_like(batch["input_ids"])
    plan = SupervisionPlan.of(supervised_steps(batch["loss_mask"], documents, 2))
    with torch.no_grad():
        logits = target.model(batch["input_ids"]).logits[0]
    return set(logits.argmax(-1)[plan.positions].tolist())


def pair_without(tokens):
    """A target, and a draft that can propose everything but these tokens."""
    target, _ = tiny_pair(None)
    kept = torch.tensor([i for i in range(VOCAB) if i not in tokens])
    config = EagleConfig.from_target(target.config, len(kept))
    target.tap_ids = config.tap_ids
    return target, new_draft(config, target.embedding_weight(), VocabularyMapping.from_token_ids(kept, VOCAB))


def untaught(history):
    return [entry.get("steps_outside_vocabulary") for entry in history if "loss" in entry]


ONE_EACH = {
    **{"ttt_steps": 2, "per_device_train_batch_size": 1, "max_steps": 8, "max_grad_norm": 0.5},
    **{"train_sampling_strategy": "sequential", "learning_rate": 1e-6},
}


@pytest.mark.parametrize("logging_steps", [1, 3])
@pytest.mark.parametrize("records", [[0, 3], [0, 1, 2, 3, 4, 5, 6, 7], []])
def test_they_are_counted(records, logging_steps, tmp_path, caplog):
    """Of the records that are named no target token can be proposed; whichever others share all their tokens count."""
    target, _ = tiny_pair(None)
    said = [answers(target, record) for record in RECORDS]
    without = set().union(*(said[i] for i in records))
    pair = pair_without(without)
    outside = [bool(tokens) and tokens <= without for tokens in said]
    make_trainer(tmp_path, pair, RECORDS, logging_steps=logging_steps, **ONE_EACH).train()
    told = [message for message in caplog.messages if "no row taught anything" in message]
    assert bool(told) == any(outside)
    assert sum(int(message.split()[1]) for message in told) == sum(outside)
    assert not told or f"(so far: {sum(outside)})" in told[-1]


def test_the_log_holds_them_and_a_resumed_run_counts_on(tmp_path):
    target, _ = tiny_pair(None)
    tokens = set().union(*(answers(target, record) for record in RECORDS))
    options = {"logging_steps": 2, "save_steps": 4, **ONE_EACH}
    trainer = make_trainer(tmp_path, pair_without(tokens), RECORDS, **{**options, "max_steps": 4})
    trainer.train()
    assert untaught(trainer.state.log_history) == [2, 4]
    again = make_trainer(tmp_path, pair_without(tokens), RECORDS, **{**options, "max_steps": 6})
    again.train(resume_from_checkpoint="last")
    assert untaught(again.state.log_history) == [2, 4, 5]  # the sixth record has no row at all


def test_with_every_row_kept_there_are_none(tmp_path, caplog):
    target, _ = tiny_pair(None)
    tokens = set().union(*(answers(target, record) for record in RECORDS))
    trainer = make_trainer(tmp_path, pair_without(tokens), RECORDS, oov_rows="renormalize", **ONE_EACH)
    trainer.train()
    assert "no row taught anything" not in caplog.text
    assert not any(untaught(trainer.state.log_history))
