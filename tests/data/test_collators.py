"""Padding, against rows padded by hand."""

import pytest
import torch
from tiny import pad_batch, random_chats

from hf_eagle.data.collators import EagleDataCollator


@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_padding_by_hand(side):
    rows = random_chats(5)
    expected = pad_batch(rows, side)
    batch = EagleDataCollator(0, padding_side=side)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "loss_mask"}
    for name, values in batch.items():
        assert values.dtype == torch.long
        torch.testing.assert_close(values, expected[name], rtol=0, atol=0)


def test_pad_token_and_multiple():
    rows = [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, {"input_ids": [8], "loss_mask": [1]}]
    batch = EagleDataCollator(9, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert EagleDataCollator(9, pad_to_multiple_of=3)(rows)["input_ids"].shape == (2, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pad_token_id": None}, "`pad_token_id` must be a token id, got None"),
        ({"pad_token_id": 0, "padding_side": "top"}, "`padding_side` must be"),
        ({"pad_token_id": 0, "pad_to_multiple_of": 0}, "`pad_to_multiple_of` must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EagleDataCollator(**arguments)


EMPTY = {
    "no ids": {"input_ids": [], "loss_mask": []},
    "no ids, labelled": {"input_ids": [], "labels": []},
    "nothing but padding": {"input_ids": [5, 6], "loss_mask": [1, 1], "attention_mask": [0, 0]},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("empty", EMPTY)
def test_a_row_without_a_token_supervises_nothing(empty, side, packed):
    """Beside others it is padding; alone it gets a token, since no model runs on nothing."""
    documents = [{"document_lengths": lengths} if packed else {} for lengths in ([], [2, 1])]
    row, other = EMPTY[empty] | documents[0], {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]} | documents[1]
    collate = EagleDataCollator(9, padding_side=side, pad_to_multiple_of=2)

    beside, wanted = collate([other, row]), collate([other])
    assert all(torch.equal(beside[name][:1], wanted[name]) for name in wanted)
    assert not beside["attention_mask"][1].any()

    for number in (1, 2):
        alone = collate([row] * number)
        assert alone.keys() == wanted.keys() and {x.shape for x in alone.values()} == {(number, 2)}
        assert alone["attention_mask"].tolist() == [[1, 0]] * number and not alone["loss_mask"].any()
        if packed:
            assert alone["documents"].tolist() == [[0, -1]] * number
