"""Data sets given in Python: what they may be, which rows are left out, and which are too long."""

import logging
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_chats
from transformers import BatchEncoding

from hf_eagle.data.given import look_at
from hf_eagle.data.packing import pack_dataset


CHATS = random_chats(6)
COLUMNS = {name: [chat[name] for chat in CHATS] for name in CHATS[0]}
FORMS = {"list": list, "tuple": tuple, "table": Dataset.from_list}


class Rows(torch.utils.data.Dataset):
    """Rows that are made when they are asked for: looking at them all could take hours."""

    def __len__(self):
        return 2

    def __getitem__(self, place):
        raise AssertionError("it was read")


@pytest.mark.parametrize(
    "data",
    [
        *(make(CHATS) for make in FORMS.values()),
        Dataset.from_list(CHATS).with_format("torch"),
        Dataset.from_list(CHATS).shuffle(seed=1),
        Dataset.from_list(CHATS).to_iterable_dataset(),
        pack_dataset(Dataset.from_list(CHATS), 48),
        Rows(),
        [],
    ],
    ids=lambda data: type(data).__name__,
)
def test_sound_data_stay_as_they_are(data):
    assert look_at(data, "train_dataset", 48) is data
    assert look_at({"a": data}, "eval_dataset", 48)["a"] is data


NO_DATA = [
    (iter(CHATS), "is list_iterator .*, not a data set: give it a `datasets.Dataset`, a list of rows, or, to stream"),
    ((chat for chat in CHATS), "is generator .*, not a data set: give it a"),
    (map(dict, CHATS), "is map .*, not a data set: give it a"),
    ("data.jsonl", "is str 'data.jsonl', not a data set: give it a"),
    (5, "is int 5, not a data set: give it a"),
    (
        COLUMNS,
        "is a dict of `input_ids`, `loss_mask`, not a data set: turn columns into a data set with "
        "`datasets.Dataset.from_d",
    ),
    (
        BatchEncoding(COLUMNS),
        "is a BatchEncoding of `input_ids`, `loss_mask`, not a data set: .*`datasets.Dataset.from",
    ),
]


@pytest.mark.parametrize(("data", "message"), NO_DATA, ids=lambda x: type(x).__name__)
def test_what_is_no_data_set_is_refused(data, message):
    for argument in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=f"^`{argument}` {message}"):
            look_at(data, argument)
    with pytest.raises(ValueError, match="^`eval_dataset` is"):
        look_at({"a": CHATS, "b": data}, "eval_dataset")


def test_only_evaluations_take_several_data_sets():
    several = DatasetDict(a=Dataset.from_list(CHATS), b=Dataset.from_list(CHATS))
    assert look_at(several, "eval_dataset").keys() == {"a", "b"}
    with pytest.raises(ValueError, match="`train_dataset` is a DatasetDict of `a`, `b`, .* give one of them"):
        look_at(several, "train_dataset")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, "Row 6 of `train_dataset` is None: each row must be a dict of `input_ids`"),
        ([5, 6], r"Row 6 of `train_dataset` is list \[5, 6\]: each row must be a dict"),
        ({}, "Row 6 of `train_dataset` has no columns: give it"),
        ({"input_ids": [5]}, "Row 6 of `train_dataset` has no column `loss_mask`, only `input_ids`: give it"),
    ],
)
def test_a_row_of_a_list_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        look_at([*CHATS, row], "train_dataset")


def test_what_else_is_wrong_is_left_to_the_collator():
    for odd in ({"input_ids": 5, "loss_mask": 1}, {"input_ids": None, "loss_mask": None}):
        for data in ([odd], Dataset.from_list([odd])):
            assert look_at(data, "train_dataset", 9) is data


# ---- empty and long rows ----


@st.composite
def sized_rows(draw):
    """Rows of 0 to 6 tokens, all padded or none."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=8))
    rows = [{"input_ids": [5] * size, "loss_mask": [1] * size} for size in sizes]
    if draw(st.booleans()):
        for row, size in zip(rows, sizes, strict=True):
            fill = draw(st.integers(0, 4))
            row["attention_mask"] = [0] * fill + [1] * size
            row |= {name: [7] * fill + row[name] for name in ("input_ids", "loss_mask")}
    return sizes, rows


@given(sized_rows(), st.sampled_from(["list", "table"]), st.integers(1, 6))
def test_empty_rows_are_left_out_and_long_ones_refused(found, form, longest):
    sizes, rows = found
    data = FORMS[form](rows)
    beyond = [n for n, size in enumerate(sizes) if size > longest]
    if beyond:
        message = (
            f"Row {beyond[0]} of `train_dataset` holds a conversation of {sizes[beyond[0]]} tokens, but the target "
            f"reads {longest} at most ({len(beyond)} of {len(sizes)} rows are too long): cut them there"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            look_at(data, "train_dataset", longest)

    kept = [row for row, size in zip(rows, sizes, strict=True) if size]
    assert list(look_at(data, "train_dataset")) == (kept or rows)  # a run on nothing else says so itself


@pytest.mark.parametrize("form", ["list", "table"])
def test_empty_rows_are_counted(form, caplog):
    empty = {"input_ids": [], "loss_mask": []}
    with caplog.at_level(logging.WARNING, "hf_eagle"):
        look_at({"a": FORMS[form]([*CHATS, empty, empty])}, "eval_dataset")
    assert caplog.messages == ["Left out 2 of 8 rows of `eval_dataset`, which hold no token."]


@pytest.mark.parametrize("form", ["list", "table"])
def test_packed_conversations_are_measured_one_by_one(form):
    row = {"input_ids": [5] * 9, "loss_mask": [1] * 9}
    rows = [{**row, "document_lengths": np.int32(lengths)} for lengths in ([4, 5], [3, 3, 3], [2, 7])]
    assert len(look_at(FORMS[form](rows[:2]), "train_dataset", 5)) == 2
    with pytest.raises(ValueError, match="Row 2 of `train_dataset` holds a conversation of 7 tokens, .* 5 at most"):
        look_at(FORMS[form](rows), "train_dataset", 5)
