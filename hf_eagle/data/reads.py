"""Describe the data that a run on a stream reads, for its checkpoints: a later run checks that it reads the same."""

import os
from pathlib import Path
from typing import Any

from ..door.names import at_home
from .sources import files_of, saved_form


_LISTED = 3  # files of a source that a sentence names


def what_is_read(sources: list[str], weights: list[float] | None = None, split: str = "train") -> list[dict[str, Any]]:
    """Return each source with its share of the stream, and its files if it lies on this machine.

    Files are identified by their names below the source and their sizes in bytes, not by path, since folders may be
    moved. A source that is not on this machine is identified by its name as given.

    Args:
        sources: sources as `load_records` takes them.
        weights: one weight per source.
        split: split of folders.

    Example:
        >>> what_is_read(["data/chats.jsonl", "org/chats"])
        [{"source": "chats.jsonl", "share": 0.5, "files": {"chats.jsonl": 2048}}, {"source": "org/chats", "share": 0.5}]
    """
    weights = [1.0] * len(sources) if weights is None else weights

    found = []
    for source, weight in zip(sources, weights, strict=True):
        path, share = at_home(source), round(weight / sum(weights), 6)
        files = _files(path, split)
        if files is None:
            found.append({"source": str(source), "share": share})
        else:
            found.append({"source": path.resolve().name, "share": share, "files": files})
    return found


def _files(path: Path, split: str) -> dict[str, int] | None:
    """Return the size of each file that is read, by its name below `path`; `None` if `path` is not on this machine."""
    if os.path.isfile(path):
        return {path.name: path.stat().st_size}
    if not os.path.isdir(path):
        return None

    saved = saved_form(path)
    if saved is None:
        files = files_of(path, split, tell=False)
    else:
        files = sorted((path if saved == "one" else path / split).glob("*.arrow"))
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}


def same_is_read(before: list[dict], now: list[dict]) -> bool:
    """Whether two runs read the same files, or data sets of the Hub, in the same order and shares."""
    return [_known_by(source) for source in before] == [_known_by(source) for source in now]


def _known_by(source: dict) -> tuple:
    return (source.get("files", source["source"]), source["share"])


def told_reads(reads: list[dict], beside: list[dict]) -> str:
    """Describe the data that are read, for a sentence that compares two runs: files that differ are named first."""
    others = {file for source in beside for file in source.get("files", {}).items()}
    uneven = len({source["share"] for source in reads}) > 1 or len({source["share"] for source in beside}) > 1
    return " and ".join(_told(source, others, uneven) for source in reads)


def _told(source: dict, others: set[tuple[str, int]], uneven: bool) -> str:
    files = sorted(source.get("files", {}).items(), key=others.__contains__)

    told = [f"{name} of {size:,} bytes" for name, size in files[:_LISTED]]
    if [name for name, _ in files] == [source["source"]]:
        told = [f"{files[0][1]:,} bytes"]
    if len(files) > _LISTED:
        told.append(f"{len(files) - _LISTED} more")
    if uneven:
        told.append(f"share {source['share']:g}")
    return f"{source['source']} ({', '.join(told)})" if told else source["source"]
