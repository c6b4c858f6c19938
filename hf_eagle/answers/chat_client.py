"""Ask an OpenAI-compatible server (vLLM, SGLang); decide which failures are retried, or end a prompt or the run.

Each thread has its own client. All requests of hf_eagle to servers go through `Connection`.
"""

import http.client
import json
import random
import threading
from collections.abc import Callable

from ..door.connection import Address, Connection, Reply, ReplyTooLarge, read_key
from .replies import (
    ChatAnswer,
    ServedModel,
    SplitThoughts,
    Unreadable,
    Unusable,
    read_chat,
    read_continuation,
    read_models,
    read_reply,
    read_tokens_of,
    said,
)


FIRST_DELAY = 0.5  # seconds before the second attempt; each further attempt waits twice as long
LONGEST_DELAY = 30.0  # the longest delay, unless the server asks for a longer one
LONGEST_WAIT = 300.0  # the longest delay that a server may ask for
MOST_RETRIES = 1000
LONGEST_TIMEOUT = 86400.0

_PASSING = {408, 425, 429, *range(500, 600)} - {501, 505}  # statuses that may differ at the next attempt
_REFUSED = {400, 413, 415, 422}  # statuses about this request's content
_TOO_LONG = ("context length", "context_length", "maximum model length", "max_model_len")
_ADVICE = {
    401: "give the server's key in the environment variable OPENAI_API_KEY",
    403: "give a key that may use it in the environment variable OPENAI_API_KEY",
    404: "`server_url` must be the address before `/v1/chat/completions`",
    405: "`server_url` must be the address before `/v1/chat/completions`",
    **dict.fromkeys(range(300, 400), "redirects are not followed, so set `server_url` to the address it leads to"),
}


class ServerError(ValueError):
    """An error that a retry would not solve: the run ends with this sentence."""


class Unavailable(ServerError):
    """Every attempt failed. `busy`: the last one failed because the server was overloaded."""

    def __init__(self, text: str, busy: bool):
        super().__init__(text)
        self.busy = busy


class Refused(ServerError):
    """The server rejects this one prompt."""


class TooLong(Refused):
    """The prompt and its answer do not fit the server's context length."""


class Broken(Refused):
    """The server's answer to this one prompt cannot be trained on."""


class Aborted(Exception):
    """The run ended while this request was in flight."""


class _Passing(Exception):
    """One attempt failed, but the next one may succeed. `wait`: seconds that the server asks for."""

    def __init__(self, text: str, status: int | None = None, wait: float = 0.0):
        super().__init__(text)
        self.status, self.wait = status, wait


class ChatClient:
    """Sends one request at a time over a connection that is kept open.

    Args:
        url (`str`): address of the server, with or without `/v1`. A user and password in it replace the key.
        api_key (`str`, *optional*): sent as a bearer token.
        timeout (`float`, *optional*, defaults to 600.0): timeout of one request in seconds, up to its last byte.
        retries (`int`, *optional*, defaults to 12): maximum number of retries; each waits twice as long (jittered).
        stop (`threading.Event`, *optional*): once set, waiting ends with `Aborted`.

    A request is retried if the connection fails or is dropped, if it times out, if the reply is not a chat answer, or
    for the statuses 408, 425, 429 and 5xx, unless the server asks to wait for more than five minutes. 400, 413, 415
    and 422 raise `Refused`. An answer above 64 MiB, or one that cannot be trained on, raises `Broken`. Every other
    status raises a `ServerError`.

    Raises a `ValueError` for an invalid address, key, timeout or number of retries.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 12,
        stop: threading.Event | None = None,
    ):
        if not 0 < timeout <= LONGEST_TIMEOUT:
            raise ValueError(
                f"`request_timeout` must be above 0 seconds and at most {LONGEST_TIMEOUT:g}, a day, got {timeout}."
            )
        if not 0 <= retries <= MOST_RETRIES:
            raise ValueError(f"`retries` must be 0 or more, and at most {MOST_RETRIES}, got {retries}.")

        address = Address.read(url)
        self.url, self.retries = address.shown, retries
        self._connection = Connection(address, read_key(api_key), timeout)
        self._stop = stop or threading.Event()

    def models(self) -> list[ServedModel]:
        """Return the models that the server lists."""
        return self._ask("GET", "/v1/models", None, read_models)

    def chat(self, body: dict, retries: int | None = None) -> ChatAnswer:
        """Return the answer to one chat completion request; `retries` overrides the client's."""
        return self._ask("POST", "/v1/chat/completions", body, read_chat, retries)

    def complete(self, body: dict) -> ChatAnswer:
        """Return the continuation of one prompt, to which no chat template is applied."""
        return self._ask("POST", "/v1/completions", body, read_continuation)

    def prompt_ids(self, body: dict) -> list[int] | None:
        """Return the token ids of a chat request's prompt; `None` if the server does not report them (vLLM does)."""
        known = {key: body[key] for key in ("model", "messages", "tools", "chat_template_kwargs") if key in body}
        try:
            return self._ask("POST", "/tokenize", known, read_tokens_of, 0)
        except ServerError:
            return None

    def printable(self, text: str) -> str:
        """Return a text of the server as an error may show it: short, on one line, and without the secrets sent."""
        return self._connection.hide(text[:1000])

    def close(self) -> None:
        self._connection.close()

    def abort(self) -> None:
        """End the request in flight, which the server then drops. Other threads call this."""
        self._connection.abort()

    def _ask(self, method: str, path: str, body: dict | None, read: Callable, retries: int | None = None):
        retries = self.retries if retries is None else retries
        payload = None if body is None else json.dumps(body).encode()

        for attempt in range(retries + 1):
            try:
                return self._attempt(method, path, payload, read)
            except _Passing as problem:
                failure = problem

            if failure.wait > LONGEST_WAIT:
                raise Unavailable(
                    f"The server at {self.url} asks to wait {failure.wait:g} seconds ({failure}), but "
                    f"the longest wait is {LONGEST_WAIT:g}. What was answered is kept; run the same again when the "
                    "server has time.",
                    busy=True,
                )
            if attempt < retries:
                delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(attempt, 16)) * random.uniform(0.5, 1.0)
                self._stop.wait(max(delay, failure.wait))
            if self._stop.is_set():
                raise Aborted

        busy = failure.status == 429
        raise Unavailable(
            f"The server at {self.url} failed {retries + 1} times in a row, the last time with: {failure}. What was "
            f"answered is kept; check the server{' or lower `concurrency`' if busy else ''}, then run the same again.",
            busy,
        )

    def _attempt(self, method: str, path: str, payload: bytes | None, read: Callable):
        reply = self._send(method, path, payload)
        if reply.status == 200:
            return self._read(reply, read)

        told = self._connection.hide(f"{reply.status} {reply.reason}: {said(reply.content)}")
        if reply.status in _PASSING:
            raise _Passing(told, reply.status, _seconds(reply.headers.get("Retry-After")))
        if reply.status in _REFUSED:
            kind = TooLong if any(mark in told.lower() for mark in _TOO_LONG) else Refused
            raise kind(f"the server at {self.url} refuses it with {told}")
        advice = _ADVICE.get(reply.status, "check the server")
        raise ServerError(f"The server at {self.url} answers {method} {path} with {told}; {advice}.")

    def _read(self, reply: Reply, read: Callable):
        """Return the content of a valid reply; raise the error that belongs to each kind of invalid reply."""
        try:
            found = read(read_reply(reply.content))
            if self._connection.repeats_secret(f"{reply.content.decode(errors='replace')} {found}"):
                raise Unusable("the key that it was asked with")
            return found
        except Unreadable as problem:
            begin = self._connection.hide(repr(reply.content[:100])[1:])
            raise _Passing(f"an answer that cannot be read ({problem}: {begin})") from None
        except Unusable as problem:
            raise Broken(f"the answer of the server at {self.url} holds {problem}") from None
        except SplitThoughts as problem:
            raise ServerError(str(problem)) from None

    def _send(self, method: str, path: str, payload: bytes | None) -> Reply:
        connection = self._connection
        try:
            return connection.send(method, path, payload)
        except ReplyTooLarge as problem:
            raise Broken(f"the server at {self.url} sends {problem}") from None
        except (OSError, http.client.HTTPException) as problem:
            if self._stop.is_set():
                raise Aborted from None

            slow = (
                f" (`request_timeout` is {connection.timeout:g} seconds)" if isinstance(problem, TimeoutError) else ""
            )
            told = connection.hide(str(problem)[:300]) or "no answer"
            raise _Passing(f"{type(problem).__name__}: {told}{slow}") from None


def _seconds(retry_after: str | None) -> float:
    """Return the seconds in a `Retry-After` header, 0 for anything but a whole number, such as a date."""
    wait = (retry_after or "").strip()
    return float(wait) if wait.isascii() and wait.isdigit() else 0.0
