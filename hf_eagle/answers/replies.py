"""Check a server's replies once: types, ranges, and text that can be written. The rest of the code trusts them."""

import json
import re
from dataclasses import dataclass
from typing import Any

from ..data.spans import CUT, ENDED
from ..door.json_files import check_fields


_HIGHEST = 2**31 - 1  # of counts and token ids; the target's tokenizer has a stricter limit
_GIVEN_UP = ("abort", "cancelled", "error", "timeout")  # the server gave up: the next attempt may be complete
_SURROGATE = re.compile("[\ud800-\udfff]")


class Unreadable(ValueError):
    """A reply that does not have the form that its path promises; the next reply may be valid."""


class Unusable(ValueError):
    """A reply of the right form that cannot be trained on; the same prompt would return it again."""


class SplitThoughts(ValueError):
    """The server separates the target's reasoning from its answers, and does not report token ids."""


@dataclass(frozen=True)
class ServedModel:
    """A model as `/v1/models` lists it; vLLM and SGLang also report its `root`, a folder or Hub id, and its length."""

    id: str
    root: str | None = None
    max_model_len: int | None = None


@dataclass(frozen=True)
class ChatAnswer:
    """A server's answer; counts and token ids are `None` if it does not report them.

    If there are `token_ids`, only they are complete: the text may lack reasoning or tool calls.
    """

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    prompt_ids: list[int] | None = None
    token_ids: list[int] | None = None


def read_reply(content: bytes) -> dict:
    """Return a reply as the JSON object that it must be."""
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError):
        raise Unreadable("no JSON") from None
    if not isinstance(reply, dict):
        raise Unreadable("no JSON object")
    return reply


def read_models(reply: dict) -> list[ServedModel]:
    """Return all models that a server lists."""
    _check(reply, {"data": [{"id": str, "root?": str | None}]})
    listed = []
    for model in reply["data"]:
        _check_text(model["id"], model.get("root") or "")
        listed.append(ServedModel(model["id"], model.get("root"), _count(model.get("max_model_len"))))
    return listed


def read_tokens_of(reply: dict) -> list[int]:
    """Return the token ids in a reply of `/tokenize`."""
    return _ids(reply.get("tokens"))


def read_chat(reply: dict) -> ChatAnswer:
    """Return the first answer of a chat completion."""
    message = {"content": str | None, "reasoning_content?": object, "reasoning?": object}
    _check(reply, {"choices": [{"message": message}]})
    message = _first(reply)["message"]

    answer = _answer(reply, message["content"] or "")
    if answer.token_ids is None and (message.get("reasoning_content") or message.get("reasoning")):
        raise SplitThoughts(
            "The server separates the target's reasoning from its answers; start it without its reasoning parser, "
            "since a draft must learn everything that the target generates."
        )
    return answer


def read_continuation(reply: dict) -> ChatAnswer:
    """Return the first answer of a plain completion."""
    _check(reply, {"choices": [{"text": str}]})
    return _answer(reply, _first(reply)["text"])


def said(content: bytes) -> str:
    """Return the server's explanation of an error, in OpenAI's form or FastAPI's, else the beginning of the text."""
    try:
        reply = json.loads(content)
        error = reply.get("error", reply)
        found = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        return str(found or content.decode())[:300]
    except (ValueError, AttributeError, RecursionError):
        return content[:300].decode(errors="replace").strip() or "no explanation"


def _answer(reply: dict, text: str) -> ChatAnswer:
    """Return the text of a reply with its token ids and counts, for a chat or a plain completion."""
    choice, usage = _first(reply), reply.get("usage")
    usage = usage if isinstance(usage, dict) else {}

    reason = choice.get("finish_reason")
    if reason in _GIVEN_UP or not isinstance(reason, str):
        raise Unreadable("no `finish_reason` of a whole answer")
    if reason.lower() not in (*ENDED, *CUT):  # training would not know whether the answer is complete
        raise Unreadable("a `finish_reason` that is not known")
    _check_text(text)

    # a chat has the prompt's ids next to the choices, a plain completion has them inside
    prompt_ids, ids = (reply.get("prompt_token_ids") or choice.get("prompt_token_ids")), choice.get("token_ids")
    told = (None, None) if prompt_ids is None or ids is None else (_ids(prompt_ids), _ids(ids))
    return ChatAnswer(text, reason, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")), *told)


def _first(reply: dict) -> dict:
    if not reply["choices"]:
        raise Unreadable("no choices")
    return reply["choices"][0]


def _check(reply: dict, fields: dict) -> None:
    try:
        check_fields(reply, fields, "it")
    except ValueError as problem:
        raise Unreadable(str(problem).removeprefix("it ").partition(": ")[0]) from None


def _check_text(*texts: str) -> None:
    for text in texts:
        if _SURROGATE.search(text):
            raise Unusable("half a character (a lone surrogate), which no file and no tokenizer takes")


def _count(found: Any) -> int | None:
    """Return a number of tokens; anything else becomes `None`, since only logs depend on it."""
    whole = isinstance(found, int) and not isinstance(found, bool)
    return found if whole and 0 <= found <= _HIGHEST else None


def _ids(found: Any) -> list[int]:
    if not isinstance(found, list) or not all(type(id) is int and 0 <= id <= _HIGHEST for id in found):
        raise Unreadable("invalid token ids")
    return found
