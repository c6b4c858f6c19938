"""HTTP to a server that need not be trusted: each request has a deadline, each reply a size limit, no error a secret.

The client is the standard library's. huggingface_hub 1 depends on httpx and huggingface_hub 2 on httpx2, so neither is
installed with every version that this package supports. Besides, their timeouts (like that of requests) only limit the
wait for the next piece of a reply: a server that sends one byte per second keeps them waiting forever. Here, the reader
of the socket knows the deadline of the whole request.

The connection is direct: proxies named in the environment are not used. Redirects are not followed, so the key goes to
no other host.
"""

import base64
import http.client
import io
import socket
import time
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from .sentences import keep_secret


CONNECT_TIMEOUT = 10.0
LARGEST_REPLY = 64 * 2**20  # bytes, headers included
_PIECE = 2**16
_ECHO = 8  # a reply that repeats a secret of this length or more is refused; shorter ones may be ordinary words


class ReplyTooLarge(ValueError):
    """A reply has more bytes than allowed; nothing of it is kept."""


@dataclass(frozen=True)
class Address:
    """The address of a server. `shown` leaves out user and password, and is the only form that is printed."""

    shown: str
    host: str
    port: int | None
    secure: bool
    prefix: str
    user: str | None = None  # user:password

    @classmethod
    def read(cls, url: str, argument: str = "server_url") -> "Address":
        """Raise `ValueError` that names the argument if it is not the address of a server."""
        shown = _without_user(url)
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname, parts.port
        except ValueError:  # its text may hold the password
            raise ValueError(
                f"`{argument}` must look like http://localhost:8000, with a port from 1 to 65535, got {shown!r}."
            ) from None

        if parts.scheme not in ("http", "https") or not host or port == 0 or not _is_plain(url.strip()):
            raise ValueError(f"`{argument}` must look like http://localhost:8000, got {shown!r}.")
        if parts.query or parts.fragment:
            raise ValueError(f"`{argument}` must end with the path, such as http://localhost:8000/v1, got {shown!r}.")

        try:
            host.encode("idna")
        except UnicodeError:
            raise ValueError(f"`{argument}` {shown!r} has an invalid host name: correct it.") from None

        user = None if parts.username is None else f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return cls(shown, host, port, parts.scheme == "https", parts.path.rstrip("/").removesuffix("/v1"), user)


def read_key(
    key: str | None, argument: str = "`api_key`, which scripts take from the environment variable OPENAI_API_KEY,"
) -> str | None:
    """Strip a key of the white space that files and shells leave around it; `None` if nothing is left.

    Nothing that is printed later shows the key.

    Args:
        key: as it was given.
        argument: its name in an error.

    Raises:
        ValueError: if no header can hold the key; the message does not show it.
    """
    key = (key or "").strip()
    if not _is_plain(key):
        raise ValueError(f"{argument} must be printable ASCII without spaces; set it anew (it is not shown here).")

    if key:
        keep_secret(key)
    return key or None


def check_server(url: str, key: str | None) -> None:
    """Raise `ValueError` for an address or a key that cannot be used."""
    Address.read(url)
    read_key(key)


@dataclass(frozen=True)
class Reply:
    """A server's reply, whatever its status."""

    status: int
    reason: str
    headers: http.client.HTTPMessage
    content: bytes


class Connection:
    """One request at a time over a connection that is kept open.

    Args:
        address (`Address`): the server's. If it has user and password, these are sent instead of the key.
        key (`str`, *optional*): sent as a bearer token.
        timeout (`float`): seconds that one request may take altogether, from connecting to the last byte.
        largest (`int`, *optional*): bytes that a reply may have; `LARGEST_REPLY` if unset.

    `send` raises `OSError` or `http.client.HTTPException` if no reply came, and `ReplyTooLarge`.
    """

    def __init__(self, address: Address, key: str | None, timeout: float, largest: int | None = None):
        self.address, self.timeout = address, timeout
        self._largest = LARGEST_REPLY if largest is None else largest
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._secrets = [key] if key else []

        if key:
            self._headers["Authorization"] = f"Bearer {key}"

        if address.user is not None:
            encoded = base64.b64encode(address.user.encode()).decode()
            self._headers["Authorization"] = f"Basic {encoded}"
            self._secrets += [encoded, address.user, address.user.partition(":")[2]]

        self._http: http.client.HTTPConnection | None = None

    def send(self, method: str, path: str, payload: bytes | None = None) -> Reply:
        deadline = time.monotonic() + self.timeout
        kept_open = self._http is not None
        try:
            return self._send(method, path, payload, deadline)
        except ConnectionError:
            self.close()
            # a server may close an idle connection at the moment it is used again: nothing has failed
            if not kept_open:
                raise
        except BaseException:
            self.close()
            raise

        try:
            return self._send(method, path, payload, deadline)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    def abort(self) -> None:
        """End the request in flight, from a different thread; the server then drops it."""
        connection = self._http
        try:
            if connection is not None and connection.sock is not None:
                connection.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the request has ended already

    def hide(self, text: str) -> str:
        """Return a server's text as one printable line, without the secrets that were sent to it."""
        for secret in self._secrets:
            text = text.replace(secret, "***") if secret else text
        return "".join(letter if letter.isprintable() else " " for letter in text)

    def repeats_secret(self, text: str) -> bool:
        """Return whether a reply repeats a secret that was sent, so that it must not be written anywhere."""
        return any(len(secret) >= _ECHO and secret in text for secret in self._secrets)

    def _send(self, method: str, path: str, payload: bytes | None, deadline: float) -> Reply:
        connection = self._http or self._connect(deadline)
        connection.response_class = lambda sock, **options: http.client.HTTPResponse(
            _Timed(sock, deadline, self._largest), **options
        )

        connection.sock.settimeout(_left(deadline))
        connection.request(method, self.address.prefix + path, payload, self._headers)

        try:
            response = connection.getresponse()
            content = _content(response, self._largest)
        except ReplyTooLarge:
            raise
        except ValueError as problem:  # a chunk with a negative length
            raise http.client.HTTPException(f"a reply that is not HTTP ({type(problem).__name__})") from None

        if response.will_close:
            self.close()
        return Reply(response.status, response.reason, response.headers, content)

    def _connect(self, deadline: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.address.secure else http.client.HTTPConnection
        # always named: otherwise the end of an IPv6 address would be taken for a port
        port = self.address.port or kind.default_port
        connection = kind(self.address.host, port, timeout=min(CONNECT_TIMEOUT, _left(deadline)))
        connection.connect()
        self._http = connection
        return connection


class _Timed(io.RawIOBase):
    """A socket's input, until a deadline and up to a number of bytes."""

    def __init__(self, sock, deadline: float, most: int):
        self._sock, self._deadline, self._most, self._left = sock, deadline, most, most
        self._raw = sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        """`http.client` calls this on a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        self._sock.settimeout(_left(self._deadline))
        number = self._raw.readinto(buffer)
        self._left -= number or 0
        if self._left < 0:
            raise _too_large(self._most)

        return number

    def close(self) -> None:
        self._raw.close()
        super().close()


def _content(response: http.client.HTTPResponse, largest: int) -> bytes:
    """Read the body in pieces: the length that a server claims cannot be trusted."""
    if (response.length or 0) > largest:
        raise _too_large(largest)

    content = bytearray()
    while piece := response.read(_PIECE):
        content += piece

    if response.length:
        raise http.client.IncompleteRead(b"", response.length)

    return bytes(content)


def _too_large(largest: int) -> ReplyTooLarge:
    return ReplyTooLarge(f"a reply of more than {largest // 2**20} MiB")


def _left(deadline: float) -> float:
    """Return the seconds until the deadline; raise `TimeoutError`, as sockets do, if there are none left."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _without_user(url: str) -> str:
    """Return an address without user and password, even if it is malformed: a password may hold any character."""
    scheme, mark, rest = url.partition("://") if "://" in url else ("", "", url)
    before, _, shown = rest.rpartition("@")

    if "?" in before or "#" in before:
        shown = "***"  # a query that holds an @, or a password that holds a ?
    return scheme + mark + shown.partition("?")[0].partition("#")[0]
