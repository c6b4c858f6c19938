"""Chats with images and videos: messages whose contents are lists of parts, and what those parts name."""

import base64
import copy
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .messages import named, read_record, text_of
from .reading import parse_json


KINDS = ("image", "video")
# where a part names its medium: transformers' keys, and OpenAI's
_SOURCES = ("path", "url", "base64")


def own_tokenizer(processing):
    """The tokenizer of a processor, with the processor's chat template; a tokenizer is its own."""
    tokenizer = getattr(processing, "tokenizer", processing)
    template = getattr(processing, "chat_template", None)
    if template and template != tokenizer.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def has_media(record: Mapping) -> bool:
    """Whether a record's messages hold an image or a video."""
    turns = record.get("messages") if isinstance(record, Mapping) else None
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # in CSV, for example
        try:
            turns = parse_json(turns, "`messages`")
        except ValueError:  # whoever reads the record says so
            return False
    return isinstance(turns, list) and any(_kind(part) for turn in turns for part in _parts(turn))


def read_media_record(record: Mapping, index: int) -> tuple[list[dict], list[dict], list[str] | None]:
    """Messages, their media in the order of their places, and each answer's `finish_reason`.

    In a chat with media a content that is a list stays one, of `{"type": "text", "text": ...}`, `{"type": "image"}` and
    `{"type": "video"}`; all else is read as by `to_messages`. A medium stands in its part (`image`, `image_url`,
    `path`, `url`, `base64`; for videos alike) or, in their order, in the record's columns `images` and `videos`.

    Returns:
        Messages; media, `{"type": "image", "image": source}` each; reasons.

    Raises:
        ValueError: naming the record, for a part without a medium or a medium without a part, and for media in an
            answer.
    """
    record, where = dict(record), named(record, index)
    given = {kind: record.pop(f"{kind}s", None) or [] for kind in KINDS}
    wrong = next((kind for kind, media in given.items() if not isinstance(media, list)), None)
    if wrong is not None:
        raise ValueError(f"{where}: `{wrong}s` must be a list, got {type(given[wrong]).__name__}.")
    columns = {kind: iter(media) for kind, media in given.items()}
    messages, reasons = read_record(record, index, content_parts=True)
    media: list[dict] = []
    for place, message in enumerate(messages):
        parts = _parts(message)
        if message["role"] == "assistant" and parts:
            if any(map(_kind, parts)):
                raise ValueError(f"{where}: message {place} is an answer, which can hold text only.")
            message["content"] = text_of(parts)
        elif parts:  # the template has its own way to join them
            message["content"] = [_part(part, columns, media, where, place) for part in parts]
    for kind, rest in columns.items():
        if next(rest, None) is not None:
            raise ValueError(f"{where}: `{kind}s` holds more than there are parts of the type {kind}.")
    return messages, media, reasons


def _parts(turn) -> list:
    content = turn.get("content") if isinstance(turn, Mapping) else None
    return content if isinstance(content, list) else []


def _kind(part) -> str | None:
    if not isinstance(part, Mapping):
        return None
    kind = str(part.get("type", "")).removesuffix("_url")
    return kind if kind in KINDS else None


def _part(part, columns: dict, media: list[dict], where: str, place: int) -> dict:
    kind = _kind(part)
    if kind is None:
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: message {place} holds a part that is neither text, image nor video.")
        return {"type": "text", "text": part["text"]}
    named = (part.get(name) for name in (kind, f"{kind}_url", *_SOURCES))
    source = next((x for x in named if x is not None), None)
    if isinstance(source, Mapping) and "url" in source:  # OpenAI's
        source = source["url"]
    source = next(columns[kind], None) if source is None else source
    if source is None:
        raise ValueError(f"{where}: message {place} holds an {kind} part that names no {kind}.")
    media.append({"type": kind, kind: source})
    return {"type": kind}


# ---- what a data set keeps ----


def as_text(media: list[dict]) -> str:
    """Media as JSON: names as they are, pictures in memory as what a file of them would hold."""
    return json.dumps([{"type": m["type"], m["type"]: _written(m[m["type"]])} for m in media])


def from_text(text: str) -> dict[str, list[Any]]:
    """The media of `as_text` by kind, pictures loaded; videos as their names, which a processor loads itself.

    Raises:
        OSError, ValueError: for one that cannot be loaded.
    """
    from transformers.image_utils import load_image

    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for medium in json.loads(text):
        source = medium[medium["type"]]
        found[medium["type"]].append(load_image(source) if medium["type"] == "image" else source)
    return found


def fingerprint(loaded: dict[str, list[Any]]) -> str:
    """32 hex digits that other media than those of `from_text` do not have, `""` of none.

    Pictures count by their pixels and films by the bytes of their files, not by their names; what is no file here, such
    as an address, by its name.
    """
    if not any(loaded.values()):
        return ""
    found = hashlib.blake2b(digest_size=16)
    for kind in KINDS:
        for medium in loaded[kind]:
            if hasattr(medium, "tobytes"):
                found.update(f"{kind} {medium.mode} {medium.size}".encode() + medium.tobytes())
                continue
            for name in medium if isinstance(medium, list) else [medium]:
                found.update(f"{kind} {len(medium)}".encode())
                held = Path(name).read_bytes() if len(name) < 4096 and Path(name).is_file() else name.encode()
                found.update(hashlib.blake2b(held).digest())
    return found.hexdigest()


def processor_fingerprint(processor) -> str:
    """16 hex digits of how a processor makes pixels: the settings of its parts for images and videos."""
    parts = [getattr(processor, f"{kind}_processor", None) for kind in KINDS]
    said = [part.to_dict() if hasattr(part, "to_dict") else type(part).__name__ for part in parts]
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _written(source) -> Any:
    if isinstance(source, Mapping) and source.get("bytes") is not None:  # as `datasets` keeps pictures
        held = source["bytes"]
        return held if isinstance(held, str) else base64.b64encode(held).decode()  # carried, it is base64 already
    if isinstance(source, Mapping) and isinstance(source.get("path"), str):
        return source["path"]
    if hasattr(source, "save"):  # a picture
        held = io.BytesIO()
        source.save(held, format="PNG")
        return base64.b64encode(held.getvalue()).decode()
    if isinstance(source, str) or (isinstance(source, list) and all(isinstance(x, str) for x in source)):
        return source
    raise ValueError(f"a medium must be a path, an address, base64 or a picture, got {type(source).__name__}.")
