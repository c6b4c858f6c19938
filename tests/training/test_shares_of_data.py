"""Weights and shares of data that leave nothing, or more than memory holds, are refused with their argument."""

import pytest
from tiny_files import write_chats
from tiny_tokenizer import tiny_tokenizer

from hf_eagle import EagleTrainingArguments
from hf_eagle.arguments.groups import DataArguments
from hf_eagle.training.parts import conversations


def prepared(tmp_path, **options):
    write_chats(tmp_path / "chats.jsonl", 8)
    data = DataArguments(train_data=[str(tmp_path / "chats.jsonl")], max_length=64, **options)
    args = EagleTrainingArguments(output_dir=str(tmp_path / "out"), report_to="none")
    return conversations(tiny_tokenizer(), data, args)


@pytest.mark.parametrize("share", [0.9999999, 0.9, 0.876])
def test_a_share_that_leaves_nothing_to_train_on(share, tmp_path):
    with pytest.raises(ValueError, match=f"^`eval_share` {share:g} of 8 conversations leaves none to train on"):
        prepared(tmp_path, eval_share=share)


@pytest.mark.parametrize("share", [1e-9, 0.5, 0.875])
def test_a_share_that_leaves_some(share, tmp_path):
    train, held_out = prepared(tmp_path, eval_share=share)
    assert len(train) and len(held_out) and len(train) + len(held_out) == 8


@pytest.mark.parametrize("weight", [1e-30, 0.01])
def test_a_weight_that_takes_no_record_is_named_as_it_was_given(weight, tmp_path):
    with pytest.raises(ValueError, match=f"^`data_weights` holds {weight}, which takes none of a source's 8 records"):
        prepared(tmp_path, data_weights=[weight])


@pytest.mark.parametrize("weight", [1001.0, 1e6])
def test_a_weight_that_no_memory_holds(weight, tmp_path):
    with pytest.raises(
        ValueError, match="^`data_weights` holds .*, so each record would be used that many times: give"
    ):
        prepared(tmp_path, data_weights=[weight])
    assert DataArguments(train_data=["x"], streaming=True, data_weights=[weight]).data_weights == [weight]
    with pytest.raises(ValueError, match="^`data_weights` must be above 0 and at most 1,000,000, got"):
        DataArguments(train_data=["x"], streaming=True, data_weights=[1e9])
