"""Read every kind of data file as texts of records: JSON as it stands, tables as JSON of their cells."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from .carrying import row_of_table, to_text
from .opening import COMPRESSED, opened
from .reading import Bad, decoded, read_json_texts
from .unread_media import READ


_BATCH = 1000  # rows of a table in memory at a time
_OTHER_MARKS = ("\t", ";", "|")  # between cells, instead of commas


def read_texts(path: str | Path, bad: Bad | None = None) -> Iterator[tuple[int, str]]:
    """The number, from 0, and JSON text of each record of a file of one of `KINDS`.

    Args:
        path: of the file.
        bad: called with the error of each record that cannot be read, which is left out; by default it is raised.

    Raises:
        ValueError: naming the file and the line or record, if a record, or the file itself, cannot be read.
    """
    yield from KINDS[ending_of(path)](path, bad)


def ending_of(path: str | Path) -> str:
    """The suffix that shows a file's kind; for a text that may be compressed, the one before `.gz` or `.zst`."""
    name = Path(path)
    inside = name.with_suffix("").suffix
    return inside if name.suffix in COMPRESSED and inside in TEXTS else name.suffix


def _json(path: str | Path, bad: Bad | None) -> Iterator[tuple[int, str]]:
    for number, text, _ in read_json_texts(path, bad):
        yield number, text


def _csv(path: str | Path, bad: Bad | None) -> Iterator[tuple[int, str]]:
    """All cells are texts, even if they look like numbers; an empty cell is absent."""
    csv.field_size_limit(2**31 - 1)

    with opened(path) as file:
        lines = (decoded(line, f"Line {number} of {path}") for number, line in enumerate(file, start=1))
        rows = csv.reader(lines, strict=True)

        try:
            names = [name.removeprefix("\ufeff") for name in next(rows, [])]
            _check_marks(names, path)
            if len(set(names)) != len(names):
                raise ValueError(f"Line 1 of {path} names a column twice: {', '.join(names)}.")

            number = 0
            for cells in rows:
                if not cells:
                    continue
                if len(cells) > len(names):
                    _tell(f"Line {rows.line_num} of {path} has {len(cells)} cells for {len(names)} columns.", bad)
                else:
                    row = {name: cell for name, cell in zip(names, cells, strict=False) if cell or name in READ}
                    yield number, json.dumps(row, ensure_ascii=False)
                number += 1
        except csv.Error as problem:
            _tell(f"{path} cannot be read as csv: line {rows.line_num}: {problem}.", bad)


def _check_marks(names: list[str], path: str | Path) -> None:
    """`ValueError` for a header whose cells are separated by something other than commas."""
    mark = next((mark for mark in _OTHER_MARKS if len(names) == 1 and mark in names[0]), None)
    if mark is not None:
        raise ValueError(
            f"Line 1 of {path} has no comma, but {names[0].count(mark)} of {mark!r} ({names[0][:80]!r}), and cells are "
            f"read between commas: write them so, in pandas with `read_csv(path, sep={mark!r}, dtype=str, "
            "keep_default_na=False)` and `to_csv(path, index=False)`."
        )


def _parquet(path: str | Path, bad: Bad | None) -> Iterator[tuple[int, str]]:
    def batches():
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_BATCH)

    return _rows(path, "parquet", batches, bad)


def _arrow(path: str | Path, bad: Bad | None) -> Iterator[tuple[int, str]]:
    def batches():
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                held = pa.ipc.open_file(file)
                yield from (held.get_batch(number) for number in range(held.num_record_batches))
            else:
                file.seek(0)
                yield from pa.ipc.open_stream(file)

    return _rows(path, "arrow", batches, bad)


def _rows(path: str | Path, kind: str, batches: Callable, bad: Bad | None) -> Iterator[tuple[int, str]]:
    """Rows with their own types; nulls are absent, see `row_of_table`."""
    number = 0
    try:
        for batch in batches():
            columns = Dataset(pa.Table.from_batches([batch]))[:]  # `Dataset` understands what `datasets` has written
            for cells in zip(*columns.values(), strict=True):
                row = row_of_table(dict(zip(columns, cells, strict=True)))
                try:
                    yield number, to_text(row, f"{path}: Record {number}")
                except ValueError as problem:
                    _tell(str(problem), bad)
                number += 1
    except (pa.ArrowException, OSError) as problem:
        raise ValueError(f"{path} cannot be read as {kind}: {problem}") from None


def _tell(problem: str, bad: Bad | None) -> None:
    if bad is None:
        raise ValueError(problem)
    bad(ValueError(problem))


# by suffix of the file
KINDS = {".json": _json, ".jsonl": _json, ".parquet": _parquet, ".csv": _csv, ".arrow": _arrow}
TEXTS = (".json", ".jsonl", ".csv")  # also read from `.gz` and `.zst`
