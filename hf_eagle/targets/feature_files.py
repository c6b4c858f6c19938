"""Fetch and read the files that a server with the feature connector writes, one for each document."""

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..door.connection import Connection
from ..door.json_files import check_fields


_WITHIN = 5.0  # seconds in which a file that was renamed shows on another machine
_LARGEST_HEADER = 2**20
_FIELDS = dict.fromkeys(("model", "revision", "layer_ids", "dtype", "quantization"), str)


class NotWritten(Exception):
    """A server could not write a document's features; the text is its reason."""


@dataclass(frozen=True)
class Told:
    """What a file says of the server that wrote it.

    Attributes:
        model, revision: as the server was started with them.
        layer_ids: entry ids of the states, ascending.
        dtype: of the states, as `"bfloat16"`.
        quantization: of the served weights, as vLLM names it; empty without one.
    """

    model: str
    revision: str
    layer_ids: tuple[int, ...]
    dtype: str
    quantization: str


@dataclass
class Document:
    """A document's features.

    Attributes:
        states: `(tokens, states, hidden)`, the residual streams at `told.layer_ids`.
        told: of the server.
        next_token: the server's own most probable token behind the document.
    """

    states: torch.Tensor
    told: Told
    next_token: int


def take_file(folder: Path, name: str) -> bytes | None:
    """Read the file of this name and delete it; `None` if there is none, also not a little later.

    Raises:
        NotWritten: if there is a reason instead of it, which is deleted too.
    """
    whole, failed = folder / f"{name}.safetensors", folder / f"{name}.failed"
    until = time.monotonic() + _WITHIN
    while True:
        with suppress(FileNotFoundError):
            content = whole.read_bytes()
            _delete(whole, failed)
            return content
        with suppress(FileNotFoundError):
            reason = failed.read_text(errors="replace")
            _delete(failed)
            raise NotWritten(" ".join(reason.split())[:300])

        if time.monotonic() > until:
            return None
        time.sleep(0.05)


def take_from_port(connection: Connection, name: str) -> bytes | None:
    """As [`take_file`], from the port that the server hands out files on.

    Raises:
        NotWritten: if there is a reason instead of the file.
        OSError, HTTPException: if the port does not answer; `PermissionError` if it wants another token.
    """
    reply = connection.send("GET", f"/{name}")
    if reply.status == 401:
        raise PermissionError("another token is asked for")
    if reply.status not in (200, 409):
        return None

    with suppress(OSError, HTTPException):  # the server deletes what is left, after a while
        connection.send("DELETE", f"/{name}")
    if reply.status == 409:
        raise NotWritten(" ".join(reply.content.decode(errors="replace").split())[:300])
    return reply.content


def _delete(*files: Path) -> None:
    for file in files:
        with suppress(OSError):  # the server deletes what is left, after a while
            file.unlink()


def read_document(content: bytes, ids: list[int], next_token: int) -> Document:
    """Read a file's content.

    Args:
        content: of the file.
        ids: the tokens that were asked for.
        next_token: the server's answer.

    Raises:
        ValueError: with what is wrong, as the rest of a sentence about the file.
    """
    told = _told(content)
    try:
        tensors = load(content)
    except SafetensorError as problem:
        raise ValueError(f"cannot be read ({problem})") from None

    states, held = tensors.get("features"), tensors.get("token_ids")
    if states is None or held is None or states.dim() != 3 or not states.is_floating_point():
        raise ValueError("does not hold `features` (tokens, states, hidden) and `token_ids`")
    if held.tolist() != ids:
        raise ValueError(f"holds {len(held)} other tokens than the {len(ids)} that were asked for")
    if len(states) != len(ids) or states.shape[1] != len(told.layer_ids):
        shape, wanted = tuple(states.shape), (len(ids), len(told.layer_ids))
        raise ValueError(f"holds features of shape {shape} for {wanted[0]} tokens and {wanted[1]} layers")
    return Document(states, told, next_token)


def _told(content: bytes) -> Told:
    size = int.from_bytes(content[:8], "little")
    try:
        if not 0 < size < min(_LARGEST_HEADER, len(content)):
            raise ValueError("its header is not that of safetensors")
        header = json.loads(content[8 : 8 + size])
        found = header.get("__metadata__", {}) if isinstance(header, dict) else {}
        check_fields(found, _FIELDS, "its header", "run the server with this version's connector")
        layer_ids = json.loads(found["layer_ids"])
        if not (isinstance(layer_ids, list) and layer_ids and all(type(n) is int for n in layer_ids)):
            raise ValueError(f"`layer_ids` is {found['layer_ids']!r}")
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"does not say what it holds ({problem})") from None
    return Told(**{name: found[name] for name in _FIELDS if name != "layer_ids"}, layer_ids=tuple(layer_ids))
