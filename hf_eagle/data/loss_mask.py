"""Find the assistant's answers in a rendered conversation: their characters, and then their tokens.

An answer's content is supervised with its reasoning and tool calls, and its end-of-turn token. The header before it and
the newline after it are not, and neither is an empty answer: there is nothing to draft in it.
"""

import re
from bisect import bisect_right
from dataclasses import replace
from os.path import commonprefix

from .marks import GENERATION, Places, count_call_marks, mark_messages, mark_template, take_out, unused_characters
from .messages import TEXT, text_of
from .rendering import PROBED_CALL, ChatRenderer
from .said import Said, encode_said, read_reasons
from .spans import AnswerSpan, MaskOptions, first_answer, supervised
from .token_mask import mask_by_offsets, mask_by_pieces


_THINK = "<think>"
_END_OF_THOUGHTS = re.compile(r"\s*</think>\s*")
_NO_THOUGHTS = re.compile(r"\s*<think>\s*</think>\s*")


class ConversationEncoder:
    """Token ids and loss masks of conversations, by one tokenizer and its chat template.

    The template is rendered twice: unchanged, and with unused characters, the marks, around the parts of every answer.
    If the template has `{% generation %}` blocks, the marks stand around these. Without the marks, the second text
    equals the first, so their positions are exact whatever the messages say. Offsets map the positions to tokens. All
    of it is linear in the length.

    Args:
        tokenizer: a tokenizer with a chat template.
        options: which parts of the answers are supervised.
        template_kwargs: extra keyword arguments for the template, such as `{"enable_thinking": False}`.

    Raises a `ValueError` if the tokenizer has no chat template, or its template refuses a question with its answer.
    """

    def __init__(self, tokenizer, options: MaskOptions | None = None, template_kwargs: dict | None = None):
        self.renderer = ChatRenderer(tokenizer, template_kwargs)
        self.render = self.renderer.render
        self.tokenizer, self.template = tokenizer, self.renderer.template
        self.options = options or MaskOptions()
        self.has_marks = bool(GENERATION.search(self.template))
        added = tokenizer.added_tokens_decoder
        self.special_ids = set(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self._special_texts = tuple(sorted(special, key=len, reverse=True))
        self.special = re.compile("|".join(map(re.escape, self._special_texts)) or r"(?!)")
        self._turn_end = re.compile(rf"\s*({self.special.pattern})")
        self._read_template()
        self._before_call = self._call_end = ""
        if self.renderer.writes_calls:
            self._read_calls()

    def encode(
        self, conversations: list[list[dict]], finish_reasons=None, indices=None, tools=None, options=None, said=None
    ) -> list[tuple[list, list]]:
        """Return `(input_ids, loss_mask)` of each conversation; ids are those of `apply_chat_template`.

        Args:
            conversations: messages, as `to_messages` returns them.
            finish_reasons: per conversation `None` or, per answer, why it ended (a single text: the last answer). The
                target did not generate the end-of-turn token that the template puts after an answer cut at `"length"`,
                so it is not supervised.
            indices: numbers of the records, for errors.
            tools: per conversation `None` or the JSON schemas of the tools offered.
            options: options that replace the encoder's.
            said: per conversation `None` or its `Said`: then its row is the prompt's ids followed by the generated ids,
                and ends with the last answer.

        Raises a `ValueError` if the template refuses a conversation or rewrites an answer so that it cannot be found,
        or if a conversation does not match its `Said`.
        """
        if said is not None and any(said):
            given = [finish_reasons, indices, tools, said]
            rows = zip(conversations, *(column or [None] * len(conversations) for column in given), strict=True)
            return [self._encode_one(*row, options) for row in rows]

        texts, spans = self.supervised_spans(conversations, finish_reasons, indices, tools, options)
        if not self.tokenizer.is_fast:
            return [mask_by_pieces(self._tokens, self.special, *pair) for pair in zip(texts, spans, strict=True)]
        batch = self.tokenise(texts, return_offsets_mapping=True)
        return [
            (ids, mask_by_offsets(offsets, found))
            for ids, offsets, found in zip(batch["input_ids"], batch["offset_mapping"], spans, strict=True)
        ]

    def _encode_one(self, messages, reasons, index, tools, said: Said | None, options) -> tuple[list, list]:
        """Return ids and mask of one conversation, with the generated tokens if they are known."""
        where = None if index is None else [index]
        if said is None:
            return self.encode([messages], [reasons], where, [tools], options)[0]

        def prompt_ids(prompt: list[dict]) -> list[int]:
            return self.token_ids(prompt, tools, add_generation_prompt=True)

        return encode_said(self.tokenizer, prompt_ids, messages, said, options or self.options, _name(where, 0))

    def supervised_spans(
        self, conversations, finish_reasons=None, indices=None, tools=None, options: MaskOptions | None = None
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """Return the rendered conversations and the supervised characters of each; arguments as for `encode`."""
        options = options or self.options
        texts, spans = [], []
        for place, messages in enumerate(conversations):
            if messages[0]["role"] == TEXT:
                text, found = self._document(messages)
            else:
                try:
                    text, answers = self.answer_spans(messages, tools and tools[place], options)
                except Exception as problem:  # jinja's errors, and whatever a template itself raises
                    where = _name(indices, place)
                    raise ValueError(f"{where} does not fit the chat template of `tokenizer`: {problem}") from problem

                number = sum(message["role"] == "assistant" for message in messages)
                reasons = read_reasons(finish_reasons and finish_reasons[place], number, _name(indices, place))
                found = supervised(answers, reasons, first_answer(messages, answers, options), options)
            texts.append(text)
            spans.append(found)
        return texts, spans

    def answer_spans(
        self, messages: list[dict], tools=None, options: MaskOptions | None = None
    ) -> tuple[str, list[AnswerSpan | None]]:
        """Return the rendered text and the span of each answer in it; `None` for an answer that is empty or left out.

        With `{% generation %}` marks and without options, the spans are the marked blocks, however many there are.
        """
        messages = self.renderer.fold_calls(messages)
        text = self.render(messages, tools)
        marks = unused_characters(text, self.template, *(text_of(message["content"]) for message in messages))

        if not self.has_marks:
            return text, self._found(text, self._places(text, marks, messages, tools), messages)

        template = mark_template(self.template, marks)
        plain, places = take_out(self.render(messages, tools, chat_template=template), marks)
        blocks = self._enclosed(text, places) if plain == text else _not_as_they_are()

        if options in (None, MaskOptions()) or not any(block is not None for block in blocks):
            return text, blocks
        return text, self._aligned(text, blocks, self._places(text, marks, messages, tools), messages)

    def token_ids(self, messages: list[dict], tools=None, **kwargs) -> list[int]:
        """Return the ids of `apply_chat_template(messages, tokenize=True)`."""
        return self._tokens(self.render(messages, tools, **kwargs))

    def tokenise(self, texts: list[str], **kwargs):
        kwargs = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False, **kwargs}
        return self.tokenizer(texts, add_special_tokens=False, **kwargs)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenise([text])["input_ids"][0]

    def _read_template(self) -> None:
        """Find the header that opens an answer, its end of turn if that is a special token, and what follows."""
        user = {"role": "user", "content": "a"}
        marks = unused_characters(self.template)

        try:
            without, opened = (self.render([user], add_generation_prompt=flag) for flag in (False, True))
            answered = self.render(mark_messages([user, {"role": "assistant", "content": "b"}], marks, others=False))
        except Exception as problem:
            raise ValueError(
                f"The chat template of `target`'s tokenizer refuses a question with its answer: {problem}"
            ) from None

        shared = len(commonprefix([without, opened]))
        # "<|endoftext|>" and "<|assistant|>" begin with the same characters, which still belong to the header
        inside = [found.start() for found in self.special.finditer(opened) if found.start() < shared < found.end()]

        plain, places = take_out(answered, marks)
        self._prompt = opened
        self.header = opened[inside[0] if inside else shared :]

        content_end = places["closing"][1][-1] if places["closing"] else len(plain)
        turn_end = self._turn_end.match(plain, content_end)
        self._end_text = turn_end[1] if turn_end else ""
        self.tail = plain[turn_end.end() if turn_end else content_end :]

    def _read_calls(self) -> None:
        """Find what the template writes before a first tool call's name, and the token that ends a turn of calls."""
        marks = unused_characters(self.template)
        try:
            text, places = take_out(self.render(mark_messages(PROBED_CALL, marks, others=False)), marks)
        except Exception:  # reported once a conversation with calls comes
            return

        places = places["call"][1]
        begin = len(commonprefix([self._prompt, text]))
        self._before_call = text[begin : places[0]] if places else ""

        specials = self.special.findall(text.removesuffix(self.tail), places[-1]) if places else []
        self._call_end = specials[-1] if specials else ""

    def _places(self, text: str, marks: dict[str, str], messages: list[dict], tools) -> Places:
        """Return the positions of the parts of all messages in the text."""
        for others in (True, False):  # a template may depend on how a question ends
            plain, places = take_out(self.render(mark_messages(messages, marks, others), tools), marks)
            if plain == text:
                return places
        _not_as_they_are()

    def _found(self, text: str, places: Places, messages: list[dict]) -> list[AnswerSpan | None]:
        """Return the spans of answers whose parts are marked: each begins after its header."""
        spans, floor = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                floor = max([floor, *places["other"].get(number, ())])
                continue

            first = min((place for kind in places.values() for place in kind.get(number, ())), default=None)
            if first is None:
                spans.append(None)
                continue

            content_end, end = self._end(text, number, places, message)
            start, choices = self._after_header(text, floor, first, content_end)

            # the opening mark is lost if a template leaves out or rewrites the reasoning of an answer
            opened = any(number in places[kind] for kind in ("opening", "thinking", "call"))
            if not opened and choices > 1:
                raise ValueError(
                    "where an answer begins cannot be found; mark it with `{% generation %}` in the template."
                )

            if not choices:
                start -= len(self._own_beginning(text, floor, first, number, places, message))
            spans.append(self._with_parts(text, AnswerSpan(start, content_end, end), number, places))
            floor = end
        return spans

    def _own_beginning(self, text: str, floor: int, first: int, number: int, places: Places, message: dict) -> str:
        """Return the text before the first mark of an answer without a header: a call's opening, or white space."""
        if first in places["call"].get(number, ())[:1]:
            said = self._before_call
        else:
            field = "content" if first in places["opening"].get(number, ()) else "reasoning_content"
            said = message.get(field, "")
            said = said[: len(said) - len(said.lstrip())]
        return said if text.endswith(said, floor, first) else ""

    def _end(self, text: str, number: int, places: Places, message: dict) -> tuple[int, int]:
        """Return the end of an answer's text, and the end of its turn."""
        # a tool's result may repeat the name of the call, together with its marks
        calls = places["call"].get(number, ())[: count_call_marks(message)]
        content = places["closing"].get(number)
        if not calls and content:
            turn_end = self._turn_end.match(text, content[0]) if self._end_text else None
            return content[0], turn_end.end() if turn_end else content[0]

        last = calls[-1] if calls else max(place for kind in places.values() for place in kind.get(number, ()))
        wanted = self._call_end if calls else self._end_text
        place = text.find(wanted, last) if wanted else -1
        return (place, place + len(wanted)) if place >= 0 else (last, last)

    def _with_parts(self, text: str, span: AnswerSpan, number: int, places: Places) -> AnswerSpan:
        """Return the span with the end of its reasoning and the start of its tool calls."""
        thought = places["said"].get(number) or places["thought"].get(number)
        if thought:
            # reasoning ends with its closing tag, or with its message (gpt-oss)
            after = _END_OF_THOUGHTS.match(text, thought[0])
            after = after or (self._turn_end.match(text, thought[0]) if number in places["thought"] else None)
            thought_end = after.end() if after else thought[0]
        else:
            none = _NO_THOUGHTS.match(text, span.start, span.end)
            thought_end = none.end() if none else span.start

        calls_start = None
        if places["call"].get(number):
            said = [place for place in places["closing"].get(number, ()) if place <= places["call"][number][0]]
            calls_start = max([thought_end, *said[-1:]])
        return replace(span, thought_end=min(thought_end, span.end), calls_start=calls_start)

    def _aligned(self, text: str, blocks: list, places: Places, messages: list[dict]) -> list[AnswerSpan | None]:
        """Return per answer the span of the `{% generation %}` block that contains its marks, if any."""
        blocks = [block for block in blocks if block is not None]
        starts, spans = [block.start for block in blocks], []
        for number in (number for number, message in enumerate(messages) if message["role"] == "assistant"):
            own = sorted(place for kind in places.values() for place in kind.get(number, ()))
            inside = (bisect_right(starts, place) - 1 for place in own)
            block = next((blocks[n] for n, p in zip(inside, own, strict=True) if n >= 0 and p <= blocks[n].end), None)
            spans.append(block and self._with_parts(text, block, number, places))
        return spans

    def _document(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """Return a plain text, all supervised; if it is a rendered chat, only the text after headers of answers is."""
        text = "\n\n".join(message["content"] for message in messages)
        if self.header.strip() and self._end_text and self.header in text:
            spans, place = [], text.find(self.header)
            while place >= 0:
                start = place + len(self.header)
                end = text.find(self._end_text, start)
                end = len(text) if end < 0 else end + len(self._end_text)
                spans.append((start, end))
                place = text.find(self.header, end)
            return text, spans

        bos = self.tokenizer.bos_token or ""
        starts_so = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        before = bos if starts_so and not text.startswith(bos) else ""
        text = before + text + (self.tokenizer.eos_token or "")
        return text, [(len(before), len(text))]

    def _after_header(self, text: str, floor: int, limit: int, content_end: int) -> tuple[int, int]:
        """Return the end of the header before `limit`, and the number of headers; earlier ones are part of a message.

        A header may open the reasoning ("<think>"), which past answers do not have.
        """
        for header in dict.fromkeys((self.header, self.header.split(_THINK)[0])):
            place = text.rfind(header, floor, limit) if header else -1
            if place >= 0:
                place += len(header)
                thought = commonprefix([self.header[len(header) :], text[place:content_end]])
                count = text.count(header, floor, limit)
                return place + (len(thought) if thought.startswith(_THINK) else 0), count
        return limit, 0

    def _enclosed(self, text: str, places: Places) -> list[AnswerSpan | None]:
        """Return spans of `{% generation %}` blocks, which often contain part of the header or a newline at the end."""
        blocks = []
        for start, end in zip(places["opening"][0], places["closing"][0], strict=True):
            if blocks and blocks[-1][1] == start:  # two blocks of one answer
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


def _not_as_they_are():
    raise ValueError(
        "it changes the text of answers, so their positions cannot be found; put `{% generation %}` and "
        "`{% endgeneration %}` around them in the template."
    )


def _name(indices: list[int] | None, place: int) -> str:
    return "The conversation" if indices is None else f"Record {indices[place]}"
