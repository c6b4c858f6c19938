"""What regeneration answers, and what it writes: user turns, their answers' journal, the answered conversations."""

import hashlib
import json
import logging
from pathlib import Path

from ..data.messages import read_record
from ..files import write_atomically
from .journal import Journal, journal_beside


logger = logging.getLogger(__name__)


def read_turns(records, content_parts: bool = False) -> list[list[list[dict]]]:
    """Per record and answer, the messages that precede it since the last answer.

    The answers of a record are dropped. Messages of a user in a row are one turn. A tool's message ends the
    conversation, since the target may not have called that tool.

    Args:
        records: chat records of any form that `to_messages` reads.
        content_parts: keep contents that are lists of typed parts (text, images, videos) as they are.

    Raises a `ValueError` that names the record, when it is malformed or no user speaks in it.
    """
    return [
        _turns(read_record(record, index, content_parts=content_parts)[0], index)
        for index, record in enumerate(records)
    ]


def _turns(messages: list[dict], index: int) -> list[list[dict]]:
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
        raise ValueError(f"Record {index} has no user turn to answer.")
    return turns


def context(turns: list[list[dict]], answers: list[tuple]) -> list[dict]:
    """The conversation up to its next unanswered turn, with the `(text, finish_reason)` of the turns before it."""
    messages = []
    for turn, (text, _) in zip(turns, answers, strict=False):
        messages += [*turn, {"role": "assistant", "content": text}]
    return messages + (turns[len(answers)] if len(answers) < len(turns) else [])


def open_journal(output_path: Path, turns: list, settings: dict, asked_with=None) -> Journal:
    """The journal beside `output_path`, which belongs to these turns and settings.

    Args:
        asked_with: whatever else the questions depend on; a hash of it is kept.

    Raises a `ValueError` when `output_path` holds something else, or was begun with other settings.
    """
    questions = hashlib.sha256(json.dumps([turns, asked_with]).encode()).hexdigest()[:16]
    return journal_beside(output_path, settings | {"records": len(turns), "questions": questions})


def write_answered(output_path: Path, turns: list, answers: list[list]) -> None:
    """Writes the finished conversations in order, whole or not at all, and logs how many they are.

    Args:
        answers: per record `(text, finish_reason)` of each turn; `None` after them where the record ends early.
    """
    finished = [id for id in range(len(turns)) if len(answers[id]) == len(turns[id]) or answers[id][-1:] == [None]]
    write_atomically(output_path, (_line(id, turns[id], answers[id]) for id in finished))
    cut = sum(answer is not None and answer[1] == "length" for id in finished for answer in answers[id])
    logger.info("%d of %d records answered, %d answers cut: %s", len(finished), len(turns), cut, output_path)


def _line(id: int, turns: list[list[dict]], answers: list[tuple | None]) -> str:
    given = [answer for answer in answers if answer is not None]
    messages = context(turns[: max(1, len(given))], given)
    reasons = [reason for _, reason in given]
    return json.dumps({"id": id, "messages": messages, "finish_reason": reasons}, ensure_ascii=False)


def turn_seed(seed: int, id: int, turn: int = 0) -> int:
    """Of the sampling of one answer."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}/{turn}".encode()).digest()[:4], "big") >> 1


def check_arguments(at_least_one: dict, temperature: float, top_p: float, time_limit: float | None = None) -> None:
    """Raises a `ValueError` for an argument out of range; `at_least_one` are counts by name."""
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if temperature < 0:
        raise ValueError(f"`temperature` must be 0 (greedy) or more, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be above 0 and at most 1, got {top_p}.")
    if time_limit is not None and time_limit < 0:
        raise ValueError(f"`time_limit` must be a number of seconds, got {time_limit}.")
