"""Pack whole conversations into rows of one length, so that little of a batch is padding."""

import logging
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

from .caching import caching
from .columns import check_data, read_row


logger = logging.getLogger(__name__)

_FORMAT = 1  # part of the cache's key: raise it whenever the written format changes
_BATCH_TOKENS = 2**22  # tokens in memory at a time


@caching()
def pack_dataset(dataset: Dataset, max_length: int) -> Dataset:
    """Pack whole conversations into rows, best fit decreasing; `datasets` caches the rows next to their source.

    The same data give the same rows in the same order. Conversations keep the data's order within a row, and rows are
    in the order of their first conversations.

    Args:
        dataset (`datasets.Dataset`): columns `input_ids` and `loss_mask`, as `build_dataset` makes them;
            [`EagleDataCollator`] lists further columns that a row may have.
        max_length (`int`): tokens per row.

    Returns:
        A `datasets.Dataset` with columns `input_ids`, `loss_mask` and `document_lengths`, the tokens of each
        conversation in the row. `EagleDataCollator` keeps them apart.

    Raises:
        `ValueError`: if a column is missing, a conversation is empty or longer than `max_length`, or the data are
            already packed or hold media.

    Example:
        >>> rows = pack_dataset(build_dataset(records, tokenizer, max_length=2048), max_length=2048)
    """
    if "document_lengths" in dataset.column_names:
        raise ValueError("`dataset` is packed already: it has a column `document_lengths`.")
    if "media" in dataset.column_names:
        raise ValueError("`packing` packs text, but the data hold images or videos: leave it out, batches are padded.")

    check_data(dataset=dataset)
    if set(dataset.column_names) & {"attention_mask", "labels"}:  # else there is a `loss_mask`, and no padding
        dataset = dataset.map(_without_padding, with_indices=True, remove_columns=dataset.column_names)
    dataset = dataset.select_columns(["input_ids", "loss_mask"]).with_format("arrow")

    lengths = _lengths(dataset)
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= max_length:
        wrong = int(np.flatnonzero((lengths == 0) | (lengths > max_length))[0])
        raise ValueError(
            f"`max_length` is {max_length}, but conversation {wrong} has {lengths[wrong]} tokens: cut conversations "
            "at `max_length` and drop empty ones first, as `build_dataset` does."
        )

    order, bounds = plan_rows(lengths, max_length)
    fingerprint = Hasher.hash([_FORMAT, dataset._fingerprint, max_length])
    files = dataset.cache_files
    packed = Dataset.from_dict({"row": np.arange(len(bounds) - 1)}).map(
        _fill_rows,
        batched=True,
        batch_size=max(1, _BATCH_TOKENS // max_length),
        remove_columns="row",
        features=Features({**dataset.features, "document_lengths": List(Value("int32"))}),
        fn_kwargs={"dataset": dataset, "order": order, "bounds": bounds, "lengths": lengths},
        new_fingerprint=fingerprint,
        cache_file_name=str(Path(files[0]["filename"]).with_name(f"packed-{fingerprint}.arrow")) if files else None,
        desc="packing",
    )

    logger.info(
        "%d conversations packed into %d rows of up to %d tokens, %.1f%% filled",
        len(lengths),
        len(packed),
        max_length,
        100 * lengths.sum() / max(1, len(packed) * max_length),
    )
    return packed


def plan_rows(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit decreasing: each conversation, longest first, goes into the row where it leaves the least room.

    Args:
        lengths: `(conversations,)`, each between 1 and `capacity`.
        capacity: of a row.

    Returns:
        `order` `(conversations,)`: their indices, row by row; and `bounds` `(rows + 1,)`: row `r` holds
        `order[bounds[r] : bounds[r + 1]]`.
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    rooms: list[int] = []  # the distinct rooms that are left, ascending
    with_room: dict[int, list[int]] = {}  # room left -> rows
    rows = 0

    decreasing = np.argsort(-lengths, kind="stable")
    for index, length in zip(decreasing.tolist(), lengths[decreasing].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, row, rows = capacity, rows, rows + 1
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]

        row_of[index] = row
        room -= length
        if room in with_room:
            with_room[room].append(row)
        elif room:
            with_room[room] = [row]
            insort(rooms, room)

    # number the rows by their first conversation
    _, first, row_of = np.unique(row_of, return_index=True, return_inverse=True)
    row_of = np.argsort(np.argsort(first))[row_of]
    return np.argsort(row_of, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])


def _without_padding(row: dict, number: int) -> dict[str, list[int]]:
    row = read_row(row, f"row {number} of `dataset`")
    return {name: row[name].tolist() for name in ("input_ids", "loss_mask")}


def _lengths(dataset: Dataset) -> np.ndarray:
    batches = dataset.select_columns("input_ids").iter(batch_size=4096)
    lengths = [pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches]
    return np.concatenate(lengths).astype(np.int64) if lengths else np.empty(0, np.int64)


def _fill_rows(batch: dict, dataset: Dataset, order: np.ndarray, bounds: np.ndarray, lengths: np.ndarray) -> pa.Table:
    """Return the rows `batch["row"]`, which are consecutive: copies of flat arrays, without Python integers."""
    rows = bounds[batch["row"][0] : batch["row"][-1] + 2]
    members = order[rows[0] : rows[-1]]
    sizes = lengths[members]
    ends = np.concatenate([[0], np.cumsum(sizes)])  # of conversations, in tokens

    table = dataset[members]
    columns = {
        name: _lists(ends[rows - rows[0]], pc.list_flatten(table[name].combine_chunks())) for name in dataset.features
    }
    return pa.table({**columns, "document_lengths": _lists(rows - rows[0], pa.array(sizes, pa.int32()))})


def _lists(bounds: np.ndarray, values: pa.Array) -> pa.ListArray:
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), values)
