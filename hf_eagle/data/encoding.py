"""Encode a few records at a time to token ids and loss masks, and note the outcome for each."""

import logging
from collections.abc import Mapping

from .forms import named
from .loss_mask import ConversationEncoder
from .mask_check import check_loss_mask
from .messages import read_record, read_tools
from .reading import Bad
from .said import Said, read_said


logger = logging.getLogger(__name__)

KEPT, CUT, CUT_TO_NOTHING, UNANSWERED, BAD = range(5)  # outcomes of a record; the first two are trained on


class Encoders:
    """A `ConversationEncoder` that each process makes when it first needs one."""

    def __init__(self, *args):
        self.args, self.made = args, None

    def __getstate__(self):
        return {"args": self.args, "made": None}

    def __call__(self) -> ConversationEncoder:
        self.made = self.made or ConversationEncoder(*self.args)
        return self.made


def encode_records(
    records: list[Mapping],
    indices: list[int],
    encoder: ConversationEncoder,
    max_length: int,
    skip: bool = False,
    bad: Bad | None = None,
) -> dict[str, list]:
    """Return the columns `input_ids`, `loss_mask`, `outcome` (one of the constants above), and `blank`, the number of
    answers that `blank_answers` counts.

    Args:
        records: chat records.
        indices: their numbers, for errors about records whose file is not known.
        encoder: encoder of conversations.
        max_length: maximum tokens per row; longer rows are cut, rows left without a supervised token become empty.
        skip: records that cannot be read or rendered become empty and `BAD`, instead of raising an error.
        bad: called with the error of each record that is skipped.
    """
    try:
        encoded = _encoded(records, indices, encoder)
    except ValueError:
        if not skip:
            raise
        encoded = [_or_none(record, index, encoder, bad) for record, index in zip(records, indices, strict=True)]

    result: dict[str, list] = {"input_ids": [], "loss_mask": [], "outcome": [], "blank": []}
    for row in encoded:
        ids, mask, blank = row or ([], [], 0)
        if any(mask[:max_length]):
            outcome = CUT if len(ids) > max_length else KEPT
        else:
            outcome, ids, mask = BAD if row is None else CUT_TO_NOTHING if any(mask) else UNANSWERED, [], []

        result["input_ids"].append(ids[:max_length])
        result["loss_mask"].append(mask[:max_length])
        result["outcome"].append(outcome)
        result["blank"].append(blank)
    return result


def blank_answers(messages: list[dict]) -> int:
    """Count a conversation's blank answers, which are not supervised."""
    answers = (message for message in messages if message["role"] == "assistant")
    other = ("reasoning_content", "tool_calls")
    return sum(not (m["content"].strip() or any(m.get(name) for name in other)) for m in answers)


def check_sample(records: list[Mapping], indices: list[int], encoder: ConversationEncoder, skip: bool = False) -> None:
    """Compare the masks of a few records with a second method, and warn of answers that the template leaves out.

    Raises a `ValueError` as `check_loss_mask` does, or for a record that cannot be read, unless those are skipped.
    """
    sound = []
    for record, index in zip(records, indices, strict=True):
        try:
            sound.append((record, index, *_read(record, index)))
        except ValueError:
            if not skip:
                raise
    if not sound:
        return

    records, indices, conversations, _, tools, said = map(list, zip(*sound, strict=True))
    try:
        check_loss_mask(encoder, conversations, indices, tools, said)
    except ValueError as problem:
        raise with_origin(problem, records, indices) from problem.__cause__

    # an answer whose tokens are known is trained on as it was said: no template needs to write it
    written = [chat for chat, known in zip(conversations, said, strict=True) if known is None]
    messages = [message for conversation in written for message in conversation]

    if any("reasoning_content" in message for message in messages) and not encoder.renderer.thought_names:
        logger.warning("The chat template of `tokenizer` writes no thoughts: those in the records are left out.")
    if any("tool_calls" in message for message in messages) and not encoder.renderer.writes_calls:
        logger.warning("The chat template of `tokenizer` writes no tool calls: they become JSON in the answers' text.")


def _encoded(records: list[Mapping], indices: list[int], encoder: ConversationEncoder) -> list[tuple[list, list, int]]:
    """Return token ids, mask and number of blank answers of each record."""
    read = [_read(record, index) for record, index in zip(records, indices, strict=True)]
    conversations, reasons, tools, said = map(list, zip(*read, strict=True)) if read else ([], [], [], [])

    try:
        rows = encoder.encode(conversations, reasons, indices, tools, said=said) if read else []
    except ValueError as problem:
        raise with_origin(problem, records, indices) from problem.__cause__

    # an answer whose tokens are known is supervised as it was said
    blank = [0 if own else blank_answers(messages) for messages, own in zip(conversations, said, strict=True)]
    return [(*row, number) for row, number in zip(rows, blank, strict=True)]


def _read(record: Mapping, index: int) -> tuple[list[dict], list[str] | None, list[dict] | None, Said | None]:
    """Return messages, the reasons why answers ended, tools, and the answers' token ids if the record has them."""
    messages, reasons = read_record(record, index)
    return messages, reasons, read_tools(record, index), read_said(record, named(record, index))


def _or_none(
    record: Mapping, index: int, encoder: ConversationEncoder, bad: Bad | None
) -> tuple[list, list, int] | None:
    try:
        return _encoded([record], [index], encoder)[0]
    except ValueError as problem:
        if bad is not None:
            bad(problem)
        return None


def with_origin(problem: ValueError, records, indices) -> ValueError:
    """Return the error with the record's file, if known, in place of its index."""
    for record, index in zip(records, indices, strict=True):
        rest = str(problem).removeprefix(f"Record {index}")
        if rest != str(problem) and not rest[:1].isdigit():
            return ValueError(named(record, index) + rest)
    return problem
