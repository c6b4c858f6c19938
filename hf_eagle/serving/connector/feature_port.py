"""Hand out the files of features over HTTP, to trainers that do not see their folder.

`GET /NAME` sends a file, `DELETE /NAME` deletes it. Each request brings the token as `Authorization: Bearer TOKEN`.
What is sent is not encrypted. It needs only the standard library, since it runs inside the server.
"""

import hmac
import os
import re
import shutil
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


TOKEN = "HF_EAGLE_FEATURES_TOKEN"  # variable of the environment, of server and trainer
_NAME = re.compile(r"/([0-9a-f]{32})")


class FeaturePort(ThreadingHTTPServer):
    """Answers in threads of its own, until the process ends.

    Args:
        folder: of the files.
        host, port: to listen on; with port 0, `server_port` is a free one.
        token: that requests must bring.

    Raises:
        OSError: if the port is taken.
        ValueError: without a token.
    """

    daemon_threads = True

    def __init__(self, folder: Path, host: str, port: int, token: str | None):
        if len((token or "").split()) != 1:
            raise ValueError(
                f"`features_port` is {port}, but the environment variable {TOKEN} is not set to one word: set it to "
                "the same secret for the server and for the training."
            )
        super().__init__((host, port), _Handler)
        self.folder, self.token = Path(folder), token.strip().encode()
        threading.Thread(target=self.serve_forever, name="features-port", daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that left


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 600.0  # of a connection that says nothing
    server: FeaturePort

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        name = self._name()
        if name is None:
            return

        with suppress(FileNotFoundError), (self.server.folder / f"{name}.safetensors").open("rb") as file:
            self._head(200, os.fstat(file.fileno()).st_size)
            shutil.copyfileobj(file, self.wfile, 2**20)
            return
        with suppress(FileNotFoundError):
            return self._say(409, (self.server.folder / f"{name}.failed").read_text(errors="replace"))
        self._say(404, "no such file")

    def do_DELETE(self) -> None:
        name = self._name()
        if name is None:
            return

        for kind in ("safetensors", "failed"):
            with suppress(OSError):
                (self.server.folder / f"{name}.{kind}").unlink()
        self._say(200, "")

    def _name(self) -> str | None:
        """The name that a request may have; else it is answered here."""
        given = (self.headers["Authorization"] or "").encode(errors="replace")
        if not hmac.compare_digest(given, b"Bearer " + self.server.token):
            self._say(401, "another token")
            return None

        found = _NAME.fullmatch(self.path)
        if found is None:
            self._say(404, "no such file")
            return None
        return found[1]

    def _say(self, status: int, text: str) -> None:
        content = text.encode(errors="replace")
        self._head(status, len(content))
        self.wfile.write(content)

    def _head(self, status: int, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(size))
        self.end_headers()
