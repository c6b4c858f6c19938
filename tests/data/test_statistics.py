"""Numbers about a data set against counts made by hand."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.statistics import duplicate_statistics, token_statistics


ROWS = Dataset.from_dict(
    {
        "input_ids": [[1, 2, 3], [4, 5], [1, 2, 3], [6] * 10, [1, 2, 3]],
        "loss_mask": [[0, 1, 1], [0, 1], [0, 0, 1], [0] * 10, [1, 1, 1]],
    }
)


def test_token_statistics():
    found = token_statistics(ROWS)
    assert (found["conversations"], found["tokens"], found["supervised_tokens"]) == (5, 21, 7)
    assert found["supervised_share"] == 7 / 21
    assert found["length"] == {"mean": 4.2, "median": 3.0, "p90": 7.2, "p99": 9.7, "max": 10}
    assert found["supervised"]["max"] == 3 and found["supervised"]["median"] == 1.0
    chosen = ROWS.select([3, 0])  # a selection keeps its own order and no other row
    assert token_statistics(chosen)["tokens"] == 13
    assert token_statistics(chosen)["supervised_tokens"] == 2


def test_token_statistics_of_many_rows():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 30, 9000)
    masks = [random.integers(0, 2, length).tolist() for length in lengths]
    found = token_statistics(Dataset.from_dict({"input_ids": [[1] * n for n in lengths], "loss_mask": masks}))
    assert found["tokens"] == lengths.sum() and found["supervised_tokens"] == sum(map(sum, masks))
    assert found["supervised"]["max"] == max(map(sum, masks))


def with_ignored(mask):
    return [-100 if value == 0 else 1 for value in mask]


# what a collator takes for the same rows
FORMS = {
    "a mask of -100": lambda row: {"input_ids": row["input_ids"], "loss_mask": with_ignored(row["loss_mask"])},
    "labels": lambda row: {
        "input_ids": row["input_ids"],
        "labels": [t if m else -100 for t, m in zip(row["input_ids"], row["loss_mask"], strict=True)],
    },
    "labels of token 0": lambda row: {
        "input_ids": [0] * len(row["input_ids"]),
        "labels": [0 if m else -100 for m in row["loss_mask"]],
    },
    "padding": lambda row: {
        "input_ids": [0, 0, *row["input_ids"], 0],
        "attention_mask": [0, 0, *(1 for _ in row["input_ids"]), 0],
        "loss_mask": [1, -100, *row["loss_mask"], 0],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_is_trained_on_is_counted_alike(form):
    assert token_statistics(Dataset.from_list([FORMS[form](row) for row in ROWS])) == token_statistics(ROWS)


@given(st.lists(st.lists(st.sampled_from([0, 1, -100]), min_size=1, max_size=9), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_supervised_tokens_are_those_that_a_collator_marks(masks):
    rows = [{"input_ids": [5] * len(mask), "loss_mask": mask} for mask in masks]
    marked = int(EagleDataCollator(pad_token_id=0)(rows)["loss_mask"].sum())
    assert token_statistics(Dataset.from_list(rows))["supervised_tokens"] == marked


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="`rows` has no column `loss_mask`"):
        token_statistics(ROWS.select_columns("input_ids"))


def test_duplicates_are_counted_whatever_their_masks():
    assert duplicate_statistics(ROWS) == {"duplicates": 2}
    assert duplicate_statistics(ROWS.select([0, 1])) == {"duplicates": 0}
