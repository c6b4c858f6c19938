"""Columns of rows and batches: every form that is documented says the same, and any other is a sentence."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import VOCAB, random_chats

from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.columns import check_data, read_batch, read_row
from hf_eagle.data.packing import pack_dataset
from hf_eagle.store.layout import conversations_of


# ---- forms that say the same ----


@st.composite
def written_rows(draw):
    """A row as it is documented, and the same row written in another way."""
    length = draw(st.integers(1, 12))
    ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length))
    mask = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    other = {"input_ids": list(ids), "loss_mask": [1 if m else draw(st.sampled_from([0, -100])) for m in mask]}
    if draw(st.booleans()):
        del other["loss_mask"]
        other["labels"] = [token if m else -100 for token, m in zip(ids, mask, strict=True)]
    if draw(st.booleans()):
        front, behind = draw(st.integers(0, 4)), draw(st.integers(0, 4))
        fill = {"input_ids": st.sampled_from([0, 7, 10**6]), "loss_mask": st.sampled_from([0, 1, -100])}
        for name, values in list(other.items()):
            padding = [draw(fill.get(name, st.just(-100))) for _ in range(front + behind)]
            other[name] = padding[:front] + values + padding[front:]
        other["attention_mask"] = [0] * front + [1] * length + [0] * behind
    as_what = draw(st.sampled_from([list, tuple, np.asarray, torch.tensor]))
    return {"input_ids": ids, "loss_mask": mask}, {name: as_what(values) for name, values in other.items()}


@given(st.lists(written_rows(), min_size=1, max_size=4), st.sampled_from(["left", "right"]))
def test_rows_that_say_the_same_make_the_same_batch(pairs, side):
    plain, other = ([pair[place] for pair in pairs] for place in (0, 1))
    collate = EagleDataCollator(0, padding_side=side)
    wanted, seen = collate(plain), collate(other)
    assert seen.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(seen[name], values, rtol=0, atol=0)


def test_truth_values_are_ones_and_zeros():
    row = {"input_ids": [5, 6, 7], "loss_mask": [False, True, True]}
    assert read_row(row, "row 0")["loss_mask"].tolist() == [0, 1, 1]


def padded(chats, side="left"):
    """The same rows, padded to one length; what stands in padding would be supervised, were it a token."""
    length = max(len(chat["input_ids"]) for chat in chats) + 2
    rows = []
    for chat in chats:
        fill = length - len(chat["input_ids"])
        row = {"input_ids": [7] * fill, "loss_mask": [1] * fill, "attention_mask": [0] * fill}
        chat = {**chat, "attention_mask": [1] * len(chat["input_ids"])}
        rows.append({n: row[n] + chat[n] if side == "left" else chat[n] + row[n] for n in row})
    return rows


def test_packing_leaves_padding_out():
    chats = random_chats(12)
    wanted = list(pack_dataset(Dataset.from_list(chats), 64))
    for side in ("left", "right"):
        assert list(pack_dataset(Dataset.from_list(padded(chats, side)), 64)) == wanted
    labelled = [
        {
            "input_ids": chat["input_ids"],
            "labels": [token if m else -100 for token, m in zip(chat["input_ids"], chat["loss_mask"], strict=True)],
        }
        for chat in chats
    ]
    assert list(pack_dataset(Dataset.from_list(labelled), 64)) == wanted


def test_a_store_knows_conversations_by_what_is_supervised():
    chats = random_chats(6)
    ignoring = [{**chat, "loss_mask": [m or -100 for m in chat["loss_mask"]]} for chat in chats]
    keys = [[c.key for _, c in conversations_of(Dataset.from_list(rows))] for rows in (chats, ignoring)]
    assert keys[0] == keys[1]
    for rows in (padded(chats), [{"input_ids": [5], "labels": [5]}]):
        with pytest.raises(ValueError, match="A feature store holds .* without padding, but .*: cut the padding off"):
            list(conversations_of(Dataset.from_list(rows)))


# ---- sentences ----


ROW = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None, "loss_mask": None, "text": "a"}, "Row 1 .* no column `input_ids`, only `text`: give it"),
        ({"loss_mask": None}, "Row 1 of the batch has no column `loss_mask`, only `input_ids`: give it `input_ids`, a"),
        ({"input_ids": 5}, "`input_ids` of row 1 of the batch must be a list of whole numbers, .* got int 5"),
        ({"input_ids": "5 6 7"}, "`input_ids` of row 1 .* got str '5 6 7'"),
        ({"input_ids": ["5", "6", "7"]}, "`input_ids` of row 1 .* got list"),
        ({"input_ids": [[5, 6, 7]]}, "`input_ids` of row 1 .* got list"),
        ({"input_ids": [5, None, 7]}, "`input_ids` of row 1 .* got list"),
        ({"loss_mask": 1}, "`loss_mask` of row 1 of the batch must be a list of whole numbers, .* got int 1"),
        ({"loss_mask": [0, 0.5, 1]}, "`loss_mask` of row 1 .* whole numbers"),
        ({"loss_mask": [0, 1]}, "`loss_mask` of row 1 of the batch has 2 values for 3 `input_ids`"),
        ({"loss_mask": [0, 2, 1]}, "`loss_mask` of row 1 of the batch holds 2: it must be 1 .* and 0 or -100"),
        ({"loss_mask": [0, -1, 1]}, "`loss_mask` of row 1 of the batch holds -1"),
        ({"loss_mask": None, "labels": [5]}, "`labels` of row 1 of the batch has 1 values for 3"),
        ({"attention_mask": [1, 0, 1]}, "`attention_mask` of row 1 of the batch is 0 between tokens"),
        ({"attention_mask": [1, 1]}, "`attention_mask` of row 1 of the batch has 2 values for 3"),
        ({"attention_mask": 1}, "`attention_mask` of row 1 .* got int 1"),
        (dict.fromkeys(ROW), "Row 1 of the batch has no columns: give it"),
    ],
)
def test_what_a_row_cannot_be(change, message):
    row = {name: value for name, value in {**ROW, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        EagleDataCollator(0)([ROW, row])


@pytest.mark.parametrize("row", [None, 5, "5 6", [5, 6]])
def test_a_row_is_a_mapping(row):
    with pytest.raises(ValueError, match="Row 1 of the batch is .*: each row must be a dict of `input_ids`"):
        EagleDataCollator(0)([ROW, row])


# what people write as labels, of token ids and a mask; the trainer would train on other rows, or on all
MISUNDERSTOOD = {
    "a mask": lambda ids, mask: mask,
    "-1 where nothing is supervised": lambda ids, mask: np.where(mask, ids, -1),
    "0 where nothing is supervised": lambda ids, mask: np.where(mask, ids, 0),
    "shifted to the left": lambda ids, mask: np.append(np.where(mask, ids, -100)[1:], -100),
    "shifted to the right": lambda ids, mask: np.insert(np.where(mask, ids, -100)[:-1], 0, -100),
    "another id everywhere": lambda ids, mask: np.full_like(ids, 9),
}


@st.composite
def mislabelled(draw):
    """A row whose labels are misunderstood, the first wrong place, and maybe padding, whose labels may be anything."""
    length = draw(st.integers(1, 12))
    ids = np.array(draw(st.lists(st.integers(10, VOCAB - 1), min_size=length, max_size=length)))
    mask = np.array(draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)))
    labels = MISUNDERSTOOD[draw(st.sampled_from(sorted(MISUNDERSTOOD)))](ids, mask)
    wrong = np.flatnonzero((labels != -100) & (labels != ids))
    assume(len(wrong))

    front, behind = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    row = {"input_ids": ids, "labels": labels, "attention_mask": np.ones(length, int)}
    fill = {"input_ids": 7, "labels": 9, "attention_mask": 0}
    return {name: np.pad(x, (front, behind), constant_values=fill[name]) for name, x in row.items()}, wrong[0] + front


@given(mislabelled())
def test_labels_are_minus_100_or_the_tokens_own_ids(found):
    """In a row, and in a batch of another collator; what stands in padding is not compared."""
    row, place = found
    label, token = row["labels"][place], row["input_ids"][place]
    begins = ", ".join(map(str, row["input_ids"][:5]))
    wanted = (
        f"`labels` of row 1 of the batch, which begins with {begins}, holds {label} at position {place}, where "
        f"`input_ids` holds {token}: labels must be -100 or the token's id"
    )
    with pytest.raises(ValueError, match=wanted):
        EagleDataCollator(0)([ROW, row])

    sound = {**row, "labels": np.where(row["attention_mask"] == 1, row["input_ids"], 9)}
    batch = {name: torch.from_numpy(np.stack([sound[name], row[name]])) for name in row}
    with pytest.raises(ValueError, match=wanted):
        read_batch(batch, VOCAB)


def test_labels_and_a_mask_that_disagree_are_refused():
    both = {**ROW, "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]}
    wanted = EagleDataCollator(0)([ROW])
    for same in (both, {**ROW, "labels": None}, {**both, "loss_mask": None}, {**both, "loss_mask": [-100, 1, 1]}):
        assert all(torch.equal(x, wanted[name]) for name, x in EagleDataCollator(0)([same]).items())

    message = (
        "`labels` and `loss_mask` of row 1 of .* disagree at position 1, where `labels` holds -100 and `loss_mask` "
        "holds"
    )
    apart = {**both, "labels": [-100, -100, 7]}
    batch = {name: torch.tensor([both[name], apart[name]]) for name in apart}
    for read in (lambda: EagleDataCollator(0)([both, apart]), lambda: read_batch(batch, VOCAB)):
        with pytest.raises(ValueError, match=message):
            read()
    with pytest.raises(ValueError, match="`labels` and `loss_mask` of row 1 of `dataset`, .* disagree at position 1"):
        pack_dataset(Dataset.from_list([both, apart]), 8)

    hidden = {**apart, "attention_mask": [0, 0, 1]}  # padding tells nothing
    assert read_row(hidden, "row 0")["loss_mask"].tolist() == [1]


def test_column_names_are_checked_where_they_are_known():
    check_data(train_dataset=Dataset.from_list([ROW]), eval_dataset=None)
    check_data(train_dataset=[ROW], eval_dataset={"a": Dataset.from_dict({"input_ids": [[5]], "labels": [[5]]})})
    with pytest.raises(ValueError, match="`train_dataset` has no column `input_ids`, only `text`: .*build_dataset"):
        check_data(train_dataset=Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="`train_dataset` has no columns: give it `input_ids`, .*build_dataset"):
        check_data(train_dataset=Dataset.from_list([]))
    with pytest.raises(ValueError, match="`eval_dataset` has no column `loss_mask`, only `input_ids`"):
        check_data(eval_dataset={"a": Dataset.from_list([ROW]), "b": Dataset.from_dict({"input_ids": [[5]]})})
    with pytest.raises(ValueError, match="`dataset` has no column `loss_mask`"):
        pack_dataset(Dataset.from_dict({"input_ids": [[5]]}), 8)


# ---- batches, whoever collated them ----


def test_a_sound_batch_stays_as_it_is():
    batch = EagleDataCollator(0)(random_chats(4))
    read = read_batch(batch, VOCAB)
    assert read.keys() == batch.keys() and all(read[name] is batch[name] for name in batch)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [VOCAB, 10**6])
@pytest.mark.parametrize("packed", [False, True])
def test_padding_may_hold_any_id(pad, side, packed):
    rows = random_chats(4)
    if packed:
        rows = list(pack_dataset(Dataset.from_list(rows), 50))
    batch, wanted = (EagleDataCollator(fill, padding_side=side)(rows) for fill in (pad, 0))
    if packed:  # documents tell of padding too
        del batch["attention_mask"], wanted["attention_mask"]
    read = read_batch(batch, VOCAB)
    assert read.keys() == wanted.keys() and all(torch.equal(read[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("token", [VOCAB, 10**6, -1])
def test_a_token_beyond_the_vocabulary_is_named_with_its_row(token):
    rows = random_chats(3)
    rows[2]["input_ids"][1] = token
    first = rows[2]["input_ids"][0]
    message = f"`input_ids` of row 2 of the batch, which begins with {first}, {token}, .* id {token} at position 1, "
    message += ".* 0 to 95"
    with pytest.raises(ValueError, match=message):
        read_batch(EagleDataCollator(0)(rows), VOCAB)


def test_batches_of_another_collator_are_read_alike():
    batch = EagleDataCollator(0)(random_chats(4))
    ignoring = {**batch, "loss_mask": batch["loss_mask"].masked_fill(batch["loss_mask"] == 0, -100)}
    labels = batch["input_ids"].masked_fill(batch["loss_mask"] == 0, -100)
    labelled = {**{name: x for name, x in batch.items() if name != "loss_mask"}, "labels": labels}
    for other in (ignoring, labelled):
        read = read_batch(other, VOCAB)
        assert read.keys() == batch.keys() and all(torch.equal(read[name], batch[name]) for name in batch)

    for change, message in (
        ({"loss_mask": None}, "The batch has no `loss_mask`, only `input_ids`, `attention_mask`: its collator must"),
        (dict.fromkeys(batch), "The batch has no columns: its collator must give"),
        ({"loss_mask": batch["loss_mask"][:, 1:]}, r"`loss_mask` of the batch has the shape .* `input_ids` has \(4, "),
        ({"input_ids": [[5]]}, r"`input_ids` of the batch must be a tensor \(batch, length\), got list"),
        ({"loss_mask": torch.ones(3)}, r"`loss_mask` of the batch must be .* got one of shape \(3,\)"),
        ({"loss_mask": 3 * batch["loss_mask"]}, "`loss_mask` of the batch holds 3"),
    ):
        wrong = {name: x for name, x in {**batch, **change}.items() if x is not None}
        with pytest.raises(ValueError, match=message):
            read_batch(wrong, VOCAB)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [0, 3])
def test_a_batch_of_nothing_but_padding_gets_a_token_that_is_not_supervised(length, packed):
    zeros = torch.zeros(2, length, dtype=torch.long)
    batch = {"input_ids": zeros + 5, "loss_mask": zeros + 1, "attention_mask": zeros}
    if packed:
        batch |= {"documents": zeros - 1, "position_ids": zeros}
        del batch["attention_mask"]
    read = read_batch(batch, VOCAB)
    assert read.keys() == batch.keys() and {x.shape for x in read.values()} == {(2, max(1, length))}
    wanted = [[0] + [-1] * (length - 1)] * 2 if packed else [[1] + [0] * (length - 1)] * 2
    assert read["documents" if packed else "attention_mask"].tolist() == wanted
    assert not read["loss_mask"].any()
