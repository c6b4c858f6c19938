"""Chat records of every common form: reading them, and turning one into messages."""

import json
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset


ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # ShareGPT's tool forms: the call is written by the model, the observation is not
    "tool": "tool",
    "observation": "tool",
}
FORMS = (
    "`messages` (role, content), ShareGPT `conversations` (from, value), `prompt` with `completion`, or "
    "`instruction` with `input` and `output`"
)
_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_COMMON = Features({"messages": List({"role": Value("string"), "content": Value("string")}),
                    "finish_reason": List(Value("string"))})  # fmt: skip


def load_records(sources: str | Path | list[str | Path], split: str = "train") -> Dataset:
    """Chat records, as they are written.

    Args:
        sources (`str`, `Path` or a list of them):
            `.json` (a list of objects, or one a line), `.jsonl`, `.parquet`, `.csv`, a folder of such files, or the id
            of a data set on the Hub. Records of several sources are put one after another as `messages` and
            `finish_reason`; those of one source keep all their columns.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub data set.

    Raises:
        `ValueError`: a file is missing, is no JSON, or holds no record; the Hub data set cannot be read.
    """
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    if not sources:
        raise ValueError("`sources` is empty; name at least one file, folder or Hub data set.")
    parts = [part for source in sources for part in _load_source(source, split)]
    if len(parts) == 1:
        return parts[0][1]
    return concatenate_datasets([_as_messages(name, records) for name, records in parts])


def to_messages(record: dict) -> list[dict]:
    """The conversation of one record as `[{"role": ..., "content": ...}]`, roles system, user, assistant and tool.

    Reads `messages` (role, content), ShareGPT `conversations` (from, value), `prompt` with `completion` (each text or
    messages) and `instruction` with `input` and `output`. A missing answer is fine. A `system` text goes first.

    Raises:
        `ValueError`: the record has none of these forms, no message, an unknown role, or a content that is no text.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object with {FORMS}, got {type(record).__name__}.")
    record = {key: value for key, value in record.items() if value is not None}
    if "messages" in record:
        turns = record["messages"]
    elif "conversations" in record:
        turns = record["conversations"]
    elif "prompt" in record:
        turns = _side(record["prompt"], "user") + _side(record.get("completion"), "assistant")
    elif "instruction" in record:
        question = "\n".join(str(record[key]) for key in ("instruction", "input") if record.get(key))
        turns = _side(question, "user") + _side(record.get("output"), "assistant")
    else:
        raise ValueError(f"no conversation in the columns {sorted(record)}; a record needs {FORMS}.")

    if not isinstance(turns, list):
        raise ValueError(f"the conversation must be a list of messages, got {type(turns).__name__}.")
    messages = [_message(turn, place) for place, turn in enumerate(turns)]
    if not messages:
        raise ValueError("the conversation is empty; remove the record, or give it at least one message.")
    if isinstance(record.get("system"), str) and record["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": record["system"]})
    return messages


def read_record(record: dict, index: int) -> tuple[list[dict], list[str] | None]:
    """Messages and, where regeneration wrote them, each answer's `finish_reason`; errors name the record's index."""
    try:
        return to_messages(record), record.get("finish_reason")
    except ValueError as problem:
        raise ValueError(f"Record {index}: {problem}") from None


def _message(turn, place: int) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f"message {place} must be an object with role and content, got {type(turn).__name__}.")
    role, content = turn.get("role") or turn.get("from"), turn.get("content")
    content = turn.get("value") if content is None else content
    if role not in ROLES:
        raise ValueError(f"message {place} has the unknown role {role!r}; known are {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise ValueError(f"the content of message {place} must be text, got {type(content).__name__}.")
    return {"role": ROLES[role], "content": content}


def _side(text, role: str) -> list[dict]:
    """One side of a prompt/completion record: text, messages, or nothing."""
    if text is None or text == "":
        return []
    return text if isinstance(text, list) else [{"role": role, "content": text}]


def _as_messages(name: str, records: Dataset) -> Dataset:
    def convert(record, index):
        messages, finish_reason = read_record(record, index)
        return {"messages": messages, "finish_reason": finish_reason}

    try:
        return records.map(convert, with_indices=True, remove_columns=records.column_names, features=_COMMON)
    except ValueError as problem:
        raise ValueError(f"{name}: {problem}") from None


def _load_source(source: str | Path, split: str) -> list[tuple[str, Dataset]]:
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS)
        if not files:
            raise ValueError(f"The folder {path} holds no {', '.join(_READERS)} file.")
        kinds = sorted({_READERS[file.suffix] for file in files})
        return [(str(path), _load_files(kind, [f for f in files if _READERS[f.suffix] == kind])) for kind in kinds]
    if path.is_file():
        if path.suffix not in _READERS:
            raise ValueError(f"{path} must end in one of {', '.join(_READERS)}.")
        return [(str(path), _load_files(_READERS[path.suffix], [path]))]
    if path.suffix in _READERS or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ValueError(f"The file {source} does not exist; give a file, a folder or the id of a Hub data set.")
    try:
        return [(str(source), load_dataset(str(source), split=split))]
    except Exception as problem:  # whatever the Hub, the network or the data set raises
        raise ValueError(
            f"{source} is neither a file nor a Hub data set that can be read (split {split!r}): {problem}"
        ) from problem


def _load_files(kind: str, files: list[Path]) -> Dataset:
    names = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
    try:
        records = load_dataset(kind, data_files=[str(file) for file in files], split="train")
    except Exception as problem:  # `datasets` wraps a parser's error in several ways
        reason = _json_problem(files) if kind == "json" else None
        raise ValueError(reason or f"{names} cannot be read as {kind}: {problem.__cause__ or problem}") from problem
    if not len(records):
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
