"""What is stored is all that training asks for, and conversations are the same in a data set and in its batches."""

import pytest
import torch
from datasets import Dataset
from tiny import pad_batch, random_chats

from hf_eagle.data.collators import EagleDataCollator, mark_padding
from hf_eagle.data.packing import pack_dataset
from hf_eagle.drafts.row_layout import RowLayout
from hf_eagle.losses.supervision import SupervisionPlan, supervised_steps
from hf_eagle.store.layout import StoreLayout, conversations_in, conversations_of


CHATS = random_chats(40, seed=3)
SHORT = [{"input_ids": [5, 6, 7], "loss_mask": mask} for mask in ([0, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1])]


@pytest.mark.parametrize("supervision", ["serving", "reference"])
@pytest.mark.parametrize("steps", [1, 3, 9])
@pytest.mark.parametrize("taps", [0, 3])
def test_all_that_an_unroll_asks_for_is_kept(supervision, steps, taps):
    """Row layout and supervision plan say what is looked at; they know nothing of a store."""
    layout = StoreLayout(taps, 8, "float32")
    for record in [*CHATS, *SHORT]:
        batch = pad_batch([record])
        documents = mark_padding(None, batch["attention_mask"], like=batch["input_ids"])
        plan = SupervisionPlan.of(supervised_steps(batch["loss_mask"], documents, steps, supervision))
        ((_, start, conversation),) = conversations_in(batch)
        assert start == 0
        assert set(plan.positions.tolist()) <= set(layout.places(conversation).tolist())
        if len(plan.rows):
            assert int(RowLayout.of(plan.rows, documents).keys.max()) < conversation.kept
        assert int(layout.places(conversation).max(initial=-1)) < len(record["input_ids"])


def test_little_is_kept_for_nothing():
    record = {"input_ids": list(range(10, 22)), "loss_mask": [0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0]}
    ((_, _, conversation),) = conversations_in(pad_batch([record]))
    assert conversation.judged.tolist() == [3, 4, 5, 7, 8] and conversation.kept == 9
    assert StoreLayout(3, 8, "bfloat16").bytes_of(conversation) == 9 * 3 * 16 + 5 * (16 + 8) + 12 * 5 + 8
    assert StoreLayout(0, 8, "float8").bytes_of(conversation) == 9 * (8 + 4) + 12 * 5 + 8


def test_a_conversation_has_one_key_wherever_it_is():
    """Alone, padded on either side, packed, and in the data set itself; another mask is another conversation."""
    data = Dataset.from_list(CHATS)
    alone = [c.key for row in CHATS for _, _, c in conversations_in(pad_batch([row]))]
    assert len(set(alone)) == len(CHATS)
    assert [(row, c.key) for row, c in conversations_of(data)] == list(enumerate(alone))
    left = [(row, c.key) for row, _, c in conversations_in(pad_batch(CHATS, "left"))]
    assert left == list(enumerate(alone))

    packed = pack_dataset(data, 64)
    listed = [(row, c.key) for row, c in conversations_of(packed)]
    assert sorted(key for _, key in listed) == sorted(alone) and len(packed) < len(data)
    batch = EagleDataCollator(0)(list(packed))
    seen = conversations_in(batch)
    assert [(row, c.key) for row, _, c in seen] == listed
    for row, start, conversation in seen:
        place = slice(start, start + len(conversation.input_ids))
        assert batch["input_ids"][row, place].tolist() == conversation.input_ids.tolist()

    # a data set that was filtered and split keeps its rows' keys
    chosen = data.select([7, 3, 30])
    assert [c.key for _, c in conversations_of(chosen)] == [alone[i] for i in (7, 3, 30)]
    other = {**CHATS[0], "loss_mask": [1 - m for m in CHATS[0]["loss_mask"]]}
    assert conversations_in(pad_batch([other]))[0][2].key != alone[0]


def test_other_media_are_another_conversation():
    batch = {**pad_batch([CHATS[0]] * 3), "pixel_values": torch.zeros(1)}
    with pytest.raises(ValueError, match="cannot tell conversations by their tokens, since the batch has pixel_values"):
        conversations_in(batch)
    shown = ["", "ab" * 16, "cd" * 16]
    keys = [c.key for _, _, c in conversations_in(batch, shown)]
    assert len(set(keys)) == 3 and keys[0] == conversations_in(pad_batch(CHATS[:1]))[0][2].key
    data = Dataset.from_list([{**CHATS[0], "media_fingerprint": x} for x in shown])
    assert [c.key for _, c in conversations_of(data)] == keys
