"""Packing conversations into rows, and batches of such rows."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_chats

from hf_eagle import EagleDataCollator, pack_dataset
from hf_eagle.data.packing import plan_rows


def numbered(lengths):
    """Conversations of these lengths, every token different."""
    ends = np.cumsum(lengths).tolist()
    ids = [list(range(end - size, end)) for size, end in zip(lengths, ends, strict=True)]
    return [{"input_ids": row, "loss_mask": [token % 3 == 0 for token in row]} for row in ids]


def unpack(row):
    """The conversations of a packed row, cut by hand."""
    parts, start = [], 0
    for size in row["document_lengths"]:
        parts.append({name: row[name][start : start + size] for name in ("input_ids", "loss_mask")})
        start += size
    assert start == len(row["input_ids"]) == len(row["loss_mask"])
    return parts


def best_fit_decreasing(lengths, capacity):
    """How many rows the textbook's loop opens."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


lengths_and_capacity = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), min_size=1, max_size=60), st.just(capacity))
)


@given(lengths_and_capacity)
def test_every_conversation_is_in_one_row_once(drawn):
    lengths, capacity = drawn
    order, bounds = plan_rows(np.array(lengths), capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert bounds[0] == 0 and bounds[-1] == len(lengths)
    rows = [order[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
    assert all(rows) and all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert all(row == sorted(row) for row in rows) and [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert len(rows) == best_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_nearly_full_on_realistic_lengths(seed):
    """Log-normal lengths, a few cut at the limit, as chats have them."""
    lengths = np.random.default_rng(seed).lognormal(6, 0.9, 3000).clip(8, 2048).astype(int)
    _, bounds = plan_rows(lengths, 2048)
    assert len(bounds) - 1 <= 1.02 * lengths.sum() / 2048


def test_rows_hold_whole_conversations():
    chats = numbered([7, 3, 10, 2, 2, 5, 9])
    packed = pack_dataset(Dataset.from_list(chats), 10)
    assert packed.column_names == ["input_ids", "loss_mask", "document_lengths"]
    assert [row["document_lengths"] for row in packed] == [[7, 3], [10], [2, 2, 5], [9]]
    assert [part for row in packed for part in unpack(row)] == [chats[i] for i in (0, 1, 2, 3, 4, 5, 6)]


@pytest.mark.parametrize("stored", [False, True])
def test_the_same_data_give_the_same_rows(stored, tmp_path):
    """Chosen and shuffled rows, many writes: as after dropping conversations and splitting off some for evaluation."""
    chats = random_chats(300, seed=4)
    data = Dataset.from_list(chats)
    if stored:
        data.save_to_disk(tmp_path / "data")
        data = Dataset.load_from_disk(tmp_path / "data")
    data = data.select(range(10, 290)).train_test_split(test_size=0.2, seed=0)["train"]
    first, again = pack_dataset(data, 64), pack_dataset(data, 64)
    assert first.to_dict() == again.to_dict() and len(first) > 40
    assert bool(first.cache_files) == stored and first.cache_files == again.cache_files
    parts = [part for row in first for part in unpack(row)]
    assert sorted(map(str, parts)) == sorted(map(str, data))
    assert pack_dataset(data, 128).to_dict() != first.to_dict()  # another length is another cache


def test_long_rows_are_written_in_several_batches(monkeypatch):
    monkeypatch.setattr("hf_eagle.data.packing._BATCH_TOKENS", 24)  # three rows at a time
    chats = random_chats(40, seed=2, longest=8)
    packed = pack_dataset(Dataset.from_list(chats), 8)
    parts = [part for row in packed for part in unpack(row)]
    assert len(packed) > 9 and sorted(map(str, parts)) == sorted(map(str, chats))


def test_the_log_says_how_full_the_rows_are(caplog):
    with caplog.at_level(logging.INFO, logger="hf_eagle"):
        pack_dataset(Dataset.from_list(numbered([7, 3, 10, 5])), 10)
    assert "4 conversations packed into 3 rows of up to 10 tokens, 83.3% filled" in caplog.text


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([4, 9, 11], "`max_length` is 10, but conversation 2 has 11 tokens: cut conversations at `max_length`"),
        ([4, 0, 3], "conversation 1 has 0 tokens"),
    ],
)
def test_conversations_that_do_not_fit_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        pack_dataset(Dataset.from_list(numbered(lengths)), 10)


def test_packing_twice_is_refused():
    packed = pack_dataset(Dataset.from_list(numbered([4, 5])), 10)
    with pytest.raises(ValueError, match="packed already"):
        pack_dataset(packed, 10)


# ---- batches ----


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_of_packed_rows(side):
    rows = pack_dataset(Dataset.from_list(numbered([3, 2, 4])), 5)
    batch = EagleDataCollator(99, padding_side=side, pad_to_multiple_of=3)(list(rows))
    wanted = {
        "input_ids": [[0, 1, 2, 3, 4, 99], [5, 6, 7, 8, 99, 99]],
        "attention_mask": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]],
        "loss_mask": [[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]],
        "documents": [[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1]],
        "position_ids": [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]],
    }
    if side == "left":
        wanted = {name: [[*a[5:], *a[:5]], [*b[4:], *b[:4]]] for name, (a, b) in wanted.items()}
    assert {name: values.tolist() for name, values in batch.items()} == wanted
    assert all(values.dtype == torch.long for values in batch.values())


def test_a_mixture_of_packed_and_other_rows_is_refused():
    rows = [*pack_dataset(Dataset.from_list(numbered([4, 5])), 10), *numbered([3])]
    with pytest.raises(ValueError, match="1 of 2 rows of the batch have `document_lengths`"):
        EagleDataCollator(0)(rows)


def test_documents_that_do_not_fill_their_row_are_refused():
    row = {**numbered([5])[0], "document_lengths": [2, 2]}
    with pytest.raises(ValueError, match=r"`document_lengths` \[2, 2\] add up to 4 tokens, but the row has 5"):
        EagleDataCollator(0)([row])
