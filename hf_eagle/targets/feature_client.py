"""Ask servers that run a target for the features of documents: one request for each, several at a time."""

import atexit
import http.client
import json
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..door.connection import Address, Connection, ReplyTooLarge, read_key
from ..door.json_files import check_fields
from ..door.names import same_model
from .feature_files import Document, NotWritten, read_document, take_file, take_from_port


IN_FLIGHT = 8  # requests to each server at a time, which it joins into batches
_TIMEOUT = 600.0  # seconds of one request, the wait in the server's queue included
# half a minute altogether: a server that is started anew takes longer, and the run then goes on from its checkpoint
_RETRIES, _FIRST_DELAY = 6, 0.5
_LARGEST_FILE = 2**33  # bytes, of a document from a port
TOKEN = "HF_EAGLE_FEATURES_TOKEN"  # variable of the environment, of trainer and server
_PASSING = {408, 425, 429, *range(500, 600)}
# the answer is one token, the most probable: servers take what is left out from the model's generation_config.json
_ASKED = {
    **{"max_tokens": 1, "temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "return_token_ids": True,
}
_MODELS = {"data": [{"id": str, "root?": str | None, "max_model_len?": int | None}]}
_REPLY = {
    "choices": [{"token_ids": [int], "prompt_token_ids?": list[int] | None}],
    "kv_transfer_params?": dict | None,
}
HOW_TO_START = "start it with the command that `hf-eagle serve-features` prints for this recipe"


class FeaturesRefused(ValueError):
    """A server does not give the features of this target: another attempt would not help."""


class ServerGone(ConnectionError):
    """No server answers any more."""


class _Passing(Exception):
    """One attempt failed; the next one may succeed."""


@dataclass(frozen=True)
class Server:
    """A server, its name of the target, and how many tokens it reads."""

    address: Address
    model: str
    longest: int | None


@dataclass
class _Asked:
    """A request: its tokens, the name of its file, the servers to try, and where the answer goes."""

    ids: list[int]
    servers: list[Server]
    name: str
    answer: Future


class FeatureClient:
    """Asks for features in threads of its own. Attempts of one request share its name, so none leaves a second file.

    Args:
        urls: addresses of servers, which are used in turn.
        folder: that the servers write to, as it is called here; `None` fetches files from the ports that they tell.
        target: folder or Hub id of the model that the servers must serve.
        server_model: their name for it, if they have another; then `target` is not compared.
        api_key: sent as a bearer token.
        token: that the ports ask for.
        timeout: seconds that one request may take.
        retries: how often a request is repeated; each time waits twice as long.
        first_delay: seconds before the first repetition.

    Raises:
        ValueError: for an invalid address or key, or a folder that does not exist.
        FeaturesRefused: if a server serves another model.
        ServerGone: if a server does not answer.
    """

    def __init__(
        self,
        urls: Sequence[str],
        folder: str | Path | None,
        target: str,
        server_model: str | None = None,
        api_key: str | None = None,
        token: str | None = None,
        timeout: float = _TIMEOUT,
        retries: int = _RETRIES,
        first_delay: float = _FIRST_DELAY,
    ):
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(
                f"`features_folder` {folder} is no folder: name the one that the server writes to, as it is called "
                "here."
            )

        self._key, self._token = read_key(api_key), read_key(token, f"The environment variable {TOKEN}")
        self._timeout, self._retries, self._first_delay = timeout, retries, first_delay
        self._stop = threading.Event()
        addresses = [Address.read(url, "target_url") for url in urls]
        self.servers = [self._find(address, target, server_model) for address in addresses]
        self._turn, self._threads = 0, []
        self._connections: list[Connection] = []
        self._queue: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()

    def ask(self, ids: list[int], server: Server | None = None) -> "Future[Document]":
        """Ask for the features of a document, of this server or of any."""
        self._turn += 1
        turn = self._turn % len(self.servers)
        servers = [*self.servers[turn:], *self.servers[:turn]] if server is None else [server]
        asked = _Asked(ids, servers, uuid.uuid4().hex, Future())

        if not self._threads:
            atexit.register(self.close)
        while len(self._threads) < IN_FLIGHT * len(self.servers):
            # daemons: a process that ends for another reason does not wait for a server
            self._threads.append(threading.Thread(target=self._work, name="served-features", daemon=True))
            self._threads[-1].start()
        self._queue.put(asked)
        return asked.answer

    def close(self) -> None:
        """Drop all requests, and end the threads. Called at the end of the process too, which no thread may outlive."""
        self._stop.set()
        for connection in list(self._connections):
            connection.abort()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=1.0)

    # ---- in the threads ----

    def _work(self) -> None:
        connections: dict[Address, Connection] = {}
        while (asked := self._queue.get()) is not None:
            if self._stop.is_set() or not asked.answer.set_running_or_notify_cancel():
                asked.answer.cancel()
                continue
            try:
                asked.answer.set_result(self._document(asked, connections))
            except BaseException as problem:
                asked.answer.set_exception(problem)

    def _document(self, asked: _Asked, connections: dict[Address, Connection]) -> Document:
        for attempt in range(self._retries + 1):
            server = asked.servers[attempt % len(asked.servers)]
            try:
                return self._attempt(asked, server, connections)
            except _Passing as problem:
                failure = problem

            if attempt < self._retries and self._stop.wait(self._first_delay * 2**attempt):
                raise CancelledError
        raise ServerGone(
            f"`target_url` {server.address.shown} failed {self._retries + 1} times in a row, the last time with: "
            f"{failure}. Look at the server's log, {HOW_TO_START}, and continue the run from its last checkpoint."
        )

    def _attempt(self, asked: _Asked, server: Server, connections: dict[Address, Connection]) -> Document:
        connection = self._connection(server.address, self._key, connections)
        body = {"model": server.model, "prompt": asked.ids, **_ASKED}
        body["kv_transfer_params"] = {"features": asked.name}
        reply = self._send(connection, "POST", "/v1/completions", body, _REPLY)
        if not (reply["choices"] and reply["choices"][0]["token_ids"]):
            raise _Passing("an answer without a token")
        shown, choice = server.address.shown, reply["choices"][0]

        told = reply.get("kv_transfer_params") or {}
        if told.get("features") != asked.name:
            raise FeaturesRefused(
                f"`target_url` {shown} answers without features, so it runs without the connector: {HOW_TO_START}."
            )
        if choice.get("prompt_token_ids") not in (None, asked.ids):
            raise FeaturesRefused(f"`target_url` {shown} reads other tokens than it was sent: {HOW_TO_START}.")

        try:
            content = self._take(asked.name, server, told.get("port"), connections)
        except NotWritten as problem:  # a disk that is full now may have room when others have fetched theirs
            raise _Passing(f"it could not write the features of {len(asked.ids)} tokens ({problem})") from None
        if content is None:
            place = f"its port {told.get('port')}" if self.folder is None else f"`features_folder` {self.folder}"
            raise FeaturesRefused(
                f"`target_url` {shown} says that it wrote features, but {place} does not hold them: name the folder "
                "that the server writes to, as it is called here."
            )

        try:
            return read_document(content, asked.ids, choice["token_ids"][0])
        except ValueError as problem:
            raise FeaturesRefused(
                f"The file of features from `target_url` {shown} {problem}: {HOW_TO_START}."
            ) from None

    def _take(
        self, name: str, server: Server, port: int | None, connections: dict[Address, Connection]
    ) -> bytes | None:
        """Fetch the file of this name from the folder, or from the server's port if there is none; then delete it."""
        if self.folder is not None:
            return take_file(self.folder, name)

        shown, host = server.address.shown, server.address.host
        if not isinstance(port, int):
            raise FeaturesRefused(
                f"`target_url` {shown} has no port for features, and `features_folder` is not set: set it to the "
                "folder that the server writes to, or start the server with `--features_port`."
            )
        connection = self._connection(
            Address(f"http://{host}:{port}", host, port, False, ""), self._token, connections, _LARGEST_FILE
        )
        try:
            return take_from_port(connection, name)
        except PermissionError:
            raise FeaturesRefused(
                f"The port {port} of `target_url` {shown} asks for another token: set the environment variable {TOKEN} "
                "to that of the server."
            ) from None
        except (OSError, ReplyTooLarge, http.client.HTTPException) as problem:
            raise _Passing(f"{type(problem).__name__} from its port {port}: {str(problem)[:300]}") from None

    def _connection(
        self, address: Address, key: str | None, connections: dict[Address, Connection], largest: int | None = None
    ) -> Connection:
        """This thread's connection to an address."""
        if address not in connections:
            connections[address] = Connection(address, key, self._timeout, largest)
            self._connections.append(connections[address])
        return connections[address]

    def _find(self, address: Address, target: str, server_model: str | None) -> Server:
        """Find the target among the models that a server lists."""
        connection = Connection(address, self._key, min(60.0, self._timeout))
        try:
            models = self._send(connection, "GET", "/v1/models", None, _MODELS)["data"]
        except _Passing as problem:
            raise ServerGone(f"`target_url` {address.shown} does not answer ({problem}): {HOW_TO_START}.") from None
        finally:
            connection.close()

        for model in models:
            names = (model["id"], model.get("root"))
            if model["id"] == server_model or (server_model is None and any(same_model(target, n) for n in names)):
                return Server(address, model["id"], model.get("max_model_len"))

        listed = connection.hide(", ".join(model["id"] for model in models)[:300]) or "nothing"
        wanted = f"`target` {target}" if server_model is None else f"`server_model` {server_model}"
        raise FeaturesRefused(
            f"`target_url` {address.shown} serves {listed}, not {wanted}: serve the target, or say in `server_model` "
            "which of these is the same model."
        )

    def _send(self, connection: Connection, method: str, path: str, body: dict | None, fields: dict) -> dict[str, Any]:
        """The server's answer, an object with these fields."""
        shown, begun = connection.address.shown, time.monotonic()
        try:
            reply = connection.send(method, path, None if body is None else json.dumps(body).encode())
        except ReplyTooLarge as problem:
            raise FeaturesRefused(f"`target_url` {shown} sends {problem}: name a vLLM.") from None
        except (OSError, http.client.HTTPException) as problem:
            if isinstance(problem, TimeoutError) and time.monotonic() - begun > 0.9 * connection.timeout:
                raise ServerGone(
                    f"`target_url` {shown} gave no answer to {method} {path} in {connection.timeout:g} seconds: look "
                    "at the server's log, or send it less at a time, and continue the run from its last checkpoint."
                ) from None
            raise _Passing(f"{type(problem).__name__}: {connection.hide(str(problem)[:300]) or 'no answer'}") from None

        said = connection.hide(f"{reply.status} {reply.reason}: {reply.content[:300].decode(errors='replace')}")
        if reply.status in _PASSING:
            raise _Passing(said)
        if reply.status != 200:
            advice = {401: "give the server's key in the environment variable OPENAI_API_KEY"}
            raise FeaturesRefused(
                f"`target_url` {shown} answers {method} {path} with {said}; {advice.get(reply.status, HOW_TO_START)}."
            )

        try:
            found = json.loads(reply.content)
            check_fields(found, fields, "it", "name a vLLM")
        except (ValueError, RecursionError) as problem:
            raise _Passing(f"an answer that cannot be read ({problem})") from None
        return found
