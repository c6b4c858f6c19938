"""A stand-in server that gives features as a vLLM with the connector does: a target of this process computes them."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_eagle.targets.target import FrozenTarget


_COMPUTING = threading.Lock()  # servers may share a model, in which they hook themselves


class FeatureServer(ThreadingHTTPServer):
    """Listens on a free port until it leaves its `with` block.

    Args:
        model (`PreTrainedModel`): whose states it gives.
        folder: that it writes to.
        layer_ids: of the states; all by default.
        name: of the model, in `/v1/models`.
        longest: tokens that it reads and writes altogether.
        told: changes of the header of its files.
        key: that requests must bring.
        port: that hands out its files, told with each answer.
        fault (function of the request's number, *optional*): `None` for an answer, a status with an error text as
            `(500, "lost")`, a number of seconds to be slow, one of `"drop"` (no answer), `"garbage"` (no JSON), `"disk
            full"` (a reason and no file), `"no file"` and `"torn"` (half a header), or a function that changes the
            answer, and the tensors and the header of the file.

    `asked` holds the bodies of all requests for features, in their order, and `most` how many were under way at most.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, model, folder, layer_ids=None, name="target", longest=None, told=None, key=None, fault=None, port=None
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.folder, self.name, self.longest = FrozenTarget(model), Path(folder), name, longest
        self.layer_ids = list(range(self.target.num_layers + 1)) if layer_ids is None else layer_ids
        dtype = str(self.target.dtype).removeprefix("torch.")
        self.told = {"model": name, "revision": "", "layer_ids": json.dumps(self.layer_ids), "dtype": dtype}
        self.told |= {"quantization": "", **(told or {})}
        self.key, self.fault, self.port = key, fault, port
        self.asked, self.under_way, self.most = [], 0, 0
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closed.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # clients leave in these tests

    @torch.no_grad()
    def states(self, ids: list[int]) -> tuple[torch.Tensor, int]:
        """`(tokens, states, hidden)` by a plain forward, and the most probable next token."""
        seen, model = [], self.target.model
        entries = [*self.target.parts.layers, self.target.parts.final_norm]
        with _COMPUTING:
            hooks = [x.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for x in entries]
            try:
                logits = model(torch.tensor([ids], device=self.target.device), use_cache=False).logits[0, -1]
            finally:
                for hook in hooks:
                    hook.remove()
        return torch.stack([seen[k] for k in self.layer_ids], 1).cpu(), int(logits.argmax())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FeatureServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        listed = {"id": server.name, "root": server.name, "max_model_len": server.longest}
        self._reply(200, {"object": "list", "data": [listed]})

    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            return self._reply(401, {"error": "Unauthorized"})
        with server.lock:
            number = len(server.asked)
            server.asked.append(body)
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        try:
            self._answer(body, server.fault and server.fault(number))
        finally:
            with server.lock:
                server.under_way -= 1

    def _answer(self, body, fault):
        if isinstance(fault, float) and self.server.closed.wait(fault):
            return None
        if isinstance(fault, tuple):
            return self._reply(fault[0], {"error": {"message": fault[1]}})
        if fault == "drop":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)

        ids, name = body["prompt"], body["kv_transfer_params"]["features"]
        states, token = self.server.states(ids)
        tensors, header = {"features": states, "token_ids": torch.tensor(ids).int()}, dict(self.server.told)
        answer = {
            "choices": [{"index": 0, "text": "", "token_ids": [token], "prompt_token_ids": ids}],
            "kv_transfer_params": {"features": name, "tokens": len(ids)},
        }
        if self.server.port is not None:
            answer["kv_transfer_params"]["port"] = self.server.port
        if callable(fault):
            fault(answer, tensors, header)

        file = self.server.folder / f"{name}.safetensors"
        if fault == "disk full":
            file.with_suffix(".failed").write_text("OSError: [Errno 28] No space left on device")
        elif fault == "torn":
            file.write_bytes(b"\x08\x00")
        elif fault != "no file":
            save_file(tensors, file, header)
        self._reply(200, "<html>" if fault == "garbage" else answer)

    def _reply(self, status, content):
        payload = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)
