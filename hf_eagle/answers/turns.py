"""Read the user turns that regeneration answers, with the tools offered in them; open the journal of their answers."""

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.forms import named
from ..data.messages import read_record, read_tools, text_of
from ..door.journal import Journal, journal_beside
from .answer import Answer


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

HOTTEST = 100.0  # above it, nothing is left of a target's distribution
_MOST = {"concurrency": 4096}  # each takes a thread and an open file
_FORMAT = 2  # of a journal's lines; format 1 had no token ids


def read_turns(records, content_parts: bool = False, media_root: str | None = None) -> list[list[list[dict]]]:
    """Return for each record and each of its answers the messages since the previous answer.

    The answers of a record are dropped. Consecutive messages of a user are one turn. A tool's message ends the
    conversation, since the target may not have called that tool; a warning counts the user turns after it.

    Args:
        records: chat records of any form that `to_messages` reads.
        content_parts: keep contents of chats with images or other media as lists of typed parts.
        media_root: folder of relative media paths; by default the folder of a record's file.

    Raises a `ValueError` that names the record if it is malformed or has no user message.
    """
    how = {"content_parts": content_parts, "media_root": media_root}

    turns, behind = [], {}
    for index, record in enumerate(records):
        messages = _joined(read_record(record, index, **how)[0])
        turns.append(_turns(messages, named(record, index)))
        behind[index] = _behind_a_tool(messages)

    left_out = [index for index, number in behind.items() if number]
    if left_out:
        logger.warning(
            "User turns after a tool's result are not answered, since the target may not have called that tool: %d "
            "in %d of %d records, first in record %d.",
            *(sum(behind.values()), len(left_out), len(turns), left_out[0]),
        )
    return turns


def answerable(records: "Dataset", content_parts: bool = False, media_root: str | None = None) -> "Dataset":
    """The records that can be read and have a turn to answer; a warning counts the others, with the first one's reason.

    Args:
        records, content_parts, media_root: as for [`read_turns`].

    Raises:
        ValueError: the first one's reason, if none is left.
    """
    kept, bad = [], []
    for index, record in enumerate(records):
        try:
            messages, _ = read_record(record, index, content_parts=content_parts, media_root=media_root)
            _turns(_joined(messages), named(record, index))
            read_tools(record, index)
        except ValueError as problem:
            bad.append(problem)
        else:
            kept.append(index)

    if bad and not kept:
        raise bad[0]
    if bad:
        logger.warning("%d of %d records are bad and were left out; the first: %s", len(bad), len(records), bad[0])
    return records.select(kept)


def _behind_a_tool(messages: list[dict]) -> int:
    """Return the number of user turns after the first message of a tool."""
    roles = [message["role"] for message in messages]
    behind = roles[roles.index("tool") :] if "tool" in roles else []
    return sum(role == "user" and before != "user" for before, role in zip(behind, behind[1:], strict=False))


def _joined(messages: list[dict]) -> list[dict]:
    """Join the parts of a chat that holds only text, as training does: servers differ in how they join them."""
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]

    if any(part.get("type") != "text" for part in parts):
        return messages
    return [message | {"content": text_of(message["content"])} for message in messages]


def _turns(messages: list[dict], name: str) -> list[list[dict]]:
    turns, following = [], []
    for place, message in enumerate(messages):
        if message["role"] == "tool":
            break
        if message["role"] == "assistant":
            continue

        following.append(message)
        last = messages[place + 1]["role"] if place + 1 < len(messages) else None
        if message["role"] == "user" and last not in ("user", "system"):
            turns.append(following)
            following = []

    if not turns:
        raise ValueError(f"{name} has no user turn to answer.")
    return turns


def read_ids(records) -> list:
    """Return the `id` of each record's output lines: the record's `id` if it is a string or integer, else its index."""
    own = (record.get("id") for record in records)
    return [id if isinstance(id, str | int) else index for index, id in enumerate(own)]


def read_offers(records, template_kwargs: dict | None = None) -> list[list[dict] | None]:
    """Return for each record the tools offered in it, as JSON schemas: its own, or else those of `template_kwargs`."""
    common = (template_kwargs or {}).get("tools")
    return [read_tools(record, index) or common for index, record in enumerate(records)]


def context(turns: list[list[dict]], answers: list[Answer]) -> list[dict]:
    """Return the conversation up to its next unanswered turn, with the answers to the turns before it."""
    messages = []
    for turn, answer in zip(turns, answers, strict=False):
        messages += [*turn, {"role": "assistant", **answer.message}]
    return messages + (turns[len(answers)] if len(answers) < len(turns) else [])


def open_journal(output_path: Path, turns: list, settings: dict, asked_with=None) -> Journal:
    """Open the journal next to `output_path`, which belongs to these turns and settings.

    Args:
        asked_with: anything else that the questions depend on; the journal keeps a hash of it.

    Raises a `ValueError` if `output_path` holds something else, or was begun with different settings.
    """
    questions = hashlib.sha256(json.dumps([turns, asked_with]).encode()).hexdigest()[:16]
    return journal_beside(output_path, settings | {"format": _FORMAT, "records": len(turns), "questions": questions})


def turn_seed(seed: int, id: int, turn: int = 0) -> int:
    """Return the sampling seed of one answer."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}/{turn}".encode()).digest()[:4], "big") >> 1


def check_arguments(counts: dict, temperature: float, top_p: float, seed: int, time_limit: float | None = None) -> None:
    """Raise a `ValueError` if an argument is out of range; `counts` are whole numbers from 1 up, by name."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if value > _MOST.get(name, 10**9):
            raise ValueError(f"`{name}` must be at most {_MOST.get(name, 10**9)}, got {value}.")

    if not 0 <= temperature <= HOTTEST:
        raise ValueError(f"`temperature` must be 0 (greedy) or more, and at most {HOTTEST:g}, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be above 0 and at most 1, got {top_p}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be from 0 to {2**32 - 1}, got {seed}.")
    if time_limit is not None and not 0 <= time_limit < math.inf:
        raise ValueError(f"`time_limit` must be a finite time, 0 or more, got {time_limit}.")
