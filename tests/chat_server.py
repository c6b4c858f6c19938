"""A stand-in server with OpenAI's chat API: answers are a function of the messages; it fails where it is told to."""

import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer(messages: list[dict], seed: int | None = None) -> tuple[str, str]:
    """Text and finish_reason: nothing but the messages, and the seed of a sampled request, decides them."""
    digest = hashlib.sha256(json.dumps([messages, seed]).encode()).hexdigest()
    return f"é{digest[:12]}\n", "length" if digest[12] in "012" else "stop"


class ChatServer(ThreadingHTTPServer):
    """Listens on a free port until it leaves its `with` block.

    Args:
        fault (function of the request's number and body, *optional*):
            `None` for an answer, a status with an error text as `(429, "busy")`, a number of seconds to be slow, or one
            of `"drop"` (no answer), `"cut"` (half of one), `"garbage"` (no JSON), `"empty"` (no choices), `"abort"`
            (cut off by the server) and `"thinks"` (reasoning split off).
        delay (`float`): seconds that every answer takes.
        prompt_ids (function of the messages, *optional*): what `/tokenize` says; without it there is no such path.
        count (function of the messages, *optional*): `usage.prompt_tokens`.
        write (function of the body, *optional*): text and finish_reason of a completion; without it there is no such
            path.
        say (function of the body, *optional*): token ids of the prompt and of the answer, its message and its
            finish_reason, instead of those of `answer`; the ids are told to whom asks for them, as vLLM does.

        hostile (function of the path, *optional*): one of `HOSTILE` that answers a request to it instead, or `None`.

    `chats` holds the bodies of all chat requests that were answered, in the order of their answers, `asked` their
    number with the failed ones, and `most` how many were under way together at most.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        fault=None,
        delay=0.0,
        model="target",
        root=None,
        prompt_ids=None,
        count=None,
        key=None,
        write=None,
        say=None,
        hostile=None,
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault, self.delay, self.prompt_ids, self.count, self.key = fault, delay, prompt_ids, count, key
        self.write, self.say, self.hostile = write, say, hostile
        self.listed = [{"id": model, "object": "model", "root": root or model, "max_model_len": 512}]
        self.chats, self.asked, self.under_way, self.most = [], 0, 0, 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # clients are killed in these tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self._is_hostile():
            return None
        if self.path != "/v1/models":
            return self._reply(404, {"detail": "Not Found"})
        self._reply(200, {"object": "list", "data": self.server.listed})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if self._is_hostile():
            return None
        if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            return self._reply(401, {"error": "Unauthorized"})
        if self.path == "/tokenize" and server.prompt_ids:
            return self._reply(200, {"tokens": server.prompt_ids(body["messages"])})
        if self.path == "/v1/completions" and server.write:
            text, reason = server.write(body)
            return self._reply(200, {"choices": [{"index": 0, "text": text, "finish_reason": reason}]})
        if self.path != "/v1/chat/completions":
            return self._reply(404, {"detail": "Not Found"})
        with server.lock:
            number, server.asked = server.asked, server.asked + 1
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        try:
            self._chat(body, server.fault and server.fault(number, body))
        finally:
            with server.lock:
                server.under_way -= 1

    def _is_hostile(self) -> bool:
        """Has a fault answered?"""
        fault = self.server.hostile and self.server.hostile(self.path)
        if not fault:
            return False
        self.close_connection = True
        HOSTILE[fault](self)
        return True

    def _chat(self, body: dict, fault) -> None:
        time.sleep(fault if isinstance(fault, float) else self.server.delay)
        if isinstance(fault, tuple):
            return self._reply(fault[0], {"error": {"message": fault[1]}}, *fault[2:])
        if fault == "drop":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        told, ids = {}, {}
        if self.server.say:
            prompt, said, message, reason = self.server.say(body)
            told, ids = (
                ({"prompt_token_ids": prompt}, {"token_ids": said}) if body.get("return_token_ids") else ({}, {})
            )
        else:
            text, reason = answer(body["messages"], body.get("seed"))
            message = {"role": "assistant", "content": text}
        if fault == "thinks":
            message["reasoning_content"] = "hm"
        usage = {"prompt_tokens": self.server.count and self.server.count(body["messages"]), "completion_tokens": 7}
        choice = {"index": 0, "message": message, "finish_reason": "abort" if fault == "abort" else reason} | ids
        content = {"garbage": "<html>", "empty": {"choices": []}}.get(
            fault, {"choices": [choice], "usage": usage} | told
        )
        if not isinstance(fault, str):
            with self.server.lock:
                self.server.chats.append(body)
        self._reply(200, content, half=fault == "cut")

    def _reply(self, status: int, content, headers: dict | None = None, half: bool = False) -> None:
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self.close_connection = True


def send(handler: _Handler, content: bytes, status: int = 200, **headers: str) -> None:
    """A whole reply with these headers, `_` for `-`."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def _drip(handler: _Handler, *pieces: bytes) -> None:
    """The pieces, then the last one again and again, until the client has had enough."""
    for piece in pieces[:-1]:
        handler.wfile.write(piece)
    while True:
        handler.wfile.write(pieces[-1])
        time.sleep(0.02)


def _pour(handler: _Handler, head: bytes, piece: bytes) -> None:
    """More than a client should take."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
    for _ in range(100_000):
        handler.wfile.write(piece)


def _echo(handler: _Handler, status: int) -> None:
    """What the client sent as its key, in an error."""
    send(handler, json.dumps({"error": {"message": f"bad key {handler.headers['Authorization']}"}}).encode(), status)


def _echo_in_a_reply(handler: _Handler) -> None:
    told = handler.headers["Authorization"]
    message = {"role": "assistant", "content": told}
    choice = {"message": message, "text": told, "finish_reason": "stop"}
    listed = [{"id": "target", "root": told}]
    send(handler, json.dumps({"choices": [choice], "data": listed, "tokens": [told]}).encode())


# how a server fails that is broken or means harm; each is told the request's handler
HOSTILE = {
    "drip": lambda handler: _drip(handler, b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
    "drip of headers": lambda handler: _drip(handler, b"HTTP/1.1 200 OK\r\n", b"X: a\r\n"),
    "drip in one header": lambda handler: _drip(handler, b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "drip of chunks": lambda handler: _drip(
        handler, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"
    ),
    "continue for ever": lambda handler: _drip(handler, b"HTTP/1.1 100 Continue\r\n\r\n"),
    "silence": lambda handler: _drip(handler, b""),
    "claimed length": lambda handler: _pour(handler, b"Content-Length: 1099511627776\r\n", b" " * 1000),
    "no length": lambda handler: _pour(handler, b"", b" " * 1000),
    "chunk of a claimed length": lambda handler: _pour(
        handler, b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFF", b" " * 1000
    ),
    "chunk below 0": lambda handler: _pour(handler, b"Transfer-Encoding: chunked\r\n\r\n-5", b" " * 10),
    "long header": lambda handler: _pour(handler, b"X: ", b"a" * 1000),
    "many headers": lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 1000),
    "other protocol": lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "echo as a status line": lambda handler: handler.wfile.write(
        f"{handler.headers['Authorization']}\r\n\r\n".encode()
    ),
    "reason with escapes": lambda handler: handler.wfile.write(b"HTTP/1.1 400 \x1b[2J\r\nContent-Length: 0\r\n\r\n"),
    "wait a day": lambda handler: send(handler, b"{}", 429, Retry_After="86400"),
    "wait for ever": lambda handler: send(handler, b"{}", 503, Retry_After="9" * 40),
    "wait below 0": lambda handler: send(handler, b"{}", 429, Retry_After="-5"),
    "wait for a date": lambda handler: send(handler, b"{}", 429, Retry_After="Wed, 21 Oct 2065 07:28:00 GMT"),
    "wait for no number": lambda handler: send(handler, b"{}", 429, Retry_After="\u00b2"),
    "nothing": lambda handler: send(handler, b""),
    "no content": lambda handler: send(handler, b"", 204),
    "no JSON": lambda handler: send(handler, b"<html>busy</html>"),
    "other bytes": lambda handler: send(handler, bytes(range(256))),
    "deep": lambda handler: send(handler, b"[" * 100_000),
    "long number": lambda handler: send(handler, b'{"data": ' + b"9" * 10_000 + b"}"),
    "list": lambda handler: send(handler, b"[{}]"),
    "circle": lambda handler: send(handler, b"", 307, Location=handler.path),
    "old redirect": lambda handler: send(handler, b"", 301, Location="http://127.0.0.1:9/"),
    "who are you": lambda handler: _echo(handler, 401),
    "echo with 400": lambda handler: _echo(handler, 400),
    "echo with 500": lambda handler: _echo(handler, 500),
    "echo with 404": lambda handler: _echo(handler, 404),
    "echo in a reply": _echo_in_a_reply,
}
