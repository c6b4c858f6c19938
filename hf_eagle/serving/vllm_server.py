"""Run a vLLM server, with its OpenAI-compatible API, for as long as it is needed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ..door.connection import Address, Connection, ReplyTooLarge


# what an unattended server on this machine needs; the environment's own values win
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

_PATIENCE = 5.0  # seconds that one health check may take

SERVER = ("-m", "vllm.entrypoints.openai.api_server")


def flags_of(options: Mapping[str, Any]) -> list[str]:
    """Options as a command's words: `max_num_seqs=8` as `--max-num-seqs 8`, `True` as a flag alone, objects as JSON."""
    words = []
    for name, value in options.items():
        shown = json.dumps(value) if isinstance(value, dict | list) else str(value)
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [shown])]
    return words


@contextmanager
def vllm_server(
    target: str | Path,
    log: str | Path,
    python: str | Path = sys.executable,
    ready_within: float = 600.0,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[str]:
    """Serve `target` on a free port of this machine and yield the URL; end the server afterwards.

    Args:
        target: folder or Hub id.
        log: file for what the server prints.
        python: interpreter of the environment in which vLLM is installed.
        ready_within: seconds within which it must answer.
        environment: variables that it gets in addition to those of this process.
        options: vLLM's own, see `flags_of`.

    Raises `RuntimeError` with the end of the log if the server does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    command = [str(python), *SERVER, "--model", str(target), *flags_of({"host": "127.0.0.1", "port": port, **options})]
    with Path(log).open("w") as output:
        # a group of its own: the engine is a child of the server
        server = subprocess.Popen(
            command,
            env=ENVIRONMENT | os.environ | dict(environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(server, url, time.monotonic() + ready_within, Path(log))
        yield url
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(server.pid, signal.SIGKILL)  # the group's remaining processes
        except ProcessLookupError:
            pass
        server.wait()


def _wait_until_ready(server: subprocess.Popen, url: str, deadline: float, log: Path) -> None:
    while not _is_ready(url):
        if server.poll() is not None or time.monotonic() > deadline:
            last_words = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"The server did not start; its last output:\n{last_words}")
        time.sleep(0.2)


def _is_ready(url: str) -> bool:
    connection = Connection(Address.read(url), None, timeout=_PATIENCE)
    try:
        return connection.send("GET", "/health").status == 200
    except (OSError, HTTPException, ReplyTooLarge):
        return False
    finally:
        connection.close()
