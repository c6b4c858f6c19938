"""Data given to `EagleTrainer` in Python: what columns mean, and which sentence tells of those that mean nothing."""

import pytest
import torch
from datasets import Dataset
from tiny import VOCAB, pad_batch, random_chats, tiny_eagle1_pair, tiny_pair
from tiny_blocks import tiny_block_pair

from hf_eagle import EagleTrainer, EagleTrainingArguments
from hf_eagle.data.collators import EagleDataCollator


CHATS = random_chats(8)


def trainer_of(folder, rows, pair=tiny_pair, collator=None, **more):
    target, draft = pair()
    kind = {tiny_eagle1_pair: {"feature_noise": "none"}, tiny_block_pair: {"num_anchors": 3}}.get(
        pair, {"ttt_steps": 2}
    )
    given = {"max_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    args = EagleTrainingArguments(str(folder), **{**given, **kind, "per_device_train_batch_size": 4, **more})
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return EagleTrainer(model=draft, args=args, target=target, train_dataset=data, data_collator=collator)


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def padded(side):
    """As `random_chats`, padded to one length; what stands there would be supervised, were it a token."""
    length = max(len(chat["input_ids"]) for chat in CHATS) + 3

    def pad(chat):
        size = len(chat["input_ids"])
        columns = {**chat, "attention_mask": [1] * size}
        fill = {"input_ids": [10**6], "loss_mask": [1], "attention_mask": [0]}
        sides = ((length - size) * fill[name] for name in columns)
        return {
            name: padding + columns[name] if side == "left" else columns[name] + padding
            for name, padding in zip(columns, sides, strict=True)
        }

    return [pad(chat) for chat in CHATS]


def ignored(value):
    return [{**chat, "loss_mask": [m or value for m in chat["loss_mask"]]} for chat in CHATS]


def labelled():
    rows = []
    for chat in CHATS:
        labels = [token if m else -100 for token, m in zip(chat["input_ids"], chat["loss_mask"], strict=True)]
        rows.append({"input_ids": chat["input_ids"], "labels": labels})
    return rows


FORMS = {
    "-100 where nothing is supervised": lambda: ignored(-100),
    "labels": labelled,
    "padded on the left": lambda: padded("left"),
    "padded on the right": lambda: padded("right"),
}


@pytest.mark.parametrize("pair", [tiny_pair, tiny_eagle1_pair, tiny_block_pair])
@pytest.mark.parametrize("form", FORMS)
def test_every_documented_form_gives_the_same_losses(form, pair, tmp_path):
    wanted = losses_of(trainer_of(tmp_path, CHATS, pair))
    assert losses_of(trainer_of(tmp_path, FORMS[form](), pair)) == wanted and len(wanted) == 2


def test_a_pad_id_beyond_the_vocabulary_changes_nothing(tmp_path):
    losses = [losses_of(trainer_of(tmp_path, CHATS, collator=EagleDataCollator(pad))) for pad in (0, VOCAB, 10**6)]
    assert losses[0] == losses[1] == losses[2]


def test_a_batch_that_another_loader_made_is_read_alike(tmp_path):
    """Where no collator planned it, the step does."""
    trainer = trainer_of(tmp_path, CHATS)
    batch = pad_batch(CHATS[:4])
    draft = trainer.model.eval()
    wanted = trainer.compute_loss(draft, dict(batch))
    ignoring = {**batch, "loss_mask": batch["loss_mask"].masked_fill(batch["loss_mask"] == 0, -100)}
    assert torch.equal(trainer.compute_loss(draft, ignoring), wanted)
    beyond = {**batch, "input_ids": batch["input_ids"].clone()}
    beyond["input_ids"][1, 0] = 10**6
    with pytest.raises(ValueError, match="`input_ids` of row 1 of the batch, .* holds the id 1000000 at position 0"):
        trainer.compute_loss(draft, beyond)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [5, 6]}], "`train_dataset` has no column `loss_mask`, only `input_ids`: give it"),
        ([{"text": "a"}], "`train_dataset` has no column `input_ids`, only `text`"),
    ],
)
def test_a_missing_column_is_named_at_the_door(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rows)


def test_an_evaluation_without_a_mask_is_refused_at_the_door(tmp_path):
    target, draft = tiny_pair()
    args = EagleTrainingArguments(str(tmp_path), report_to="none")
    data = {"train_dataset": Dataset.from_list(CHATS), "eval_dataset": Dataset.from_list([{"input_ids": [5]}])}
    with pytest.raises(ValueError, match="`eval_dataset` has no column `loss_mask`"):
        EagleTrainer(model=draft, args=args, target=target, **data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {**row, "input_ids": [10**6, *row["input_ids"][1:]]}, "row 0 .* the id 1000000 at position 0"),
        (lambda row: {**row, "input_ids": [*row["input_ids"][:-1], -1]}, "row 0 of the batch, .* holds the id -1"),
        (lambda row: {**row, "loss_mask": 1}, "`loss_mask` of row 0 of the batch must be a list .* got int 1"),
        (lambda row: {**row, "loss_mask": row["loss_mask"][1:]}, "`loss_mask` of row 0 of the batch has"),
        (lambda row: {"input_ids": row["input_ids"], "labels": row["loss_mask"]}, "`labels` of row 0.*the token.s id"),
        (
            lambda row: {**row, "labels": row["input_ids"]},
            "`labels` and `loss_mask` of row 0 of the batch, .* disagree",
        ),
    ],
)
def test_what_a_row_cannot_hold_is_named_before_a_step(change, message, tmp_path):
    trainer = trainer_of(tmp_path, [change(row) for row in CHATS])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- rows without a token ----


EMPTY = {"input_ids": [], "loss_mask": [], "attention_mask": []}
PADDING = {"input_ids": [5, 6], "loss_mask": [1, 1], "attention_mask": [0, 0]}


@pytest.mark.parametrize("pair", [tiny_pair, tiny_eagle1_pair, tiny_block_pair])
@pytest.mark.parametrize("empty", [EMPTY, PADDING], ids=["no ids", "nothing but padding"])
def test_batches_of_empty_rows_add_nothing(empty, pair, tmp_path):
    """Streams, where rows cannot be left out before: each chat accumulated with an empty row, and on its own."""
    chats = padded("right")[:3]
    mixed = Dataset.from_list([row for chat in chats for row in (chat, empty)]).to_iterable_dataset()
    given = {"per_device_train_batch_size": 1, "max_steps": 3}
    found = losses_of(trainer_of(tmp_path, mixed, pair, gradient_accumulation_steps=2, **given))
    wanted = losses_of(trainer_of(tmp_path, Dataset.from_list(chats).to_iterable_dataset(), pair, **given))
    assert len(found) == 3 and found == pytest.approx(wanted, rel=1e-6)


def test_a_window_of_empty_rows_is_a_step_without_a_supervised_row(tmp_path):
    stream = Dataset.from_list([CHATS[0], {"input_ids": [], "loss_mask": []}, CHATS[1]]).to_iterable_dataset()
    trainer = trainer_of(tmp_path, stream, per_device_train_batch_size=1, max_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "supervised_rows_per_second" in entry]
    assert [entry["supervised_rows_per_second"] > 0 for entry in logs] == [True, False, True]
    assert logs[1]["windows_without_rows"] == 1


@pytest.mark.parametrize("empty", [EMPTY, PADDING], ids=["no ids", "nothing but padding"])
def test_an_empty_row_is_no_row_of_map_data(empty, tmp_path):
    """It is left out, so one row a batch trains as if it had never been there; a run on nothing else says so."""
    chats = padded("right")
    given = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    found = losses_of(trainer_of(tmp_path, [empty, *chats[:4], empty, *chats[4:]], **given))
    assert found == losses_of(trainer_of(tmp_path, chats, **given))
    with pytest.raises(ValueError, match="`train_dataset` gave no supervised row"):
        trainer_of(tmp_path, [empty]).train()


@pytest.mark.parametrize("empty", [EMPTY, PADDING], ids=["no ids", "nothing but padding"])
def test_an_evaluation_of_one_empty_row_counts_nothing(empty, tmp_path):
    trainer = trainer_of(tmp_path, CHATS)
    assert trainer.evaluate(Dataset.from_list([empty]))["eval_supervised_rows_per_second"] == 0
    beside = trainer.evaluate(Dataset.from_list([empty, *padded("right")]))
    assert beside["eval_loss"] == pytest.approx(trainer.evaluate(Dataset.from_list(CHATS))["eval_loss"], rel=1e-6)


# ---- data sets ----


def test_what_is_no_data_set_is_refused_at_the_door(tmp_path):
    columns = {name: [chat[name] for chat in CHATS] for name in CHATS[0]}
    for data, message in ((iter(CHATS), "is list_iterator"), (columns, "is a dict of `input_ids`, `loss_mask`")):
        for collator in (None, EagleDataCollator(0)):
            with pytest.raises(ValueError, match=f"`train_dataset` {message}.*, not a data set: "):
                trainer_of(tmp_path, data, collator=collator)
        for evaluate, name in ((EagleTrainer.evaluate, "eval"), (EagleTrainer.predict, "test")):
            with pytest.raises(ValueError, match=f"`{name}_dataset` .*, not a data set: "):
                evaluate(trainer_of(tmp_path, CHATS), iter(CHATS))


def test_without_data_to_train_on_a_trainer_only_evaluates(tmp_path):
    trainer = trainer_of(tmp_path, None)
    assert trainer.evaluate(Dataset.from_list(CHATS))["eval_loss"] > 0
    with pytest.raises(ValueError, match="`train_dataset` is None, so there is nothing to train on: give"):
        trainer.train()


def test_rows_longer_than_the_target_reads_are_refused_at_the_door(tmp_path):
    longest = tiny_pair()[0].config.max_position_embeddings
    rows = [*CHATS, {"input_ids": [5] * (longest + 1), "loss_mask": [1] * (longest + 1)}]
    message = (
        f"Row 8 of `(train|eval)_dataset` holds a conversation of {longest + 1} tokens, .* reads {longest} at most"
    )
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rows)
    trainer = trainer_of(tmp_path, [{name: values[:longest] for name, values in row.items()} for row in rows])
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(Dataset.from_list(rows))
