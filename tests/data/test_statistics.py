"""Numbers about a data set against counts made by hand."""

import numpy as np
from datasets import Dataset

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


def test_duplicates_are_counted_whatever_their_masks():
    assert duplicate_statistics(ROWS) == {"duplicates": 2}
    assert duplicate_statistics(ROWS.select([0, 1])) == {"duplicates": 0}
