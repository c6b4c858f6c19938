"""Records on their way to training: each a JSON text in one Arrow schema, which no type of its fields can change.

`datasets`, Arrow and pandas give every value of a column one type. So texts become dates, objects get each other's
keys, and a field that comes late stops the run. What is carried as text stays what was said.
"""

import base64
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets.table import MemoryMappedTable

from .caching import caching
from .messages import FORM, ORIGIN, READ_AS_TEXT
from .reading import check_nesting


TEXT = "record_json"
CARRIED = Features({name: Value("string") for name in (TEXT, ORIGIN, FORM)})
_BATCH_ROWS, _BATCH_BYTES = 1000, 2**24
_OF_MEDIA = {"bytes", "base64", "image", "images", "video", "videos"}  # keys whose bytes are no text
_BYTES = (bytes, bytearray, memoryview)


def record_of(row: Mapping) -> dict:
    """A row of a data set as the record that it stands for.

    What is carried is parsed, and has its origin and its form, where it was named. Any other row is of a table, whose
    types add nulls: those are absent.
    """
    if TEXT in row:
        return {**json.loads(row[TEXT]), **{name: row[name] for name in (ORIGIN, FORM) if row.get(name)}}
    return without_empty_keys(row)


def as_records(records: Dataset) -> Dataset:
    """The data set, whose rows are shown as the records that they stand for."""
    return records.with_transform(_record_batch)


def _record_batch(batch: dict[str, list]) -> dict[str, list]:
    rows = [record_of(dict(zip(batch, cells, strict=True))) for cells in zip(*batch.values(), strict=True)]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def without_empty_keys(value):
    """A value without the keys whose value is `None`, which Arrow gives to objects of different shapes."""
    if isinstance(value, Mapping):
        return {key: without_empty_keys(inner) for key, inner in value.items() if inner is not None}
    return [without_empty_keys(inner) for inner in value] if isinstance(value, list) else value


def to_text(record: Any, where: str) -> str:
    """A record as JSON text; pictures in it as base64, dates and decimals as they are written.

    Bytes are the text that they hold in UTF-8; those of media, and what is no text in a column that nobody reads as
    one, are base64.

    Raises:
        ValueError: which says `where`, for what JSON cannot hold, a lone surrogate, nesting above 100 levels, or bytes
            in place of a text that are not UTF-8.
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
    except (TypeError, ValueError, RecursionError) as problem:
        raise ValueError(f"{where}: it cannot be written as JSON: {problem}.") from None
    check_nesting(text, f"{where}: it")
    return text


def _plain(value: Any) -> Any:
    """What JSON has for a value of a table."""
    if isinstance(value, _BYTES):
        raise _HoldsBytes
    if isinstance(value, date | time | Decimal | UUID):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's
        return value.tolist()
    if hasattr(value, "save"):  # a picture
        held = io.BytesIO()
        value.save(held, format="PNG")
        return base64.b64encode(held.getvalue()).decode()
    raise TypeError(f"a value of the type {type(value).__name__} is neither text, number, list nor object")


def holds_bytes(feature: Any) -> bool:
    """Whether a feature of `datasets`, or one in it, is of bytes, which `to_text` reads; those of pictures are not."""
    if isinstance(feature, Mapping):
        return any(map(holds_bytes, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(holds_bytes, feature))
    if isinstance(feature, Value):
        return "binary" in feature.dtype
    return holds_bytes(getattr(feature, "feature", None) or ())


class _HoldsBytes(TypeError):
    """A value holds bytes, which are looked at with the names of their places."""


class _NoText(ValueError):
    """Bytes in place of a text that are none."""


def _without_bytes(record: Any, where: str) -> Any:
    """A record whose bytes are texts."""
    if not isinstance(record, Mapping):
        return _as_texts(record, "", where)
    return {name: _as_texts(value, name, where) for name, value in record.items()}


def _as_texts(value: Any, column: str, where: str, key: str | None = None) -> Any:
    """A value of a column, which lies there below `key`, with texts in place of bytes."""
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
    """A record as a row of `CARRIED`; nulls in it were said.

    Raises a `ValueError` that begins with `origin`, as `to_text` does, and for what is no object.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{origin}: a record must be an object with messages or texts, got {type(record).__name__}.")
    record = dict(record)
    origin, form = record.pop(ORIGIN, None) or origin, record.pop(FORM, None) or form
    return {TEXT: to_text(record, origin), ORIGIN: origin, FORM: form}


def carry_all(records: Iterable[Mapping]) -> Dataset:
    """Records that are in memory as a data set in memory."""
    rows = [carry(record, f"Record {index}") for index, record in enumerate(records)]
    return Dataset.from_list(rows, features=CARRIED)


@caching()
def carried_file(path: Path, fingerprint: str, rows: Callable[[], Iterable[dict]]) -> Dataset:
    """The data set in the file `path`, which is written first where it is not there: whole or not at all.

    Args:
        path: of an Arrow file.
        fingerprint: of the data set.
        rows: makes the rows of `CARRIED`, a batch of which is in memory at a time.
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
