"""Which characters of a rendered conversation are the assistant's answers, and which tokens those are.

Supervised are an answer's content and its end-of-turn token; not the header before it, not the newline after it. An
empty answer is not: there is nothing to draft in it.
"""

import re
from dataclasses import dataclass
from os.path import commonprefix

import numpy as np


_GENERATION = re.compile(r"\{%(-?)\s*generation\s*(-?)%\}")
_END_GENERATION = re.compile(r"\{%(-?)\s*endgeneration\s*(-?)%\}")
_THOUGHTS = re.compile(r"(.*</think>\s*)?(.*)", re.DOTALL)
_THINK = "<think>"
_KINDS = ("opening", "thought", "closing")


@dataclass(frozen=True)
class AnswerSpan:
    """Characters `start:end` of the rendered text are one answer; without its end of turn it ends at `content_end`."""

    start: int
    content_end: int
    end: int


class ConversationEncoder:
    """Token ids and loss mask of conversations, by one tokenizer and its chat template.

    The template is rendered twice: as it is, and with unused characters around every answer or, when the template has
    `{% generation %}` marks, around what those enclose. Taken out again they leave the plain text, so their places are
    exact whatever the messages say. Offsets carry the places to tokens. All of it is linear in the length.

    Raises a `ValueError` when the tokenizer has no chat template, or one that refuses a question with its answer.
    """

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "`tokenizer` has no chat template; take the one of an instruction-tuned target, or set "
                "`tokenizer.chat_template`."
            )
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template()
        self.has_marks = bool(_GENERATION.search(self.template))
        added = tokenizer.added_tokens_decoder
        self.special_ids = set(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self._special_texts = tuple(sorted(special, key=len, reverse=True))
        self._special = re.compile("|".join(map(re.escape, self._special_texts)) or r"(?!)")
        self._turn_end = re.compile(rf"\s*(?:{self._special.pattern})")
        self.header, self.tail, self._ends_turns = self._read_template()

    def encode(self, conversations: list[list[dict]], finish_reasons=None, indices=None) -> list[tuple[list, list]]:
        """`(input_ids, loss_mask)` of each conversation, ids as `apply_chat_template` gives them.

        Args:
            conversations: messages, as `to_messages` returns them.
            finish_reasons: per conversation `None` or, per answer, why it ended; the end-of-turn token that the
                template puts after an answer cut at `"length"` is not the target's and is not supervised.
            indices: numbers of the records, for error messages.

        Raises a `ValueError` when the template refuses a conversation or rewrites an answer past recognition.
        """
        texts, spans = [], []
        for place, messages in enumerate(conversations):
            try:
                text, answers = self.answer_spans(messages)
            except Exception as problem:  # jinja's own errors, and whatever a template raises by itself
                where = "The conversation" if indices is None else f"Record {indices[place]}"
                raise ValueError(f"{where} does not fit the chat template of `tokenizer`: {problem}") from problem
            texts.append(text)
            spans.append(_supervised(answers, finish_reasons[place] if finish_reasons else None))

        if not self.tokenizer.is_fast:  # no offsets; slower, since the prefixes are tokenised too
            return [self._mask_by_prefixes(text, found) for text, found in zip(texts, spans, strict=True)]
        batch = self.tokenise(texts, return_offsets_mapping=True)
        return [
            (ids, _mask_by_offsets(offsets, found))
            for ids, offsets, found in zip(batch["input_ids"], batch["offset_mapping"], spans, strict=True)
        ]

    def answer_spans(self, messages: list[dict]) -> tuple[str, list[AnswerSpan | None]]:
        """The rendered text and the span of each answer in it, `None` for an empty or left out one."""
        text = self.render(messages)
        marks = _unused_characters(text, self.template, *(message["content"] for message in messages))
        if self.has_marks:
            marked = self.render(messages, chat_template=_mark_template(self.template, marks))
        else:
            marked = self.render(_mark_answers(messages, marks))
        plain, places = _take_out(marked, marks)
        if plain != text:
            raise ValueError(
                "it does not leave the answers as they are, so their places cannot be found; put "
                "`{% generation %}` and `{% endgeneration %}` around them in the template."
            )
        if self.has_marks:
            return text, self._enclosed(text, places)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        return text, self._found(text, places, answers)

    def render(self, messages: list[dict], **kwargs) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    def token_ids(self, messages: list[dict], **kwargs) -> list[int]:
        """As `apply_chat_template(messages, tokenize=True)`."""
        return self.tokenise([self.render(messages, **kwargs)])["input_ids"][0]

    def tokenise(self, texts: list[str], **kwargs):
        return self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False, **kwargs)

    def _read_template(self) -> tuple[str, str, bool]:
        """The header that opens an answer, what follows one's end of turn, and whether that is a special token."""
        user = {"role": "user", "content": "a"}
        marks = _unused_characters(self.template)
        try:
            without, opened = (self.render([user], add_generation_prompt=flag) for flag in (False, True))
            answered = self.render(_mark_answers([user, {"role": "assistant", "content": "b"}], marks))
        except Exception as problem:
            raise ValueError(
                f"The chat template of `tokenizer` refuses a question with its answer: {problem}"
            ) from None
        shared = len(commonprefix([without, opened]))
        # "<|endoftext|>" and "<|assistant|>" share two characters, which belong to the header all the same
        inside = [found.start() for found in self._special.finditer(opened) if found.start() < shared < found.end()]
        plain, places = _take_out(answered, marks)
        header = opened[inside[0] if inside else shared :]
        content_end = places["closing"][-1][1] if places["closing"] else len(plain)
        turn_end = self._turn_end.match(plain, content_end)
        return header, plain[turn_end.end() if turn_end else content_end :], bool(turn_end)

    def _found(self, text: str, places: dict, answers: list[int]) -> list[AnswerSpan | None]:
        """Spans where the answers' contents were marked: each begins after its header."""
        opens, thoughts, closes = (dict(places[kind]) for kind in _KINDS)
        spans, floor = [], 0
        for number in answers:
            if number not in closes:
                spans.append(None)
                continue
            content_end = closes[number]
            # the opening mark is gone where a template takes the thoughts of an answer out, or writes them anew
            limit = opens.get(number, thoughts.get(number, content_end))
            start, choices = self._after_header(text, floor, limit, content_end)
            if number not in opens and choices != 1:
                raise ValueError(
                    "where an answer begins cannot be told; mark it with `{% generation %}` in the template."
                )
            turn_end = self._turn_end.match(text, content_end) if self._ends_turns else None
            floor = turn_end.end() if turn_end else content_end
            spans.append(AnswerSpan(start, content_end, floor))
        return spans

    def _after_header(self, text: str, floor: int, limit: int, content_end: int) -> tuple[int, int]:
        """Where the header before `limit` ends, and how many there are; an earlier one is text of a message.

        A header may open a thought ("<think>"), which is not there in answers of the past.
        """
        for header in dict.fromkeys((self.header, self.header.split(_THINK)[0])):
            place = text.rfind(header, floor, limit) if header else -1
            if place >= 0:
                place += len(header)
                thought = commonprefix([self.header[len(header) :], text[place:content_end]])
                count = text.count(header, floor, limit)
                return place + (len(thought) if thought.startswith(_THINK) else 0), count
        return limit, 0

    def _enclosed(self, text: str, places: dict) -> list[AnswerSpan | None]:
        """Spans from `{% generation %}` marks, which often enclose part of the header, or a newline after the end."""
        blocks = []
        for (_, start), (_, end) in zip(places["opening"], places["closing"], strict=True):
            if blocks and blocks[-1][1] == start:  # one answer in two blocks
                start = blocks.pop()[0]
            blocks.append((start, end))

        spans = []
        for start, end in blocks:
            before = next(n for n in range(len(self.header), -1, -1) if text.startswith(self.header[:n], start - n))
            start += len(commonprefix([self.header[before:], text[start:end]]))
            content_end = end
            while (content := text[start:content_end].rstrip()).endswith(self._special_texts):
                end = start + len(content)
                content_end = end - len(next(token for token in self._special_texts if content.endswith(token)))
            spans.append(AnswerSpan(start, content_end, end) if text[start:content_end].strip() else None)
        return spans

    def _mask_by_prefixes(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        ids = self.tokenise([text])["input_ids"][0]
        mask = [0] * len(ids)
        for span in spans:
            start, end = (shared_length(self.tokenise([text[:cut]])["input_ids"][0], ids) for cut in span)
            mask[start:end] = [1] * (end - start)
        return ids, mask


def shared_length(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _supervised(spans: list[AnswerSpan | None], reasons: list[str] | None) -> list[tuple[int, int]]:
    cut = [reason == "length" for reason in reasons or []] + [False] * len(spans)
    return [(s.start, s.content_end if c else s.end) for s, c in zip(spans, cut, strict=False) if s is not None]


def _mask_by_offsets(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """A token belongs to the span that it ends in: one that straddles a header's end is the answer's first."""
    mask = np.zeros(len(offsets), dtype=np.int8)
    ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 1]
    for first, last in np.searchsorted(ends, np.asarray(spans, dtype=np.int64).reshape(-1, 2), side="right"):
        mask[first:last] = 1
    return mask.tolist()


def _unused_characters(*texts: str) -> dict[str, str]:
    """A character of the private use area for each kind of mark, none of which occurs in a text."""
    free = (chr(code) for code in range(0xE000, 0xF900) if not any(chr(code) in text for text in texts))
    return {kind: next(free) for kind in _KINDS}


def _mark_answers(messages: list[dict], marks: dict[str, str]) -> list[dict]:
    """Marks go inside the surrounding white space, so that a template which strips it gives the same text with them."""
    opening, thought, closing = (marks[kind] + "{}" + marks[kind] for kind in _KINDS)
    marked = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"].strip():
            content = message["content"]
            before, after = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
            thoughts, said = _THOUGHTS.fullmatch(content.strip()).groups()
            thoughts = thoughts + thought.format(number) if thoughts else ""
            content = opening.format(number) + thoughts + said + closing.format(number)
            message = {**message, "content": before + content + after}
        marked.append(message)
    return marked


def _mark_template(template: str, marks: dict[str, str]) -> str:
    """`{% generation %}` blocks as `with` blocks (the same scope) that write the marks out."""
    template = _GENERATION.sub(rf"{{%\1 with %}}{marks['opening'] * 2}{{% if true \2%}}", template)
    return _END_GENERATION.sub(rf"{{%\1 endif %}}{marks['closing'] * 2}{{% endwith \2%}}", template)


def _take_out(marked: str, marks: dict[str, str]) -> tuple[str, dict[str, list[tuple[int, int]]]]:
    """The text without marks, and of each kind of mark the `(number, place)` of all."""
    kinds = {character: kind for kind, character in marks.items()}
    pieces, places, last, taken = [], {kind: [] for kind in marks}, 0, 0
    for mark in re.finditer(rf"([{''.join(kinds)}])(\d*)\1", marked):
        pieces.append(marked[last : mark.start()])
        places[kinds[mark[1]]].append((int(mark[2] or 0), mark.start() - taken))
        last, taken = mark.end(), taken + len(mark[0])
    return "".join(pieces) + marked[last:], places
