"""The mask token of a DFlash draft: chosen, told, kept, and refused where the data hold it."""

import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import tiny_llama
from tiny_blocks import MASK, options_of, tiny_block_pair
from torch.utils.data import IterableDataset

from hf_eagle.drafts.dflash.configuration import DFlashConfig, config_for
from hf_eagle.drafts.dflash.mask_token import choose_mask_token


class Words:
    """A tokenizer of `size` tokens, the first three special."""

    bos_token_id, eos_token_id, mask_token_id = 1, 2, None

    def __init__(self, size, special=(0, 1, 2), **fields):
        self.size = size
        self.added_tokens_decoder = {number: SimpleNamespace(special=True) for number in special}
        vars(self).update(fields)

    def get_vocab(self):
        return {f"w{number}": number for number in range(self.size)}


@pytest.mark.parametrize(
    "tokenizer, data, wanted",
    [
        (Words(20, mask_token_id=7), [3, 4], 7),
        (Words(18, mask_token_id=7), [3, 7], 18),  # the data hold the mask token
        (Words(18), [3, 4], 18),
        (Words(20, special=(0, 1, 2, 5, 6)), [3, 4], 6),
        (Words(20, special=(0, 1, 2, 5, 6)), [3, 6], 5),
        (Words(20), [3, 4], 0),  # special, and neither begins nor ends a text
        (Words(18, mask_token_id=19), [3, 4], 18),  # the row of token 19 is zero
        (Words(20), [0, 4], None),
    ],
)
def test_the_mask_token_is_one_that_the_data_do_not_hold(tokenizer, data, wanted):
    rows = Dataset.from_list([{"input_ids": data}])
    if wanted is None:
        with pytest.raises(ValueError, match="`mask_token_id` is unset, but .*: set it to a token"):
            choose_mask_token(tokenizer, rows, table())
    else:
        assert choose_mask_token(tokenizer, rows, table())[0] == wanted


def test_a_row_of_zeros_without_a_token_leaves_the_next_one():
    rows = torch.ones(20, 4)
    rows[18] = 0
    assert choose_mask_token(Words(18), Dataset.from_list([{"input_ids": [3]}]), rows)[0] == 19


def table():
    """Of 20 tokens, the last of which has a row of zeros."""
    rows = torch.ones(20, 4)
    rows[19] = 0
    return rows


def test_it_is_told_and_refused_and_kept(caplog):
    rows, config = Dataset.from_list([{"input_ids": [3, 4]}]), config_for(tiny_llama().config, options_of())
    with caplog.at_level(logging.INFO):
        config.fit_to_data(Words(20), rows, table())
    assert f"The mask token of its blocks is {MASK}" in caplog.text and f" is {MASK}" in config.told_to_card()[0]

    config.mask_token_id = 4
    with pytest.raises(ValueError, match="`mask_token_id` is 4, but the data hold that token"):
        config.fit_to_data(Words(20), rows, table())

    config.mask_token_id = 19
    with pytest.raises(ValueError, match="`mask_token_id` is 19, but its row of the target's table is zero"):
        config.fit_to_data(Words(20), rows, table())

    config.mask_token_id = None
    config.fit_to_data(
        Words(20), rows, table(), held=DFlashConfig(target_layer_ids=[1], mask_token_id=9, vocab_size=20)
    )
    assert config.mask_token_id == 9


def test_a_kept_one_that_the_data_hold_is_refused_before_training():
    """By whoever starts from it; only another draft helps, since this one knows no other."""
    rows, held = Dataset.from_list([{"input_ids": [3, 9]}]), DFlashConfig(target_layer_ids=[1], mask_token_id=9)
    config = config_for(tiny_llama().config, options_of(mask_token_id=None))
    with pytest.raises(ValueError, match="`mask_token_id` is 9, but the data hold that token, .* or train a new draft"):
        config.fit_to_data(Words(20), rows, table(), held=held)


class Stream(IterableDataset):
    """Which nothing may read before training."""

    def __iter__(self):
        raise AssertionError("the stream was read")


@pytest.mark.parametrize("given", [None, 5])
def test_of_a_stream_it_is_not_said_that_it_does_not_hold_it(given, caplog):
    config = config_for(tiny_llama().config, options_of(mask_token_id=given))
    with caplog.at_level(logging.INFO):
        config.fit_to_data(Words(20), Stream(), table())
    assert "do not hold" not in config.told_to_card()[0]
    assert f"is {config.mask_token_id}; the stream is searched for it while it is read (" in caplog.text
    assert "the data do not hold" not in caplog.text


def test_a_draft_without_one_is_refused_before_it_trains_or_decodes():
    target, draft = tiny_block_pair(mask_token_id=None)
    with pytest.raises(ValueError, match="^`mask_token_id` of this DFlash draft is unset, .*: set it, or let"):
        draft.attach(target)
