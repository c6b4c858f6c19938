"""Carry records to training, each as a JSON text in one Arrow schema, so that no field changes its type.

`datasets`, Arrow and pandas give every value of a column one type: texts become dates, objects get each other's keys,
and a field that first appears late stops the run. A record that is carried as text stays as it was.
"""

import base64
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any
from uuid import UUID

import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets.table import MemoryMappedTable

from .caching import caching
from .forms import FORM, ORIGIN, READ_AS_TEXT
from .frames import as_png
from .reading import check_nesting
from .unread_media import READ


TEXT = "record_json"
CARRIED = Features({name: Value("string") for name in (TEXT, ORIGIN, FORM)})
_BATCH_ROWS, _BATCH_BYTES = 1000, 2**24
_OF_MEDIA = {"bytes", "base64", "image", "images", "video", "videos"}  # bytes under these keys are not text
_BYTES = (bytes, bytearray, memoryview)


def record_of(row: Mapping) -> dict:
    """The record that a row of a data set stands for.

    A carried row is parsed, and gets its origin and, if it was named, its form. Any other row comes from a table, whose
    schema adds nulls: their keys are removed, see `row_of_table`.
    """
    if TEXT in row:
        return {**json.loads(row[TEXT]), **{name: row[name] for name in (ORIGIN, FORM) if row.get(name)}}

    return row_of_table(row)


def as_records(records: Dataset) -> Dataset:
    """The data set with rows shown as the records that they stand for."""
    return records.with_transform(_record_batch)


def _record_batch(batch: dict[str, list]) -> dict[str, list]:
    rows = [record_of(dict(zip(batch, cells, strict=True))) for cells in zip(*batch.values(), strict=True)]

    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def row_of_table(row: Mapping) -> dict:
    """A row without nulls, but for the columns of media: there, null says that the record has no medium."""
    return {name: None for name in READ if name in row and row[name] is None} | without_empty_keys(row)


def without_empty_keys(value):
    """A value without the keys whose value is `None`, which Arrow adds to objects of different shapes."""
    if isinstance(value, Mapping):
        return {key: without_empty_keys(inner) for key, inner in value.items() if inner is not None}
    return [without_empty_keys(inner) for inner in value] if isinstance(value, list) else value


def to_text(record: Any, where: str) -> str:
    """A record as JSON text; pictures become base64, dates and decimals are written as text.

    Bytes become the text that they hold in UTF-8. Bytes of media, and bytes that are not UTF-8 in a column that is not
    read as text, become base64.

    Raises:
        ValueError: names `where`, for what JSON cannot hold, a lone surrogate, nesting above 100 levels, or bytes that
            are not UTF-8 in a column of texts.
    """
    try:
        try:
            text = json.dumps(record, ensure_ascii=False, default=_plain)
        except _HoldsBytes:
            text = json.dumps(_without_bytes(record, where), ensure_ascii=False, default=_plain)
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        half = ord(problem.object[problem.start])
        raise ValueError(
            f"{where}: it holds the lone surrogate \\u{half:04x}, half a character that is no text: remove it, or "
            "write the whole character."
        ) from None
    except _NoText as problem:
        raise ValueError(str(problem)) from None
    except (OSError, TypeError, ValueError, RecursionError) as problem:
        raise ValueError(f"{where}: it cannot be written as JSON: {problem}.") from None

    check_nesting(text, f"{where}: it")
    return text


def _plain(value: Any) -> Any:
    """The JSON counterpart of a value of a table."""
    if isinstance(value, _BYTES):
        raise _HoldsBytes
    if isinstance(value, date | time | Decimal | UUID):
        return str(value)
    if hasattr(value, "tolist"):  # of numpy
        return value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "save"):  # a picture
        return base64.b64encode(as_png(value)).decode()
    raise TypeError(f"a value of the type {type(value).__name__} is neither text, number, list nor object")


def holds_bytes(feature: Any) -> bool:
    """Whether a feature of `datasets` holds bytes, which `to_text` must convert; those of pictures do not count."""
    if isinstance(feature, Mapping):
        return any(map(holds_bytes, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(holds_bytes, feature))
    if isinstance(feature, Value):
        return "binary" in feature.dtype
    return holds_bytes(getattr(feature, "feature", None) or ())


class _HoldsBytes(TypeError):
    """A value holds bytes, whose conversion depends on the name of their field."""


class _NoText(ValueError):
    """Bytes in a column of texts that are not UTF-8."""


def _without_bytes(record: Any, where: str) -> Any:
    """A record with its bytes turned into texts."""
    if not isinstance(record, Mapping):
        return _as_texts(record, "", where)
    return {name: _as_texts(value, name, where) for name, value in record.items()}


def _as_texts(value: Any, column: str, where: str, key: str | None = None) -> Any:
    """A value of a column, found in it under `key`, with texts in place of bytes."""
    key = column if key is None else key

    if isinstance(value, Mapping):
        return {name: _as_texts(inner, column, where, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_texts(inner, column, where, key) for inner in value]
    if not isinstance(value, _BYTES):
        return value

    held = bytes(value)
    if key not in _OF_MEDIA:
        try:
            return held.decode("utf-8")
        except UnicodeDecodeError as problem:
            if column in READ_AS_TEXT:
                raise _NoText(
                    f"{where}: the column `{column}` holds bytes that are not UTF-8: byte 0x{held[problem.start]:02x} "
                    f"at place {problem.start + 1}; write it as text."
                ) from None
    return base64.b64encode(held).decode()


def carry(record: Any, origin: str, form: str | None = None) -> dict[str, str | None]:
    """A record as a row of `CARRIED`; its nulls were in the data and stay.

    Raises a `ValueError` that begins with `origin`, as `to_text` does, and for what is not an object.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{origin}: a record must be an object with messages or texts, got {type(record).__name__}.")

    record = dict(record)
    origin, form = record.pop(ORIGIN, None) or origin, record.pop(FORM, None) or form
    return {TEXT: to_text(record, origin), ORIGIN: origin, FORM: form}


def carry_all(records: Iterable[Mapping]) -> Dataset:
    """Records in memory as a data set in memory."""
    rows = [carry(record, f"Record {index}") for index, record in enumerate(records)]
    return Dataset.from_list(rows, features=CARRIED)


@caching()
def carried_file(path: Path, fingerprint: str, rows: Callable[[], Iterable[dict]]) -> Dataset:
    """The data set in the file `path`, which is first written if it is not there: completely or not at all.

    Args:
        path: of an Arrow file.
        fingerprint: of the data set.
        rows: makes the rows of `CARRIED`; one batch of them is in memory at a time.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
        try:
            schema = CARRIED.arrow_schema
            with os.fdopen(handle, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for batch in _batches(rows()):
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise

    return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=fingerprint)


def _batches(rows: Iterable[dict]) -> Iterator[list[dict]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row[TEXT] or "")

        if len(batch) == _BATCH_ROWS or size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
