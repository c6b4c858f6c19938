"""Make training rows from the exact tokens that a target generated.

A template may render an answer differently: without reasoning, without white space, in different tokens. If a record
carries the generated token ids, its row is the prompt's ids followed by these; no text is tokenised again.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .answer_text import SaidAnswer, read_answer
from .spans import CUT, ENDED, AnswerSpan, MaskOptions, first_answer, supervised


ANSWER_TOKEN_IDS, PROMPT_TOKENS = "answer_token_ids", "prompt_tokens"  # columns of a record


@dataclass(frozen=True)
class Said:
    """For each answer of a conversation, its token ids and the number of tokens its prompt had.

    An answer without ids (`None`) answered a different prompt from this conversation's: it is read, but not supervised.
    """

    token_ids: list[list[int] | None]
    prompt_tokens: list[int | None]


def read_said(record: Mapping, where: str) -> Said | None:
    """Read a record's columns `answer_token_ids` and `prompt_tokens`, or their JSON; `None` without token ids.

    Raises a `ValueError` that begins with `where`, the record, if a column is invalid.
    """
    ids = _column(record, ANSWER_TOKEN_IDS, where)
    if not ids or all(own is None for own in ids):
        return None

    if not all(own is None or _is_ids(own) for own in ids):
        raise ValueError(f"{where}: `{ANSWER_TOKEN_IDS}` must hold a list of token ids, or null, per answer.")

    places = _column(record, PROMPT_TOKENS, where)
    if len(places) != len(ids) or any(
        own is not None and not _is_ids([place]) for own, place in zip(ids, places, strict=True)
    ):
        raise ValueError(
            f"{where}: `{PROMPT_TOKENS}` must hold, per answer of `{ANSWER_TOKEN_IDS}`, how many tokens its "
            f"prompt had; got {places}."
        )
    return Said(ids, places)


def read_reasons(found, answers: int, where: str) -> list[str | None] | None:
    """Read why each answer ended, from a record's `finish_reason`: one per answer, or one text for the last answer.

    Reasons are those of `ENDED` and `CUT`, in upper or lower case.

    Raises a `ValueError` that begins with `where` if they are invalid.
    """
    if isinstance(found, str) and found.lstrip().startswith("["):  # in CSV, for example
        try:
            found = json.loads(found)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{where}: `finish_reason` is no JSON: {problem}.") from None

    if isinstance(found, str):
        return [None] * (answers - 1) + [_reason(found, where)] if answers and found else None
    if found is None or isinstance(found, list) and not found:
        return None

    if not isinstance(found, list) or not all(reason is None or isinstance(reason, str) for reason in found):
        raise ValueError(
            f"{where}: `finish_reason` must be a text for the last answer, or a list with one for each answer, got "
            f"{found!r}."
        )
    if len(found) != answers:
        raise ValueError(
            f"{where}: `finish_reason` has {len(found)} entries for {answers} answers; give one for each, or one text "
            "for the last."
        )
    return [_reason(reason, where) for reason in found]


def _reason(found: str | None, where: str) -> str | None:
    if not found:
        return None
    if found.lower() not in (*ENDED, *CUT):
        raise ValueError(
            f"{where}: `finish_reason` is {found[:80]!r}, which is not known; known are {', '.join(ENDED)} for an "
            f"answer that the target ended, and {', '.join(CUT)} for one that was cut: give one of them, or null."
        )
    return found.lower()


def encode_said(
    tokenizer,
    prompt_ids: Callable[[list[dict]], list[int]],
    messages: list[dict],
    said: Said,
    options: MaskOptions,
    where: str = "The conversation",
) -> tuple[list[int], list[int]]:
    """Return ids and mask of a conversation in its generated tokens, up to its last answer with ids.

    Args:
        tokenizer: the target's tokenizer.
        prompt_ids: returns the token ids of messages that wait for an answer.
        messages: messages as `to_messages` returns them.
        said: the generated tokens of all answers.
        options: which parts of the answers are supervised.
        where: the record, for errors.

    Raises a `ValueError` that begins with `where` if the conversation does not match its generated tokens.
    """
    try:
        ids, places = said_row(tokenizer, prompt_ids, messages, said)
    except Exception as problem:  # including jinja's errors
        raise ValueError(f"{where} cannot be trained on as it was said: {problem}") from problem

    spans = [place and _span(tokenizer, ids, *place, options) for place in places]
    mask = [0] * len(ids)
    # no `finish_reason` is needed: an answer that was cut has no end of turn among its ids
    for start, end in supervised(spans, None, first_answer(messages, spans, options), options):
        mask[start:end] = [1] * (end - start)

    return ids, mask


def said_row(
    tokenizer, prompt_ids: Callable[[list[dict]], list[int]], messages: list[dict], said: Said
) -> tuple[list[int], list[tuple[int, int] | None]]:
    """Return the token ids of a conversation up to its last answer with ids, and each answer's position among them.

    Args:
        tokenizer: the target's tokenizer.
        prompt_ids: returns the token ids of messages that wait for an answer.
        messages: messages as `to_messages` returns them.
        said: the generated tokens of all answers.

    Raises a `ValueError` if the conversation does not match its generated tokens: its prompt is rendered to different
    tokens, or an answer's text is not in its tokens.
    """
    places = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if len(places) != len(said.token_ids):
        raise ValueError(f"`{ANSWER_TOKEN_IDS}` has {len(said.token_ids)} entries for {len(places)} answers.")
    _check_text(tokenizer, [messages[place] for place in places], said)

    last = max(number for number, own in enumerate(said.token_ids) if own is not None)
    prompt = prompt_ids(messages[: places[last]])
    if len(prompt) != said.prompt_tokens[last]:
        raise ValueError(
            f"the prompt of its answer {last} has {len(prompt)} tokens here, but had {said.prompt_tokens[last]} when "
            "it was answered; render with the same `chat_template_kwargs`, chat template and tools, or leave out the "
            f"column `{ANSWER_TOKEN_IDS}`."
        )

    ids, spans = prompt + said.token_ids[last], []
    for number, (own, start) in enumerate(zip(said.token_ids, said.prompt_tokens, strict=True)):
        spans.append(None if own is None else (start, start + len(own)))
        if own is not None and ids[start : start + len(own)] != own:
            raise ValueError(
                f"its answer {number} is not rendered in the tokens that were generated; leave out the column "
                f"`{ANSWER_TOKEN_IDS}`, or put null there for this answer."
            )

    return ids, spans


def read_tokens(tokenizer, ids: list[int], opened: bool) -> SaidAnswer:
    """Parse an answer from its tokens; see `read_answer`."""
    raw = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return read_answer(raw, opened)


def token_parts(tokenizer, ids: list[int], opened: bool) -> tuple[int, int | None]:
    """Return the number of tokens in an answer's reasoning, and the index of its tool calls' first token, or `None`."""
    answer = read_tokens(tokenizer, ids, opened)

    def tokens(characters: int) -> int:
        """Return how many tokens hold so many characters, by bisection: every further token costs more to decode."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            text = tokenizer.decode(ids[:middle], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            low, high = (low, middle) if len(text.rstrip("\ufffd")) >= characters else (middle + 1, high)
        return low

    calls = None if answer.calls_start is None else tokens(answer.calls_start)
    return tokens(answer.thought_end), calls


def opens_thought(tokenizer, prompt: list[int]) -> bool:
    """Whether a prompt opens the reasoning."""
    return tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")


def _span(tokenizer, ids: list[int], start: int, end: int, options: MaskOptions) -> AnswerSpan:
    """Return the span of an answer in tokens; its parts are located only if the options leave some out."""
    if options.thoughts and options.tool_calls:
        return AnswerSpan(start, end, end)
    thoughts, calls = token_parts(tokenizer, ids[start:end], opens_thought(tokenizer, ids[:start]))
    return AnswerSpan(start, end, end, start + thoughts, None if calls is None else start + calls)


def _check_text(tokenizer, answers: list[dict], said: Said) -> None:
    """Raise if an answer's text is not in its tokens: they are from a different tokenizer, or the text was edited."""
    for number, (message, ids) in enumerate(zip(answers, said.token_ids, strict=True)):
        if ids is None:
            continue
        if not ids or max(ids) >= len(tokenizer):
            raise ValueError(
                f"`{ANSWER_TOKEN_IDS}` of answer {number} are no tokens of this target; leave out the column to "
                "train on the text."
            )

        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not all(line.strip() in text for line in message["content"].splitlines()):
            raise ValueError(
                f"`{ANSWER_TOKEN_IDS}` of answer {number} read {text[:100]!r}, but its text is "
                f"{message['content'][:100]!r}; leave out the column to train on the text."
            )


def _column(record: Mapping, name: str, where: str) -> list:
    found = record.get(name)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{where}: `{name}` is no JSON: {problem}.") from None

    if found is not None and not isinstance(found, list):
        raise ValueError(f"{where}: `{name}` must be a list with one entry per answer, got {found!r}.")
    return found or []


def _is_ids(found) -> bool:
    return isinstance(found, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in found)
