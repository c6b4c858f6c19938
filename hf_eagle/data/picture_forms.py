"""Read images and videos in every form in which chats name them, as typed parts of the messages.

A medium stands in its part (transformers' `image` or `path`, OpenAI's `image_url`), or in a column of the record next
to the messages: `image`, `images`, `video` or `videos`. A column's media are shown in order: at each part of their type
that names none (TRL), and at each `<image>` or `<video>` in a text that is not an answer (LLaVA, LLaMA-Factory). The
text around a mark stays as it is. If a record has films, no pictures and no `<video>`, its `<image>` are their places
(LLaVA-Video). If it has only one medium, and no such place, it stands before the user's first text, as in LLaVA.
Without a column, a mark is text, see `unread_media`.
"""

import base64
import mimetypes
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .reading import parse_json
from .unread_media import MARKS, PICTURE_FILES, PICTURE_STARTS, check_unread, marks_in


KINDS = ("image", "video")
COLUMNS = {"image": ("image", "images"), "video": ("video", "videos")}
# where a part names its medium, besides `image` and OpenAI's `image_url`; an object may stand there too
_SOURCES = ("path", "url", "base64")
_AXES = {"image": 3, "video": 4}  # of one medium as an array


@dataclass
class _Column:
    """The media of one kind in a column next to the messages."""

    name: str
    media: list


def has_media(record: Mapping) -> bool:
    """Whether a record names an image or a video, in any form."""
    if not isinstance(record, Mapping):
        return False
    if any(_is_filled(record.get(name)) for names in COLUMNS.values() for name in names):
        return True
    return any(kind_of(part) for value in record.values() for turn in _turns(value) for part in parts_of(turn))


def folder_of(origin: str | None) -> str:
    """The folder of the file that a record comes from, `""` if it is not known."""
    return os.path.dirname((origin or "").rpartition(": Record ")[0])


def with_media(record: Mapping, messages: list[dict], folder: str = "", taken: bool = True) -> list[dict]:
    """Messages in which every medium of the record is a part that names it: `{"type": "image", "image": source}`.

    Args:
        record: the messages' own, with its nulls: a column that is null names no medium for its marks.
        messages: as `to_messages` makes them of a record's turns.
        folder: where relative paths start; what is not a file there stays as it is.
        taken: whether the target takes media.

    Raises:
        ValueError: if places and media differ in number, two columns have one kind, the target takes no media, or a
            mark stands beside a column of media that is not read.
    """
    columns = {kind: column for kind in KINDS if (column := _column(record, kind))}
    if not any(column.media for column in columns.values()) and not any(_names_one(messages)):
        check_unread(record, messages)
    if not columns and not any(map(parts_of, messages)):
        return messages  # as for most records

    refused = next((kind for kind, column in columns.items() if column.media and not taken), None)
    if refused is not None:
        raise ValueError(
            f"its `{columns[refused].name}` names {_a(refused)}: images and videos need a target that takes them; "
            "leave such records out."
        )

    marks = _kinds_of_marks(messages, columns)
    messages = [
        message if message["role"] in ("assistant", "text") else message | {"content": _split(message, marks)}
        for message in messages
    ]

    _show_the_only_one(messages, columns)
    _check_places(messages, columns, marks)

    rest = {kind: iter(column.media) for kind, column in columns.items()}
    return [
        message | {"content": [_filled(part, rest, folder) for part in parts_of(message)]}
        if message["role"] != "assistant" and parts_of(message)
        else message
        for message in messages
    ]


def kind_of(part: Any) -> str | None:
    """The key of `KINDS` that a part belongs to; `None` for a text or anything else."""
    if not isinstance(part, Mapping):
        return None

    kind = str(part.get("type", "")).removesuffix("_url")
    return kind if kind in KINDS else None


def parts_of(turn: Any) -> list:
    """The parts of a message, from `content` or ShareGPT's `value`; none for a text."""
    content = (turn.get("content") or turn.get("value")) if isinstance(turn, Mapping) else None
    return content if isinstance(content, list) else []


def source_of(part: Mapping, kind: str) -> Any:
    """The medium that a part itself names: a path, an address, base64, bytes, a picture, an array; or `None`."""
    found = next((x for name in (kind, f"{kind}_url", *_SOURCES) if (x := part.get(name)) is not None), None)
    return found["url"] if isinstance(found, Mapping) and "url" in found else found


def axes_of(value: Any) -> int:
    """The number of axes of an array or of nested lists of numbers; 0 for anything else."""
    if hasattr(value, "ndim"):
        return value.ndim

    axes = 0
    while isinstance(value, list | tuple) and value:
        value, axes = value[0], axes + 1
        if hasattr(value, "ndim"):
            return axes + value.ndim
    return axes if isinstance(value, int | float) else 0


def addressed(parts: list[dict]) -> list[dict]:
    """Parts as servers take them: media as OpenAI's `image_url` and `video_url`, files as data URLs."""
    return [_addressed(part) for part in parts]


# ---- from columns and marks to parts ----


def _column(record: Mapping, kind: str) -> _Column | None:
    named = [name for name in COLUMNS[kind] if name in record]
    filled = [name for name in named if _is_filled(record[name])]
    if len(filled) > 1:
        raise ValueError(f"both `{filled[0]}` and `{filled[1]}` name {kind}s: leave one of the columns out.")

    name = next(iter(filled or named), None)
    return None if name is None else _Column(name, _listed(record[name], name, kind) if filled else [])


def _listed(value: Any, name: str, kind: str) -> list:
    """The media of a cell: one, or a list; pictures side by side in a column of videos are the frames of one video."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # in CSV, for example
        value = parse_json(value, f"`{name}`")

    axes = axes_of(value)
    if axes:  # with too few axes for pixels, it is refused where those are read
        return [value] if 1 < axes <= _AXES[kind] else list(value)
    if not isinstance(value, list | tuple) or kind == "video" and all(map(_is_frame, value)):
        return [value]
    return list(value)


def _names_one(messages: list[dict]) -> Iterator[bool]:
    """For each part of messages, whether it is a medium and names it."""
    for part in (part for message in messages for part in parts_of(message)):
        kind = kind_of(part)
        yield kind is not None and source_of(part, kind) is not None


def _kinds_of_marks(messages: list[dict], columns: dict[str, _Column]) -> dict[str, str]:
    """Mark -> the kind of medium whose place it is; marks that are text have none."""
    filled = [kind for kind, column in columns.items() if column.media]
    if filled == ["video"] and "<image>" in (marks := marks_in(messages)) and "<video>" not in marks:
        return {"<image>": "video"}  # LLaVA-Video
    return {f"<{kind}>": kind for kind in columns}


def _split(message: dict, marks: dict[str, str]) -> str | list:
    """A content with every mark turned into a part, if it is the place of a medium."""
    content = message["content"]
    if isinstance(content, str):
        pieces = _pieces(content, marks)
        return content if all(kind_of(piece) is None for piece in pieces) else pieces

    found = []
    for part in content:
        is_text = kind_of(part) is None and isinstance(part.get("text"), str)
        pieces = _pieces(part["text"], marks) if is_text else [part]
        found += pieces if any(map(kind_of, pieces)) else [part]
    return found


def _pieces(text: str, marks: dict[str, str]) -> list[dict]:
    pieces: list[dict] = []
    for piece in filter(None, MARKS.split(text)):
        if piece in marks:
            pieces.append({"type": marks[piece]})
        elif pieces and "text" in pieces[-1]:  # continues after a mark that is text
            pieces[-1]["text"] += piece
        else:
            pieces.append({"type": "text", "text": piece})
    return pieces


def _show_the_only_one(messages: list[dict], columns: dict[str, _Column]) -> None:
    """If a record shows none of its media and has only one, put it before the user's first text."""
    kinds = [kind for kind, column in columns.items() for _ in column.media]
    first = next((message for message in messages if message["role"] == "user"), None)
    if len(kinds) != 1 or first is None or any(kind_of(part) for message in messages for part in parts_of(message)):
        return

    said = first["content"] if isinstance(first["content"], list) else [{"type": "text", "text": first["content"]}]
    first["content"] = [{"type": kinds[0]}, *said]


def _check_places(messages: list[dict], columns: dict[str, _Column], marks: dict[str, str]) -> None:
    written = {kind: mark for mark, kind in marks.items()}
    for kind in KINDS:
        places = [
            place
            for place, message in enumerate(messages)
            for part in parts_of(message)
            if message["role"] != "assistant" and kind_of(part) == kind and source_of(part, kind) is None
        ]

        column = columns.get(kind)
        if column is None and places:
            raise ValueError(f"message {places[0]} holds {_a(kind)} part that names no {kind}.")
        if column is not None and len(column.media) != len(places):
            than = "more" if len(column.media) > len(places) else "fewer"
            raise ValueError(
                f"`{column.name}` holds {than} than there are parts of the type {kind} without one, or "
                f"`{written.get(kind, f'<{kind}>')}` in texts of the messages: {len(column.media)} for {len(places)}."
            )


def _filled(part: dict, rest: dict, folder: str) -> dict:
    """A part that names its medium; a file by its full path."""
    kind = kind_of(part)
    if kind is None:
        return part

    own = source_of(part, kind)
    found = _located(next(rest[kind]) if own is None else own, folder)
    return part if found is own else {"type": kind, kind: found}


def _located(source: Any, folder: str) -> Any:
    if isinstance(source, list | tuple) and not axes_of(source):  # frames
        return [_located(frame, folder) for frame in source]

    if isinstance(source, Mapping) and source.get("bytes") is None:
        named = next((x for name in _SOURCES if isinstance(x := source.get(name), str)), None)
        return source if named is None else _located(named, folder)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str):
        return source

    if source.startswith("file://"):
        return url2pathname(urlsplit(source).path)
    beside = os.path.join(folder, source)
    return os.path.abspath(beside) if beside != source and os.path.isfile(beside) else source


# ---- what values are ----


def _a(kind: str) -> str:
    return "an image" if kind == "image" else f"a {kind}"


def _is_filled(value: Any) -> bool:
    """Whether a cell of a column holds media; null, an empty text or list, 0 and false are none."""
    if hasattr(value, "ndim") or hasattr(value, "save"):
        return True
    return bool(value) and not (isinstance(value, str) and value.strip() in ("", "[]"))


def _is_frame(value: Any) -> bool:
    """Whether a value is a picture, as far as one can see without opening it; a GIF counts as a film."""
    if hasattr(value, "save") or axes_of(value) == _AXES["image"]:
        return True

    named = (value.get("path") or value.get("bytes")) if isinstance(value, Mapping) else value
    if isinstance(named, bytes):
        named = base64.b64encode(named[:12]).decode()
    named = os.fspath(named) if isinstance(named, os.PathLike) else named
    if not isinstance(named, str) or named.startswith("data:image/gif"):
        return False
    return named.lower().endswith(PICTURE_FILES) or named.startswith(PICTURE_STARTS)


def _turns(value: Any) -> list:
    """What may be the messages of a record."""
    if isinstance(value, Mapping):
        return [value]

    if isinstance(value, str) and value.lstrip().startswith("[") and re.search(r'"(image|video)', value):  # in CSV
        try:
            value = parse_json(value, "its messages")
        except ValueError:  # the reader of the record reports it
            return []
    return value if isinstance(value, list) else []


def _addressed(part: dict) -> dict:
    kind = kind_of(part)
    source = source_of(part, kind) if kind else None

    if isinstance(source, Mapping):
        source = source.get("bytes")
    if isinstance(source, bytes):
        source = base64.b64encode(source).decode()
    if not isinstance(source, str):
        return part

    address = _address(source, kind)
    return part if address is source and part["type"] == f"{kind}_url" else _by_url(kind, address)


def _by_url(kind: str, address: str) -> dict:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": address}}


def _address(source: str, kind: str) -> str:
    if source.startswith(("http://", "https://", "data:")):
        return source
    content = source  # base64 without a type
    if os.path.isfile(source):
        with open(source, "rb") as file:
            content = base64.b64encode(file.read()).decode()

    type_ = mimetypes.guess_type(source)[0] if len(source) < 4096 else None
    return f"data:{type_ or {'image': 'image/png', 'video': 'video/mp4'}[kind]};base64,{content}"
