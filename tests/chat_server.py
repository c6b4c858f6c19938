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
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault, self.delay, self.prompt_ids, self.count, self.key = fault, delay, prompt_ids, count, key
        self.write, self.say = write, say
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
        if self.path != "/v1/models":
            return self._reply(404, {"detail": "Not Found"})
        self._reply(200, {"object": "list", "data": self.server.listed})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
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
