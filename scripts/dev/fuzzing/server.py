"""A chat server that answers soundly, or with one fault."""

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def _models() -> dict:
    return {"data": [{"id": "target", "root": "target", "max_model_len": 256}]}


def _chat() -> dict:
    usage = {"prompt_tokens": 9, "completion_tokens": 2}
    return {
        "choices": [{"message": {"content": "four five"}, "finish_reason": "stop", "text": "four five"}],
        "usage": usage,
    }


class Handler(BaseHTTPRequestHandler):
    """Sends what the fault makes of a sound reply."""

    protocol_version = "HTTP/1.1"
    fault, draw = "none", random.Random(0)

    def do_GET(self):
        self.reply(_models())

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/tokenize"):
            return self.reply({"tokens": [1, 2, 3], "count": 3, "max_model_len": 256})
        self.reply(_chat())

    def reply(self, content: Any) -> None:
        FAULTS[self.fault](self, content)

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def _sound(handler: Handler, content: Any) -> None:
    handler.send(json.dumps(content).encode())


def _other_field(handler: Handler, content: Any) -> None:
    from .faults import change_somewhere

    held = [content]
    change_somewhere(held, handler.draw)
    handler.send(json.dumps(held[0]).encode())


def _drip(handler: Handler, content: Any) -> None:
    handler.send(b"", Content_Length="100000")
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.5)


def _drip_headers(handler: Handler, content: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(1000):
        handler.wfile.write(b"X-%d: a\r\n" % number)
        time.sleep(0.5)


def _hang_up(handler: Handler, content: Any) -> None:
    handler.send(b"{", Content_Length="1000")
    handler.close_connection = True


def _huge(handler: Handler, content: Any) -> None:
    handler.send(b" " * 2**20, Content_Length=str(2**40))
    for _ in range(200):
        handler.wfile.write(b" " * 2**20)


FAULTS = {
    "none": _sound,
    "another field": _other_field,
    "a drip": _drip,
    "a drip of headers": _drip_headers,
    "hang up": _hang_up,
    "huge": _huge,
    "no JSON": lambda handler, content: handler.send(b"<html>busy</html>"),
    "other bytes": lambda handler, content: handler.send(handler.draw.randbytes(100)),
    "deep": lambda handler, content: handler.send(b"[" * 100_000),
    "a list": lambda handler, content: handler.send(json.dumps([content]).encode()),
    "busy": lambda handler, content: handler.send(b"{}", 503),
    "a day": lambda handler, content: handler.send(b"{}", 429, Retry_After="86400"),
    "for ever": lambda handler, content: handler.send(b"{}", 429, Retry_After="9" * 40),
    "no entry": lambda handler, content: handler.send(b'{"error": {"message": "no"}}', 401),
    "elsewhere": lambda handler, content: handler.send(b"", 307, Location="http://127.0.0.1:9/"),
    "in circles": lambda handler, content: handler.send(b"", 307, Location=handler.path),
    "half a character": lambda handler, content: handler.send(json.dumps(content).replace("four", "\\ud800").encode()),
}


@contextmanager
def chat_server(fault: str, seed: int) -> Iterator[str]:
    """Answers on a free port of this machine, and yields its address."""
    handler = type("Faulty", (Handler,), {"fault": fault, "draw": random.Random(seed)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.handle_error = True, lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
