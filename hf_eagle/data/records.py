"""Load chat records from files, folders and the Hub, alone or mixed, whole or as a stream."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)
from datasets import config as datasets_config
from datasets.fingerprint import Hasher

from ..door.names import at_home
from ..door.reading import looks_like_a_path
from .carrying import CARRIED, TEXT, as_records, carried_file, carry, holds_bytes, record_of
from .forms import FORM, FORMS, ORIGIN, named, recognise_form
from .media import has_media, read_media_record
from .messages import read_record, read_tools, to_messages
from .opening import opened
from .sources import HubSource, files_of, hub_files, saved_form, why_not
from .tables import KINDS, ending_of, read_texts
from .unread_media import tell_unread


__all__ = ["load_records", "read_record", "read_tools", "to_messages"]

logger = logging.getLogger(__name__)

_LOOKED_AT = 16  # first records of a file, from which the form is recognised
_FILES_LOOKED_AT = 64  # of a source; each is opened once more for it
_TOLD: set[str] = set()  # files of streams whose bad records were told of: once, not in every pass
_FORMAT = 3  # part of the cache's key: raise it whenever the written format changes


def load_records(
    sources: str | Path | list[str | Path],
    split: str = "train",
    dataset_format: str = "auto",
    weights: list[float] | None = None,
    streaming: bool = False,
    seed: int = 0,
    content_parts: bool = False,
    skip_bad_records: bool = False,
) -> Dataset | IterableDataset:
    """Load chat records. The log names the form of each source.

    A record is kept exactly as in its file: no types are inferred, so a field may be missing or change its type in any
    record. Each record also has the field `record_origin`: its file, and its number there from 0.

    Args:
        sources (`str`, `Path` or a list of them):
            A file: `.json` (a list of objects, or one per line), `.jsonl`, `.csv` (every cell is text), all three also
            as `.gz` or `.zst`, `.parquet` or `.arrow`. A folder of such files or of `save_to_disk`. Or the id of a data
            set on the Hub; `id:split` selects a different split, `id:subset:split` a subset, each also with
            `id@revision`. The records of several sources follow each other.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub data set, or of a folder: files whose names belong to a different split are left out.
        dataset_format (`str`, *optional*, defaults to `"auto"`):
            A key of `hf_eagle.data.forms.FORMS`; `"auto"` decides by the columns of each record.
        weights (`list[float]`, *optional*):
            One weight per source: how many times its records are taken. 0.5 takes a random half, 2 every record twice.
            For streams, whose length is not known, they are the shares of the mixture.
        streaming (`bool`, *optional*, defaults to `False`):
            Read records as they are needed, and return an `IterableDataset`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random part that a weight takes, and of the mixture of streams.
        content_parts (`bool`, *optional*, defaults to `False`):
            Allow contents with parts other than text, such as images.
        skip_bad_records (`bool`, *optional*, defaults to `False`):
            Leave out and count records that cannot be read, instead of stopping.

    Returns:
        A data set that stores JSON texts and returns records; `with_format(None)` returns the texts, to save them.

    Raises:
        `ValueError`: if a file is missing, holds a record that cannot be read, or no record; if the Hub data set cannot
            be read, its first records have no known form, or the weights do not fit.
    """
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    if not sources:
        raise ValueError("`sources` is empty; name at least one file, folder or Hub data set.")
    if dataset_format != "auto" and dataset_format not in FORMS:
        raise ValueError(f"`dataset_format` must be auto, {', '.join(FORMS)}, got {dataset_format!r}.")

    weights = _checked_weights(weights, sources)
    form = None if dataset_format == "auto" else dataset_format

    # sources that are put together need one schema
    parts = []
    for source in sources:
        records, files = _load_source(source, split, streaming, form, skip_bad_records)
        if holds_bytes(records.features):
            records = _as_carried(str(source), records, form)
        seen = chain(islice(records, _LOOKED_AT), _first_records(files[1:], form, skip_bad_records))
        size = f"{len(records):,} records" if isinstance(records, Dataset) else "a stream of records"
        _tell_form(f"{source}: {size}", str(source), seen, dataset_format, content_parts, skip_bad_records)
        alone = len(sources) == 1 and form is None
        parts.append(records if alone else _as_carried(str(source), records, form))

    if not streaming:
        taken = [_take(records, weight, seed) for records, weight in zip(parts, weights, strict=True)]
        return as_records(concatenate_datasets(taken) if len(taken) > 1 else taken[0])

    # the length of a stream is not known, so its weight is a share
    if len(parts) > 1:
        shares = np.asarray(weights, dtype=float)
        parts = [interleave_datasets(parts, shares / shares.sum(), seed=seed, stopping_strategy="all_exhausted")]
    return parts[0].map(record_of, remove_columns=list(CARRIED) if parts[0].column_names == list(CARRIED) else None)


def count_records(source: str | Path, split: str = "train") -> int:
    """Return the number of records in one source that `load_records` can read."""
    return len(_load_source(source, split, streaming=False, skip=True)[0])


def _checked_weights(weights: list[float] | None, sources: list) -> list[float]:
    if weights is None:
        return [1.0] * len(sources)
    if len(weights) != len(sources):
        raise ValueError(f"`weights` has {len(weights)} numbers for {len(sources)} sources: give one for each.")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"`weights` must be above 0, got {weights}: leave out a source that is not wanted.")
    return list(weights)


def _take(records: Dataset, weight: float, seed: int) -> Dataset:
    """Take every record `weight` times; the remaining fraction is drawn at random and stays in order."""
    if weight == 1:
        return records
    times, rest = int(weight), round((weight - int(weight)) * len(records))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(records))[:rest])

    indices = np.concatenate([np.tile(np.arange(len(records)), times), drawn])
    if not len(indices):
        raise ValueError(f"`weights` holds {weight}, which takes none of a source's {len(records)} records.")
    return records.select(indices)


def _first_records(files: list[str | Path], form: str | None, skip: bool) -> Iterator[dict[str, str | None]]:
    """Yield the first records of further files, which may have different forms, at least from one file per ending.

    Files that are read over the network are skipped.
    """
    files = [file for file in files if "://" not in str(file)]
    firsts = {ending_of(file): file for file in reversed(files)}
    for file in [*firsts.values(), *(file for file in files if file not in firsts.values())][:_FILES_LOOKED_AT]:
        rows = _carried([file], form, skip)
        yield from (row for row in islice(rows, _LOOKED_AT) if row[TEXT] is not None)


def _tell_form(
    told: str, name: str, rows: Iterable[dict], dataset_format: str, content_parts: bool, skip_bad_records: bool
) -> None:
    """Log `told` and the forms of a source's first records; raise a `ValueError` if a form is unknown."""
    forms, bad, unread = Counter(), None, False
    for index, row in enumerate(rows):
        record = record_of(row)
        try:
            form = recognise_form(record) if dataset_format == "auto" else dataset_format
            shows = has_media(record)
            read_media_record(record, index) if shows else to_messages(record, form, content_parts)
            if not shows and not unread:  # told once a source
                unread = tell_unread(record, index)
        except ValueError as problem:
            where = named(record, index)
            said = str(problem).removeprefix(f"{where}: ")
            bad = bad or ValueError(f"{where if ORIGIN in record else f'{name}: {where}'}: {said}")
            if not skip_bad_records:
                raise bad from None
        else:
            forms[form] += 1

    if not forms:
        raise bad or ValueError(f"{name} holds no record.")

    logger.info("%s, %s", told, " and ".join(FORMS[form] for form in forms))


def _as_carried(name: str, records: Dataset | IterableDataset, form: str | None) -> Dataset | IterableDataset:
    """Return records in the schema that all sources share."""
    if records.column_names == list(CARRIED):
        return records

    def convert(row, index):
        return carry(record_of(row), f"{name}: Record {index}", form)

    return records.map(convert, with_indices=True, remove_columns=records.column_names, features=CARRIED)


def _load_source(
    source: str | Path, split: str, streaming: bool, form: str | None = None, skip: bool = False
) -> tuple[Dataset | IterableDataset, list[str | Path]]:
    """Return the records of a source, and its files if this package reads them without `datasets`."""
    # files on this machine take precedence over the Hub
    path = at_home(source)
    if saved_form(path) is not None:
        return _load_saved(path, split, streaming), []
    if os.path.isdir(path):
        files = files_of(path, split)
        return _load_files(path, files, streaming, form, skip), files
    if os.path.isfile(path):
        if ending_of(path) not in KINDS:
            raise ValueError(f"{path} must end in one of {', '.join(KINDS)}; texts also in .gz or .zst behind that.")
        return _load_files(path, [path], streaming, form, skip), [path]
    if ending_of(path) in KINDS or looks_like_a_path(str(source)):
        raise ValueError(f"The file {source} does not exist; give a file, a folder or the id of a Hub data set.")

    # this package reads JSON and CSV, without inferring types; `datasets` reads any other form
    hub = HubSource.of(str(source), split)
    files = hub_files(hub, streaming)
    if files:
        return _load_files(source, files, streaming, form, skip), files

    try:
        return load_dataset(hub.id, **hub.named, split=hub.split, streaming=streaming), []
    except Exception as problem:  # whatever the Hub, the network or the data set raises
        raise ValueError(
            f"{source} is neither a file nor a Hub data set that can be read (split {hub.split!r}): "
            + why_not(hub, problem)
        ) from problem


def _load_saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        saved = load_from_disk(str(path))
    except Exception as problem:  # whatever Arrow raises about the data, and Python about a broken description
        raise ValueError(
            f"The folder {path} holds a state.json or dataset_dict.json, but is no data set of `save_to_disk` "
            f"({type(problem).__name__}: {problem}); write it again, or remove that file."
        ) from problem

    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"{path} has the splits {', '.join(saved)}, but no {split!r}.")
        saved = saved[split]
    return saved.to_iterable_dataset() if streaming else saved


def _load_files(
    name: str | Path, files: list[str | Path], streaming: bool, form: str | None, skip: bool
) -> Dataset | IterableDataset:
    if streaming:
        _TOLD.difference_update(map(str, files))
        given = {"files": [str(file) for file in files], "form": form, "skip": skip}
        return IterableDataset.from_generator(_streamed, features=CARRIED, gen_kwargs=given)

    content = _content_hash(files)
    key = Hasher.hash([_FORMAT, content, form])
    # records carry the files' names, so the path depends on them; the fingerprint, and so later caches, do not
    held = Hasher.hash([key, list(map(str, files))])
    path = Path(datasets_config.HF_DATASETS_CACHE) / "hf_eagle_records" / f"{held}.arrow"
    records = carried_file(path, key, lambda: _carried(files, form, skip))

    bad = np.flatnonzero(records.data.column(TEXT).is_null().to_numpy())
    if not len(records):
        raise ValueError(f"{name} holds no record.")
    if len(bad) == len(records) or len(bad) and not skip:  # another run, which skipped them, may have written the file
        raise ValueError(records[int(bad[0])][ORIGIN])
    if len(bad):
        _tell_bad(name, len(bad), records[int(bad[0])][ORIGIN])
        records = records.select(np.setdiff1d(np.arange(len(records)), bad))
    return records


def _content_hash(files: list[str | Path]) -> list[tuple[str, str]]:
    """Return hashes of the content of files, which do not depend on when the files were written."""
    found = []
    for file in files:
        digest = hashlib.blake2b()  # by parts: `hashlib.file_digest` came with Python 3.11
        with opened(file) as held:
            while part := held.read(2**20):
                digest.update(part)
        found.append((ending_of(file), digest.hexdigest()))
    return found


def _carried(files: list[str | Path], form: str | None, skip: bool) -> Iterator[dict[str, str | None]]:
    """Yield the rows of all files. After those of a file come rows for its skipped records: no text, but the reason."""
    for file in files:
        bad: list[ValueError] = []
        for number, text in read_texts(file, bad.append if skip else None):
            yield {TEXT: text, ORIGIN: f"{file}: Record {number}", FORM: form}
        yield from ({TEXT: None, ORIGIN: str(problem), FORM: form} for problem in bad)


def _streamed(files: list[str], form: str | None, skip: bool) -> Iterator[dict[str, str | None]]:
    for file in files:
        bad = []
        for row in _carried([file], form, skip):
            if row[TEXT] is None:
                bad.append(row[ORIGIN])
            else:
                yield row
        if bad and file not in _TOLD:
            _TOLD.add(file)
            _tell_bad(file, len(bad), bad[0])


def _tell_bad(name: str | Path, number: int, first: str) -> None:
    left_out = "1 record cannot be read and is" if number == 1 else f"{number} records cannot be read and are"
    logger.warning("%s: %s left out; the first: %s", name, left_out, first)
