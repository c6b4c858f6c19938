"""Check data sets that are given to the trainer in Python.

[`read_row`] checks columns again when rows are read; these are the checks that are possible before a run begins.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import IterableDataset

from .columns import COLUMNS, check_data, lacks, shown


logger = logging.getLogger(__name__)


def look_at(data: Any, argument: str, longest: int | None = None, by_columns: bool = True) -> Any:
    """Check a data set that the trainer was given, and leave out rows without a token.

    All rows of a `datasets.Dataset` or a list are checked; rows of other data are read only when they are trained on.

    Args:
        data: a data set, a stream, a dict of several, or `None`.
        argument: name of the data in errors.
        longest: maximum number of tokens that the target reads.
        by_columns: whether [`EagleDataCollator`] will read the rows. The user's collator may read different columns,
            so for that one only the form is checked.

    Returns:
        The data set without rows that hold no token; if no row holds one, the data set itself.

    Raises:
        ValueError: if the data are no data set, a column is missing, or a row is not a mapping or has more tokens than
            `longest`; in packed rows, each document counts separately.
    """
    if data is None:
        return None
    _check_form(data, argument)
    if not by_columns:
        return data
    if isinstance(data, Mapping):
        return {name: look_at(part, argument, longest) for name, part in data.items()}

    check_data(**{argument: data})
    if isinstance(data, Dataset):
        tokens, lengths = _lengths_of_table(data)
    elif isinstance(data, list | tuple):
        tokens, lengths = _lengths_of_rows(data, argument)
    else:
        return data

    _check_longest(lengths, argument, longest)
    return _without_empty(data, tokens, argument)


def _check_form(data: Any, argument: str) -> None:
    """Raise a `ValueError` if the data are neither a data set nor a dict of data sets to evaluate on."""
    wanted = "give it a `datasets.Dataset`, a list of rows, or, to stream, a `datasets.IterableDataset`"
    if isinstance(data, Mapping) and ("input_ids" in data or not argument.startswith("eval")):
        held = ", ".join(f"`{name}`" for name in data) or "nothing"
        raise ValueError(
            f"`{argument}` is a {type(data).__name__} of {held}, not a data set: turn columns into a data set with "
            "`datasets.Dataset.from_dict`, or, if it holds data sets, give one of them."
        )

    for part in data.values() if isinstance(data, Mapping) else [data]:
        has_rows = hasattr(part, "__getitem__") and hasattr(part, "__len__")
        if isinstance(part, str | bytes | Mapping) or not (has_rows or isinstance(part, IterableDataset)):
            raise ValueError(f"`{argument}` is {shown(part)}, not a data set: {wanted}.")


def _lengths_of_table(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of tokens of each row, and of its longest document."""
    names = [name for name in ("input_ids", "attention_mask", "document_lengths") if name in data.column_names]
    tokens, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]

    for batch in data.select_columns(names).with_format("arrow").iter(batch_size=4096):
        if not all(map(_is_sound, batch.columns)):
            size = longest = np.ones(len(batch), np.int64)  # [`read_row`] will report the error
        else:
            size = longest = pc.list_value_length(batch["input_ids"]).to_numpy()
            if "attention_mask" in names:
                size = longest = _of_each(batch["attention_mask"], np.add, lambda mask: mask != 0)
            if "document_lengths" in names:
                longest = _of_each(batch["document_lengths"], np.maximum)
        tokens.append(size)
        lengths.append(longest)
    return np.concatenate(tokens), np.concatenate(lengths)


def _is_sound(column: pa.ChunkedArray) -> bool:
    kind = column.type
    return column.null_count == 0 and (
        (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and not pa.types.is_nested(kind.value_type)
    )


def _of_each(column: pa.ChunkedArray, of: np.ufunc, read=lambda values: values) -> np.ndarray:
    """Reduce the values of each list by `of`; an empty list gives 0."""
    sizes = pc.list_value_length(column).to_numpy()
    values = read(pc.list_flatten(column).to_numpy()).astype(np.int64)
    found = np.zeros(len(sizes), np.int64)
    starts = np.cumsum(sizes) - sizes
    if len(values):
        found[sizes > 0] = of.reduceat(values, starts[sizes > 0])
    return found


def _lengths_of_rows(rows: Sequence, argument: str) -> tuple[np.ndarray, np.ndarray]:
    """Return `_lengths_of_table` of a list of rows."""
    tokens, lengths = np.ones(len(rows), np.int64), np.ones(len(rows), np.int64)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"Row {number} of `{argument}` is {shown(row)}: each row must be a dict of {COLUMNS}.")
        if lack := lacks(row):
            raise ValueError(f"Row {number} of `{argument}` has {lack}: give it {COLUMNS}.")

        mask = row.get("attention_mask")
        if hasattr(row["input_ids"], "__len__"):  # else [`read_row`] will report the error
            tokens[number] = lengths[number] = len(row["input_ids"])
            if hasattr(mask, "__len__"):
                tokens[number] = lengths[number] = int(np.count_nonzero(np.asarray(mask)))
            if len(row.get("document_lengths", ())):
                lengths[number] = max(row["document_lengths"])
    return tokens, lengths


def _check_longest(lengths: np.ndarray, argument: str, longest: int | None) -> None:
    if longest is None or not len(lengths) or lengths.max() <= longest:
        return

    beyond = np.flatnonzero(lengths > longest)
    raise ValueError(
        f"Row {beyond[0]} of `{argument}` holds a conversation of {lengths[beyond[0]]} tokens, but the target reads "
        f"{longest} at most ({len(beyond)} of {len(lengths)} rows are too long): cut them there, as `build_dataset` "
        "does with `max_length`."
    )


def _without_empty(data: Dataset | Sequence, tokens: np.ndarray, argument: str) -> Dataset | Sequence:
    kept = np.flatnonzero(tokens)
    if not len(kept) or len(kept) == len(tokens):
        return data

    empty = len(tokens) - len(kept)
    logger.warning("Left out %d of %d rows of `%s`, which hold no token.", empty, len(tokens), argument)
    return data.select(kept) if isinstance(data, Dataset) else [data[n] for n in kept.tolist()]
