"""Read any data file record by record, each as a JSON text: JSON as it stands, rows of tables as JSON objects."""

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
_OTHER_DELIMITERS = ("\t", ";", "|")  # that some files have instead of commas


def read_texts(path: str | Path, bad: Bad | None = None) -> Iterator[tuple[int, str]]:
    """Yield the number (from 0) and the JSON text of each record in a file of one of `KINDS`.

    Args:
        path: path of the file.
        bad: called with the error of each unreadable record, which is then left out. If `None`, the error is raised.

    Raises:
        ValueError: if the file or one of its records cannot be read; it names the file, and the line or record.
    """
    yield from KINDS[ending_of(path)](path, bad)


def ending_of(path: str | Path) -> str:
    """Return the suffix that tells a file's format: for compressed JSON or CSV, the one before `.gz` or `.zst`."""
    name = Path(path)
    inner = name.with_suffix("").suffix
    return inner if name.suffix in COMPRESSED and inner in TEXTS else name.suffix


def _json(path: str | Path, bad: Bad | None) -> Iterator[tuple[int, str]]:
    for number, text, _ in read_json_texts(path, bad):
        yield number, text


def _csv(path: str | Path, bad: Bad | None) -> Iterator[tuple[int, str]]:
    """Keep every cell as text, even if it looks like a number, and leave out empty cells."""
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is less than a long chat

    with opened(path) as file:
        lines = (decoded(line, f"Line {number} of {path}") for number, line in enumerate(file, start=1))
        rows = csv.reader(lines, strict=True)

        try:
            names = [name.removeprefix("\ufeff") for name in next(rows, [])]
            _check_delimiter(names, path)
            if len(set(names)) != len(names):
                raise ValueError(f"Line 1 of {path} names a column twice: {', '.join(names)}.")

            number = 0  # also counts records that are left out
            for cells in rows:
                if not cells:
                    continue
                if len(cells) > len(names):
                    _report(f"Line {rows.line_num} of {path} has {len(cells)} cells for {len(names)} columns.", bad)
                else:
                    row = {name: cell for name, cell in zip(names, cells, strict=False) if cell or name in READ}
                    yield number, json.dumps(row, ensure_ascii=False)
                number += 1
        except csv.Error as problem:  # ends the file: where the next row begins is not known
            _report(f"{path} cannot be read as CSV (line {rows.line_num}: {problem}).", bad)


def _check_delimiter(names: list[str], path: str | Path) -> None:
    """Raise `ValueError` if the cells of a header are separated by something other than commas."""
    if len(names) != 1:
        return

    header = names[0]
    for mark in _OTHER_DELIMITERS:
        if mark in header:
            raise ValueError(
                f"Line 1 of {path} has no comma but {header.count(mark)} {mark!r} ({header[:80]!r}): separate its "
                f"cells by commas, for instance in pandas with `read_csv(path, sep={mark!r}, dtype=str, "
                "keep_default_na=False).to_csv(path, index=False)`."
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
                reader = pa.ipc.open_file(file)
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:  # the stream format, which begins with no mark
                file.seek(0)
                yield from pa.ipc.open_stream(file)

    return _rows(path, "arrow", batches, bad)


def _rows(path: str | Path, kind: str, batches: Callable, bad: Bad | None) -> Iterator[tuple[int, str]]:
    """Yield each row with the types of its cells. Nulls are left out, see `row_of_table`.

    A file that Arrow cannot read raises even with `bad`, which is for single rows.
    """
    number = 0
    try:
        for batch in batches():
            # `Dataset` knows the types that `datasets` writes into a schema, such as images
            columns = Dataset(pa.Table.from_batches([batch]))[:]
            for cells in zip(*columns.values(), strict=True):
                row = row_of_table(dict(zip(columns, cells, strict=True)))
                try:
                    yield number, to_text(row, f"{path}: Record {number}")
                except ValueError as problem:
                    _report(str(problem), bad)
                number += 1
    except (pa.ArrowException, OSError) as problem:
        raise ValueError(f"{path} cannot be read as {kind}: {problem}") from None


def _report(problem: str, bad: Bad | None) -> None:
    """Pass an error to `bad`, or raise it if there is no `bad`."""
    if bad is None:
        raise ValueError(problem)
    bad(ValueError(problem))


# suffix of a file -> its reader
KINDS = {".json": _json, ".jsonl": _json, ".parquet": _parquet, ".csv": _csv, ".arrow": _arrow}
TEXTS = (".json", ".jsonl", ".csv")  # may also end in `.gz` or `.zst` behind that
