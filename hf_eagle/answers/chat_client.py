"""One connection to an OpenAI-compatible server (vLLM, SGLang): what is asked again, what ends a prompt or the run.

Standard library only, so that a process which asks a server starts at once. Each thread has a client of its own. The
connection is direct: proxies that the environment names are not used.
"""

import http.client
import json
import random
import socket
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit


FIRST_DELAY = 0.5  # seconds before the second attempt; each further one waits twice as long
LONGEST_DELAY = 30.0  # but no longer, unless the server asks for it
CONNECT_TIMEOUT = 10.0

_PASSING = {408, 425, 429, *range(500, 600)} - {501, 505}  # statuses that may be another one next time
_REFUSED = {400, 413, 415, 422}  # statuses that are about this request's content
_TOO_LONG = ("context length", "context_length", "maximum model length", "max_model_len")
_ADVICE = {
    401: "give the server's key in the environment variable OPENAI_API_KEY",
    403: "give a key that may use it in the environment variable OPENAI_API_KEY",
    404: "`server_url` must be the address before `/v1/chat/completions`",
    405: "`server_url` must be the address before `/v1/chat/completions`",
}


class ServerError(ValueError):
    """What no repetition helps: the run ends with this sentence."""


class Unavailable(ServerError):
    """Every attempt failed. `busy`: the last one because the server had too much to do."""

    def __init__(self, text: str, busy: bool):
        super().__init__(text)
        self.busy = busy


class Refused(ServerError):
    """The server does not take this one prompt."""


class TooLong(Refused):
    """The prompt and its answer do not fit the server's context length."""


class Aborted(Exception):
    """The run ended while this request was on its way."""


class _Passing(Exception):
    """One attempt failed in a way that the next one may not. `wait`: seconds that the server asks for."""

    def __init__(self, text: str, status: int | None = None, wait: float = 0.0):
        super().__init__(text)
        self.status, self.wait = status, wait


@dataclass
class ChatAnswer:
    """What a server said; its counts and ids of tokens are `None` where it gives none.

    With `token_ids` they alone are all that was said: the server may have split thoughts or calls off the text.
    """

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    prompt_ids: list[int] | None = None
    token_ids: list[int] | None = None


class ChatClient:
    """Asks one thing at a time over a connection that is kept open.

    Args:
        url (`str`): of the server, with or without `/v1`.
        api_key (`str`, *optional*): sent as a bearer token.
        timeout (`float`, *optional*, defaults to 600.0): seconds that an answer may take.
        retries (`int`, *optional*, defaults to 12): attempts after the first, each after twice the time (jittered).
        stop (`threading.Event`, *optional*): once set, waiting ends with `Aborted`.

    Asked again: no connection, a dropped one, a timeout, an answer that is no chat answer, the statuses 408, 425, 429
    and 5xx. `Refused`: 400, 413, 415, 422. Every other status is a `ServerError`.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 12,
        stop: threading.Event | None = None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"`server_url` must look like http://localhost:8000, got {url!r}.")
        self.url, self.timeout, self.retries = url, timeout, retries
        self._host, self._port, self._secure = parts.hostname, parts.port, parts.scheme == "https"
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._stop = stop or threading.Event()
        self._connection: http.client.HTTPConnection | None = None

    def models(self) -> list[dict]:
        """What the server serves: `id`, and with vLLM and SGLang `root` (a folder or Hub id) and `max_model_len`."""
        return self._ask(
            "GET", "/v1/models", None, lambda reply: [dict(model, id=model["id"]) for model in reply["data"]]
        )

    def chat(self, body: dict, retries: int | None = None) -> ChatAnswer:
        """The answer to one chat completion request; `retries` instead of the client's, if given."""
        return self._ask("POST", "/v1/chat/completions", body, _chat_answer, retries)

    def complete(self, body: dict) -> ChatAnswer:
        """The continuation of one prompt as it stands, which no template is laid around."""
        return self._ask("POST", "/v1/completions", body, _continuation)

    def prompt_ids(self, body: dict) -> list[int] | None:
        """The token ids the server makes of a chat request; `None` where it does not tell (only vLLM does)."""
        known = {key: body[key] for key in ("model", "messages", "tools", "chat_template_kwargs") if key in body}
        try:
            return self._ask("POST", "/tokenize", known, lambda reply: _ids(reply["tokens"]), 0)
        except ServerError:
            return None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def abort(self) -> None:
        """From another thread: ends the request on its way, which the server then drops."""
        connection = self._connection
        try:
            if connection is not None and connection.sock is not None:
                connection.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended by itself

    def _ask(self, method: str, path: str, body: dict | None, read, retries: int | None = None):
        retries = self.retries if retries is None else retries
        payload = None if body is None else json.dumps(body).encode()
        for attempt in range(retries + 1):
            try:
                return self._attempt(method, path, payload, read)
            except _Passing as problem:
                failure = problem
            if attempt < retries:
                delay = min(LONGEST_DELAY, FIRST_DELAY * 2**attempt) * random.uniform(0.5, 1.0)
                self._stop.wait(max(delay, failure.wait))
            if self._stop.is_set():
                raise Aborted
        busy = failure.status == 429
        raise Unavailable(
            f"The server at {self.url} failed {retries + 1} times in a row, the last time with: {failure}. What was "
            f"answered is kept; see to the server{' or lower `concurrency`' if busy else ''}, then run the same again.",
            busy,
        )

    def _attempt(self, method: str, path: str, payload: bytes | None, read):
        status, reason, wait, content = self._send(method, self._prefix + path, payload)
        if status == 200:
            try:
                return read(json.loads(content))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as problem:
                if isinstance(problem, ServerError):
                    raise
                raise _Passing(f"an answer that cannot be read ({content[:100]!r})") from None
        said = f"{status} {reason}: {_detail(content)}"
        if status in _PASSING:
            raise _Passing(said, status, wait)
        if status in _REFUSED:
            kind = TooLong if any(mark in said.lower() for mark in _TOO_LONG) else Refused
            raise kind(f"the server at {self.url} refuses it with {said}")
        advice = _ADVICE.get(status, "see to the server")
        raise ServerError(f"The server at {self.url} answers {method} {path} with {said}; {advice}.")

    def _send(self, method: str, path: str, payload: bytes | None) -> tuple[int, str, float, bytes]:
        """Status, reason, seconds to wait, body."""
        kept_open = self._connection is not None
        try:
            connection = self._connection or self._connect()
            connection.request(method, path, payload, self._headers)
            response = connection.getresponse()
            content = response.read()
            if response.will_close:
                self.close()
            return response.status, response.reason, _seconds(response.headers.get("Retry-After")), content
        except (OSError, http.client.HTTPException) as problem:
            self.close()
            if self._stop.is_set():
                raise Aborted from None
            # a server may close an idle connection at the moment it is used again: nothing has failed
            if kept_open and isinstance(problem, ConnectionError):
                return self._send(method, path, payload)
            slow = f" (`request_timeout` is {self.timeout:g} seconds)" if isinstance(problem, TimeoutError) else ""
            raise _Passing(f"{type(problem).__name__}: {str(problem) or 'no answer'}{slow}") from None

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=min(CONNECT_TIMEOUT, self.timeout))
        connection.connect()
        connection.sock.settimeout(self.timeout)
        self._connection = connection
        return connection


def _chat_answer(reply: dict) -> ChatAnswer:
    message = reply["choices"][0]["message"]
    answer = _answer(reply, "" if message["content"] is None else message["content"])
    if answer.token_ids is None and (message.get("reasoning_content") or message.get("reasoning")):
        raise ServerError(
            "The server splits the target's thinking off its answers; start it without its reasoning parser, since a "
            "draft must learn all that the target says."
        )
    return answer


def _continuation(reply: dict) -> ChatAnswer:
    return _answer(reply, reply["choices"][0]["text"])


def _answer(reply: dict, text: str) -> ChatAnswer:
    """The text with what a reply says about it, whichever of the two paths it comes from."""
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    reason = choice["finish_reason"]
    if reason == "abort" or not isinstance(reason, str) or not isinstance(text, str):
        raise KeyError("finish_reason")  # cut off by the server, not by the target
    # of a chat the prompt's ids stand beside the choices, of a plain completion in them
    prompt_ids, ids = (reply.get("prompt_token_ids") or choice.get("prompt_token_ids")), choice.get("token_ids")
    told = (None, None) if prompt_ids is None or ids is None else (_ids(prompt_ids), _ids(ids))
    return ChatAnswer(text, reason, usage.get("prompt_tokens"), usage.get("completion_tokens"), *told)


def _ids(found) -> list[int]:
    """Token ids; a `TypeError`, by which a reply cannot be read, if they are none."""
    if not isinstance(found, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
        raise TypeError("token ids")
    return found


def _detail(content: bytes) -> str:
    """What a server says is wrong: OpenAI's form, FastAPI's, or the beginning of the text."""
    try:
        reply = json.loads(content)
        error = reply.get("error", reply)
        found = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        return str(found or content.decode())[:300]
    except (ValueError, AttributeError):
        return content[:300].decode(errors="replace").strip() or "no explanation"


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.strip().isdigit() else 0.0
