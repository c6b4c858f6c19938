"""One answer of the target: the tokens it generated, and the message that they are parsed into."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..data.rendering import ChatRenderer
from ..data.said import opens_thought, read_tokens
from ..door.json_files import check_fields


# the fields of an `Answer` in a journal; lists of token ids are long, so their items are not looked at
_FIELDS = {
    "message": {"content?": str | None, "reasoning_content?": str | None, "tool_calls?": list | None},
    "finish_reason": str,
    "token_ids?": list | None,
    "prompt_tokens?": int | None,
    "continues?": bool,
    "digest?": str | None,
}
START_OVER = "delete it to start over"  # what to do about a damaged journal


@dataclass(frozen=True)
class Answer:
    """The target's answer to one prompt.

    Args:
        message: `content`, with `reasoning_content` and `tool_calls` if the template renders them.
        finish_reason: the reason why it ended, one of `ENDED` or `CUT` of `data/spans.py`.
        token_ids: all of its tokens, including the one that ended it; `None` if a server does not report them.
        prompt_tokens: the number of tokens in its prompt.
        continues: whether the prompt repeats the previous answer token by token and continues from there.
        digest: hash of the tokens of prompt and answer.
    """

    message: dict
    finish_reason: str
    token_ids: list[int] | None = None
    prompt_tokens: int | None = None
    continues: bool = True
    digest: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the answer is blank, which does not count as an answer.

        Known tokens that were cut before their text began, such as the name of a channel, do count as an answer.
        """
        content, other = self.message.get("content") or "", ("reasoning_content", "tool_calls")
        began = self.token_ids and self.finish_reason == "length" and not content
        return not (content.strip() or began or any(self.message.get(name) for name in other))

    def as_row(self) -> dict:
        """Return the answer as a part of a journal row, which `read_answer` reads."""
        return asdict(self)


class AnswerReader:
    """Parses answers into messages of one tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        template_kwargs: extra keyword arguments for the template.
    """

    def __init__(self, tokenizer, template_kwargs: dict | None = None):
        self.tokenizer = tokenizer
        self.renderer = ChatRenderer(tokenizer, template_kwargs)
        self._knows_thoughts = bool(self.renderer.thought_names) or "</think>" in self.renderer.template

        added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = set(added) | set(tokenizer.all_special_ids)
        self._vocabulary = 1 + max(tokenizer.get_vocab().values())
        self._special = sorted({*added.values(), *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._ends = [token for token in self._special if token in self._after_an_answer()]

    def _after_an_answer(self) -> str:
        """Return the text that the template writes after an answer, up to the end of the next question."""
        chat = [{"role": role, "content": "x y z"} for role in ("user", "assistant", "user")]
        try:
            rendered = self.renderer.render(chat)
        except ValueError:  # a template that refuses such a chat
            rendered = ""
        return rendered.partition("x y z")[2].partition("x y z")[2] + (self.tokenizer.eos_token or "")

    def message(self, prompt: list[int], ids: list[int]) -> dict:
        """Return the message of an answer, parsed from its tokens without the one that ended it."""
        found = read_tokens(self.tokenizer, ids, opens_thought(self.tokenizer, prompt))
        lost = (found.thoughts and not self._knows_thoughts) or (found.calls and not self.renderer.writes_calls)
        if found.plain or lost:
            return {"content": self._plain(ids)}

        message = {"content": self._without_special(found.content)}
        if found.thoughts:
            message["reasoning_content"] = self._without_special(found.thoughts)
        if found.calls:
            message["tool_calls"] = found.calls

        if not _can_be_written(message):  # a call's JSON may spell a lone surrogate, which UTF-8 cannot encode
            return {"content": self._plain(ids)}
        return message

    def ends_within(self, text: str) -> str | None:
        """Describe the problem of a text that contains a token that ends a turn; `None` if it contains none.

        Training would read the rest as a new turn, or as an end that the target did not generate.
        """
        token = next((token for token in self._ends if token in text), None)
        return None if token is None else f"an answer whose text holds {token}, a special token that ends a turn"

    def unknown_id(self, ids: list[int]) -> int | None:
        """Return the first token id that the tokenizer does not have, or `None`."""
        return next((id for id in ids if not 0 <= id < self._vocabulary), None)

    def _plain(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _without_special(self, text: str) -> str:
        for token in self._special:
            text = text.replace(token, "")
        return text


def said_answer(
    message: dict, finish_reason: str, prompt: list[int], ids: list[int], before: Answer | None = None
) -> Answer:
    """Return an answer whose tokens are known; `before` is the previous answer in its prompt, if any."""
    continues = True
    if before is not None and before.digest is not None:
        continues = digest(prompt[: before.prompt_tokens + len(before.token_ids)]) == before.digest

    return Answer(message, finish_reason, ids, len(prompt), continues, digest(prompt + ids))


def read_answer(row: dict, journal: Path) -> Answer:
    """Return the `answer` of a journal's row; raise `ValueError` naming the journal if it has another form."""
    check_fields(row, {"answer": _FIELDS}, journal, START_OVER)
    unknown = row["answer"].keys() - Answer.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"{journal} holds the unknown field `{min(unknown)}` of an answer: {START_OVER}.")
    return Answer(**row["answer"])


def add_answer(answers: list[Answer | None], answer: Answer, turns: list) -> None:
    """Append an answer. The record ends (`None`) after an empty answer or a tool call, since tools are not run."""
    answers.append(answer)
    if (answer.is_empty or answer.message.get("tool_calls")) and len(answers) < len(turns):
        answers.append(None)


def _can_be_written(message: dict) -> bool:
    try:
        json.dumps(message, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def digest(ids: list[int]) -> str:
    """Return a short hash of token ids."""
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()[:16]
