"""Chat records read from files, folders and the Hub, alone or mixed, whole or as a stream."""

import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)

from .media import has_media, read_media_record
from .messages import FORMS, read_record, read_tools, recognise_form, to_messages


__all__ = ["load_records", "read_record", "read_tools", "to_messages"]

logger = logging.getLogger(__name__)

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_LOOKED_AT = 16  # first records that the form is recognised from
_MESSAGE = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id")
# tool calls and tools as JSON texts: as Arrow objects those of all records would share their keys
_COMMON = Features(
    {
        "messages": List({name: Value("string") for name in _MESSAGE}),
        "finish_reason": List(Value("string")),
        "tools": Value("string"),
    }
)


def load_records(
    sources: str | Path | list[str | Path],
    split: str = "train",
    dataset_format: str = "auto",
    weights: list[float] | None = None,
    streaming: bool = False,
    seed: int = 0,
    content_parts: bool = False,
) -> Dataset | IterableDataset:
    """Chat records. What form they have is logged for each source.

    Args:
        sources (`str`, `Path` or a list of them):
            `.json` (a list of objects, or one a line), `.jsonl`, `.parquet`, `.csv` or `.arrow`, a folder of such files
            or of `save_to_disk`, or the id of a data set on the Hub, where `id:split` takes another split. Records of
            several sources are put one after another in one form (`messages`, `finish_reason`, `tools`); those of one
            source keep all their columns.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub data set.
        dataset_format (`str`, *optional*, defaults to `"auto"`):
            A key of `hf_eagle.data.messages.FORMS`; `"auto"` goes by the columns of each record.
        weights (`list[float]`, *optional*):
            One for each source: how many times its records are taken. 0.5 takes a random half, 2 every record twice.
            Of streams, whose length is not known, they are the shares of the mixture.
        streaming (`bool`, *optional*, defaults to `False`):
            Read records as they are needed, and return an `IterableDataset`.
        seed (`int`, *optional*, defaults to 0):
            Of the random part that a weight takes, and of the mixture of streams.
        content_parts (`bool`, *optional*, defaults to `False`):
            Let contents hold other parts than text, such as images. Only a single source keeps them.

    Raises:
        `ValueError`: a file is missing, is no JSON, or holds no record; the Hub data set cannot be read; its first
            records have no form that is known; the weights do not fit.
    """
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    if not sources:
        raise ValueError("`sources` is empty; name at least one file, folder or Hub data set.")
    if dataset_format != "auto" and dataset_format not in FORMS:
        raise ValueError(f"`dataset_format` must be auto, {', '.join(FORMS)}, got {dataset_format!r}.")
    weights = _checked_weights(weights, sources)
    parts = []
    for source, weight in zip(sources, weights, strict=True):
        for name, records in _load_source(source, split, streaming):
            _tell_form(name, records, dataset_format, content_parts)
            parts.append((name, records, weight))
    if len(parts) == 1 and dataset_format == "auto":
        _, records, weight = parts[0]
        return records if streaming else _take(records, weight, seed)
    form = None if dataset_format == "auto" else dataset_format
    common = [_as_messages(name, records, form) for name, records, _ in parts]
    if streaming:
        if len(common) == 1:
            return common[0]
        shares = np.asarray([weight for *_, weight in parts], dtype=float)
        return interleave_datasets(common, shares / shares.sum(), seed=seed, stopping_strategy="all_exhausted")
    return concatenate_datasets([_take(d, w, seed) for d, (*_, w) in zip(common, parts, strict=True)])


def count_records(source: str | Path, split: str = "train") -> int:
    """Records of one source, as `load_records` takes it."""
    return sum(len(records) for _, records in _load_source(source, split, streaming=False))


def _checked_weights(weights: list[float] | None, sources: list) -> list[float]:
    if weights is None:
        return [1.0] * len(sources)
    if len(weights) != len(sources):
        raise ValueError(f"`weights` has {len(weights)} numbers for {len(sources)} sources: give one for each.")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"`weights` must be above 0, got {weights}: leave out a source that is not wanted.")
    return list(weights)


def _take(records: Dataset, weight: float, seed: int) -> Dataset:
    """Every record `weight` times; the part that is left over is drawn at random and stays in order."""
    if weight == 1:
        return records
    times, rest = int(weight), round((weight - int(weight)) * len(records))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(records))[:rest])
    indices = np.concatenate([np.tile(np.arange(len(records)), times), drawn])
    if not len(indices):
        raise ValueError(f"`weights` holds {weight}, which takes none of a source's {len(records)} records.")
    return records.select(indices)


def _tell_form(name: str, records: Dataset | IterableDataset, dataset_format: str, content_parts: bool) -> None:
    """Logs what the first records look like; `ValueError` when they look like nothing that is known."""
    forms = Counter()
    for index, record in enumerate(islice(records, _LOOKED_AT)):
        try:
            form = recognise_form(record) if dataset_format == "auto" else dataset_format
            read_media_record(record, index) if has_media(record) else to_messages(record, form, content_parts)
        except ValueError as problem:
            said = str(problem).removeprefix(f"Record {index}: ")
            raise ValueError(f"{name}: Record {index}: {said}") from None
        forms[form] += 1
    if not forms:
        raise ValueError(f"{name} holds no record.")
    size = f"{len(records):,} records" if isinstance(records, Dataset) else "a stream of records"
    logger.info("%s: %s, %s", name, size, " and ".join(FORMS[form] for form in forms))


def _as_messages(name: str, records: Dataset | IterableDataset, form: str | None):
    def convert(record, index):
        if has_media(record):
            raise ValueError(f"Record {index} holds images or videos, which are read from a single source: join them.")
        messages, finish_reason = read_record(record, index, form)
        tools = read_tools(record, index)
        rows = [{key: _stored(message.get(key)) for key in _MESSAGE} for message in messages]
        return {"messages": rows, "finish_reason": finish_reason, "tools": tools and json.dumps(tools)}

    columns = records.column_names
    try:
        return records.map(convert, with_indices=True, remove_columns=columns, features=_COMMON)
    except ValueError as problem:
        raise ValueError(f"{name}: {problem}") from None


def _stored(value) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _load_source(source: str | Path, split: str, streaming: bool) -> list[tuple[str, Dataset | IterableDataset]]:
    path = Path(source).expanduser()
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"{path} has the splits {', '.join(saved)}, but no {split!r}.")
            saved = saved[split]
        return [(str(path), saved.to_iterable_dataset() if streaming else saved)]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS)
        if not files:
            raise ValueError(f"The folder {path} holds no {', '.join(_READERS)} file.")
        by_kind = {kind: [f for f in files if _READERS[f.suffix] == kind] for kind in set(_READERS.values())}
        return [(str(path), _load_files(kind, by_kind[kind], streaming)) for kind in sorted(by_kind) if by_kind[kind]]
    if path.is_file():
        if path.suffix not in _READERS:
            raise ValueError(f"{path} must end in one of {', '.join(_READERS)}.")
        return [(str(path), _load_files(_READERS[path.suffix], [path], streaming))]
    if path.suffix in _READERS or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ValueError(f"The file {source} does not exist; give a file, a folder or the id of a Hub data set.")
    hub_id, _, named = str(source).partition(":")
    split = named or split
    try:
        return [(str(source), load_dataset(hub_id, split=split, streaming=streaming))]
    except Exception as problem:  # whatever the Hub, the network or the data set raises
        raise ValueError(
            f"{source} is neither a file nor a Hub data set that can be read (split {split!r}): {problem}"
        ) from problem


def _load_files(kind: str, files: list[Path], streaming: bool) -> Dataset | IterableDataset:
    names = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
    try:
        records = load_dataset(kind, data_files=[str(f) for f in files], split="train", streaming=streaming)
        if streaming:
            next(iter(records), None)  # a broken file is told of now
    except Exception as problem:  # `datasets` wraps a parser's error in several ways
        reason = _json_problem(files) if kind == "json" else None
        raise ValueError(reason or f"{names} cannot be read as {kind}: {problem.__cause__ or problem}") from problem
    if not streaming and not len(records):
        raise ValueError(f"{names} holds no record.")
    return records


def _json_problem(files: list[Path]) -> str | None:
    """What is wrong with a file that `datasets` could not read; looked for only then."""
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if not text.strip() or text.strip() == "[]":
            return f"{file} holds no record."
        try:
            json.loads(text)
            continue
        except json.JSONDecodeError as problem:
            whole = problem
        if text.lstrip().startswith("["):
            return f"{file} is not JSON: {whole}."
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                line.strip() and json.loads(line)
            except json.JSONDecodeError as problem:
                return f"Line {number} of {file} is not JSON: {problem}; write one object a line, or one list."
    return None
