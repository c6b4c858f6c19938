"""Media that nothing shows: columns of other names than `image`, `images`, `video` and `videos`, and marks in texts.

`picture_forms` says what is read. A mark without a medium may be a tag of HTML in a chat about it, so a mark alone
refuses no record. It does together with what else shows that a medium is meant: a column of its kind that is empty, or
a column of another name that looks like media.
"""

import base64
import logging
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from .forms import FORM, ORIGIN, READ_AS_TEXT, named


logger = logging.getLogger(__name__)

READ = ("image", "images", "video", "videos")
MARKS = re.compile("(<image>|<video>)")
PICTURE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
PICTURE_STARTS = ("data:image/", "iVBORw0KGgo", "/9j/")  # the last two: base64 of PNG and JPEG
_FILES = (*PICTURE_FILES, ".gif", ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".npy")
_STARTS = (*PICTURE_STARTS, "data:video/", "R0lGOD")
_NAMES = re.compile("(image|img|picture|pic|photo|video)s?(path|url|uri|file|filename|data|bytes)?s?")


def unread_media(record: Mapping) -> str | None:
    """The first column that looks like media, by its name or by its value, and is not read; `None` if there is none."""
    for name, value in record.items():
        if name in (*READ, ORIGIN, FORM) or name in READ_AS_TEXT or not isinstance(name, str):
            continue
        if _looks_like_media(value) or _is_called_so(name, value):
            return name
    return None


def marks_in(messages: list[dict]) -> list[str]:
    """The marks that stand in texts of messages which are chats and no answers."""
    asked = [message["content"] for message in messages if message["role"] not in ("assistant", "text")]
    texts = [part for content in asked for part in ([{"text": content}] if isinstance(content, str) else content)]
    return [mark for part in texts for mark in MARKS.findall(str(part.get("text") or ""))]


def check_unread(record: Mapping, messages: list[dict]) -> None:
    """`ValueError` if a record that shows no medium has a mark in its texts, and a column that looks like media."""
    marks = marks_in(messages)
    column = unread_media(record) if marks else None
    if column is not None:
        kind = marks[0][1:-1]
        raise ValueError(
            f"a text of its messages holds {marks[0]}, and its column `{column}` looks like the {kind} for it, but "
            f"media are read from {', '.join(f'`{name}`' for name in READ)} only: rename the column to `{kind}s`, or "
            "take the mark out of the text."
        )


def tell_unread(record: Mapping, index: int) -> bool:
    """Warn of a column that looks like media and is not read, in a record that shows none; whether there is one."""
    column = unread_media(record)
    if column is not None:
        logger.warning(
            "%s: its column `%s` looks like media, but they are read from %s only: it is left aside. Rename it "
            "if it belongs to the chat.",
            *(named(record, index), column, ", ".join(f"`{name}`" for name in READ)),
        )
    return column is not None


class MarksAsText:
    """Counts chats in which `<image>` or `<video>` stays text, since no medium belongs to it."""

    def __init__(self):
        self.number, self.first = 0, ""

    def look(self, messages: list[dict], where: str) -> None:
        """Count one chat, named by `where`, whose media have their parts already."""
        marks = marks_in(messages)
        if marks:
            self.number += 1
            self.first = self.first or f"{marks[0]} in {where}"

    def tell(self, total: int) -> None:
        """Warn once, if there were any."""
        if self.number:
            logger.warning(
                "%d of %d chats hold <image> or <video> in a text and no medium for it: it stays text, as in chats "
                "about HTML; the first is %s. Where a picture or film is meant, name it in %s.",
                *(self.number, total, self.first, ", ".join(f"`{name}`" for name in READ)),
            )


def may_hold_marks(record: Mapping) -> bool:
    """Whether any value of a record holds a mark, wherever; quicker than to read its messages."""
    return isinstance(record, Mapping) and any(MARKS.search(str(value)) for value in record.values())


def _is_called_so(name: str, value: Any) -> bool:
    if not _NAMES.fullmatch(re.sub("[^a-z]", "", name.lower())):
        return False
    if isinstance(value, str):
        return bool(value.strip()) and "\n" not in value
    return bool(value) and isinstance(value, bytes | list | Mapping)


def _looks_like_media(value: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if hasattr(value, "save"):  # a picture of PIL
        return True

    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        value = base64.b64encode(value[:12]).decode()
    if not isinstance(value, str) or value.startswith(_STARTS):
        return isinstance(value, str)

    is_name = len(value) < 4096 and not re.search(r"\s", value)
    return is_name and _path_of(value).lower().endswith(_FILES)


def _path_of(name: str) -> str:
    """A name of a file, or the path in an address, which a query may follow."""
    try:
        return urlsplit(name).path if "://" in name else name
    except ValueError:
        return name
