"""Write answered conversations as records, each compared with the training example made from it."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..data.loss_mask import ConversationEncoder
from ..data.media import has_media
from ..data.messages import read_record, read_tools
from ..data.said import ANSWER_TOKEN_IDS, PROMPT_TOKENS, read_said
from ..data.spans import CUT
from ..door.writing import write_atomically
from .answer import Answer, digest
from .turns import context


logger = logging.getLogger(__name__)


def write_answered(
    output_path: Path,
    turns: list,
    answers: list[list[Answer | None]],
    tools: list | None = None,
    encoder: ConversationEncoder | None = None,
    ids: list | None = None,
) -> None:
    """Write the finished conversations in order, completely or not at all, and log how many there are.

    A later prompt may not repeat an earlier answer exactly: templates leave out past reasoning. Then the record becomes
    several lines, so that each answer follows the prompt that it answers in one of them.

    Args:
        turns: the turns of each record.
        answers: per record, one answer for each turn; `None` after them if the record ends early.
        tools: per record the tools offered in it, or `None`.
        encoder: makes training examples; conversations whose example differs from the answers are left out.
        ids: per record its `id` in the output, by default its index.

    A record without an answer is not written.

    Raises a `ValueError` if none of the finished conversations would be written.
    """
    finished = [id for id in range(len(turns)) if len(answers[id]) == len(turns[id]) or answers[id][-1:] == [None]]
    given = {id: _given(answers[id]) for id in finished}
    answered = [id for id in finished if given[id]]
    empty = {id: answer.finish_reason for id in finished for answer in answers[id] if answer and answer.is_empty}

    if finished and not answered:
        why = f"{_counted(empty)}; " if empty else ""
        raise ValueError(
            f"None of the {len(finished)} records has an answer: {why}the warnings above say which prompts end early. "
            f"Nothing is written to {output_path}; change the prompts or the sampling."
        )

    refused: dict[int, str] = {}
    write_atomically(output_path, _lines(answered, turns, answers, tools, encoder, refused, ids))

    cut = sum(answer.finish_reason in CUT for id in answered for answer in given[id])
    without = len(finished) - len(answered)
    logger.info(
        "%d of %d records answered, %d without an answer and not written, %d answers cut: %s",
        *(len(answered), len(turns), without, cut, output_path),
    )

    if empty:
        logger.warning("%s. Their records end before them. First, record %d.", _counted(empty), min(empty))
    _log_exceptions(answered, answers, refused)


def _given(answers: list[Answer | None]) -> list[Answer]:
    """Return the answers of one record, without an empty answer at its end."""
    return [answer for answer in answers if answer is not None and not answer.is_empty]


def _counted(empty: dict[int, str]) -> str:
    """Say how many answers are empty, and why they ended."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(Counter(empty.values()).items()))
    return f"{len(empty)} answers are empty or white space only (by `finish_reason`: {reasons}), which is no answer"


def conversations(
    id: int, turns: list, answers: list[Answer | None], tools: list | None
) -> Iterator[tuple[dict, Answer]]:
    """Yield the records of one answered conversation, each with its last answer."""
    given = _given(answers)
    starts = [0, *(n for n, answer in enumerate(given) if n and not answer.continues), len(given)]
    for start, end in zip(starts, starts[1:], strict=False):
        record = {"id": id, "messages": context(turns[:end], given[:end])}
        record["finish_reason"] = [answer.finish_reason for answer in given[:end]]
        own = [answer if n >= start else None for n, answer in enumerate(given[:end])]

        if any(answer and answer.token_ids for answer in own):
            record[ANSWER_TOKEN_IDS] = [answer and answer.token_ids for answer in own]
            record[PROMPT_TOKENS] = [answer and answer.prompt_tokens for answer in own]
        if tools:
            record["tools"] = tools
        yield record, given[end - 1]


def refusal(encoder: ConversationEncoder, record: dict, answer: Answer) -> str | None:
    """Return the reason why training on a record would not train on the target's answers; `None` if it would.

    With token ids, the training example must begin with those of the prompt and the answer. Without, the texts are
    compared, except for white space at the ends of answers. Records with media are not compared: only the target's
    processor renders them.
    """
    if has_media(record):
        return None

    try:
        messages, tools = read_record(record, record["id"])[0], read_tools(record, record["id"])
        if answer.digest is None:
            return _other_text(encoder, messages, tools)
        ids, _ = encoder.encode([messages], None, [record["id"]], [tools], said=[read_said(record, "its line")])[0]
    except ValueError as problem:
        return str(problem).removeprefix(f"Record {record['id']}: ")

    if digest(ids[: answer.prompt_tokens + len(answer.token_ids)]) != answer.digest:
        return "its prompt is rendered to different tokens from those that were answered"
    return None


def _other_text(encoder: ConversationEncoder, messages: list[dict], tools) -> str | None:
    """Describe how the template renders an answer if that differs from the answer's text."""
    try:
        text = encoder.render(messages, tools)
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = encoder.renderer.prompt(messages[:place], tools)
            row = text[len(prompt) :].lstrip()
            if not text.startswith(prompt) or not row.startswith(message["content"].strip()):
                return f"of the answer {message['content'][:100]!r} the chat template makes {row[:100]!r}"
    except Exception as problem:  # jinja's own errors, and whatever a template itself raises
        return f"it does not fit the chat template of `tokenizer`: {problem}"
    return None


def _lines(answered, turns, answers, tools, encoder, refused: dict[int, str], ids: list | None) -> Iterator[str]:
    written = 0
    for id in answered:
        for record, answer in conversations(id, turns[id], answers[id], tools and tools[id]):
            reason = refusal(encoder, record, answer) if encoder is not None else None
            if reason is not None:
                refused[id] = reason
                continue
            written += 1
            yield json.dumps(record if ids is None else record | {"id": ids[id]}, ensure_ascii=False)

    if refused and not written:
        raise ValueError(
            f"None of the {len(answered)} answered records can be trained on exactly as answered. Record "
            f"{_first(refused)}."
        )


def _log_exceptions(answered: list[int], answers: list, refused: dict[int, str]) -> None:
    """Log why records did not become one line each."""
    anew = sum(not answer.continues for id in answered for answer in _given(answers[id]))
    if anew:
        logger.info(
            "%d later prompts do not repeat the answer before them exactly, so each began a new line.",
            anew,
        )

    # the tool is not run, so there is nothing for the next turn to go on from
    called = sum(
        answers[id][-1] is None and bool(answers[id][-2:-1]) and "tool_calls" in answers[id][-2].message
        for id in answered
    )
    if called:
        logger.info("%d records end where the target calls a tool, which is not run here.", called)

    if refused:
        logger.warning(
            "%d records are left out, wholly or in part: training would use other tokens than were answered. First, "
            "record %s",
            len(refused),
            _first(refused),
        )


def _first(refused: dict[int, str]) -> str:
    return f"{min(refused)}: {refused[min(refused)]}"
