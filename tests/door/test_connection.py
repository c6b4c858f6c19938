"""One request has a deadline and a size, whatever the server does; addresses and keys are looked at before."""

import base64
import http.client

import pytest
from chat_server import HOSTILE, ChatServer

from hf_eagle.answers.chat_client import ChatClient, ServerError
from hf_eagle.door import connection as module
from hf_eagle.door.connection import Address, Connection, ReplyTooLarge, check_server, read_key


HI = {"model": "target", "messages": [{"role": "user", "content": "Hi"}]}
SLOW = ["drip", "drip of headers", "drip in one header", "drip of chunks", "continue for ever", "silence"]
LARGE = ["claimed length", "no length", "chunk of a claimed length", "long header"]


def connect(server: ChatServer, **arguments) -> Connection:
    return Connection(Address.read(server.url), arguments.pop("key", None), **{"timeout": 20.0, **arguments})


@pytest.mark.parametrize("fault", SLOW)
def test_the_deadline_is_of_the_whole_request(fault):
    with ChatServer(hostile=lambda path: fault) as server:
        with pytest.raises((TimeoutError, http.client.HTTPException)):
            connect(server, timeout=0.3).send("GET", "/v1/models")


@pytest.mark.parametrize("fault", LARGE)
def test_a_reply_has_a_size(fault, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_REPLY", 300_000)
    with ChatServer(hostile=lambda path: fault) as server:
        with pytest.raises((ReplyTooLarge, http.client.HTTPException)):
            connect(server).send("GET", "/v1/models")


@pytest.mark.parametrize("fault", sorted(HOSTILE))
def test_every_fault_ends_in_a_sentence(fault, monkeypatch):
    """Of every path that a server has, and never in what the standard library raises."""
    monkeypatch.setattr(module, "LARGEST_REPLY", 300_000)
    with ChatServer(hostile=lambda path: fault, prompt_ids=lambda messages: [1]) as server:
        client = ChatClient(server.url, "sk-planted-secret", timeout=0.3, retries=0)
        for ask in (client.models, lambda: client.chat(HI), lambda: client.complete({"prompt": "x"})):
            with pytest.raises(ServerError) as caught:
                ask()
            assert "sk-planted" not in str(caught.value) and str(caught.value).isprintable()
        assert client.prompt_ids(HI) is None


def test_an_idle_connection_is_made_anew_once():
    with ChatServer() as server:
        connection = connect(server)
        assert connection.send("GET", "/v1/models").status == 200
        server.hostile = lambda path: "other protocol"
        with pytest.raises(http.client.HTTPException):
            connection.send("GET", "/v1/models")
        server.hostile = None
        assert connection.send("GET", "/v1/models").status == 200
        connection.close()


def test_a_redirect_carries_no_key():
    """Nor anything else: it is not followed."""
    reached = []
    with ChatServer(hostile=lambda path: reached.append(path)) as other:
        fault = (307, "elsewhere", {"Location": f"{other.url}/v1/chat/completions"})
        with ChatServer(fault=lambda *_: fault) as server:
            with pytest.raises(ServerError, match="with 307 .*redirects are not followed, so set `server_url`"):
                ChatClient(server.url, "sk-planted-secret", retries=0).chat(HI)
    assert reached == []


@pytest.mark.parametrize(
    ("url", "host", "port", "prefix", "user", "shown"),
    [
        ("http://localhost:8000", "localhost", 8000, "", None, "http://localhost:8000"),
        (" https://h/v1/ ", "h", None, "", None, "https://h/v1/ "),
        ("http://h/api/v1", "h", None, "/api", None, "http://h/api/v1"),
        ("http://[::1]:80", "::1", 80, "", None, "http://[::1]:80"),
        ("http://[::1]", "::1", None, "", None, "http://[::1]"),
        ("http://me:pw@h:1/v1", "h", 1, "", "me:pw", "http://h:1/v1"),
        ("http://me:p%40w@h", "h", None, "", "me:p@w", "http://h"),
        ("http://me@h", "h", None, "", "me:", "http://h"),
    ],
)
def test_addresses(url, host, port, prefix, user, shown):
    found = Address.read(url)
    assert (found.host, found.port, found.prefix, found.user) == (host, port, prefix, user)
    assert found.shown.strip() == shown.strip()
    connection = Connection(found, "sk-key", 1.0)
    encoded = f"Basic {base64.b64encode((user or '').encode()).decode()}"
    assert connection._headers["Authorization"] == ("Bearer sk-key" if user is None else encoded)


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8000", "ftp://x", "http://", "http://h:0", "http://h:99999", "http://h:x", "http://h:-1"),
        *("http://me:secret@h:99999", "http://me:sec?ret@h", "me:secret@h:80", "http://me:secret@", "//me:secret@h"),
        *("http://h/a b", "http://h\nX: 1", "http://h/é", "http://a..b", f"http://{'a' * 70}", "http://[::1"),
        *("http://h?key=secret", "http://h/#secret", "http://me:secret@h?key=a@secret", "http://me:s://secret@h:x"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_and_no_password_shown(url):
    with pytest.raises(ValueError, match="`server_url`") as caught:
        check_server(url, None)
    assert "secret" not in str(caught.value) and "sec?ret" not in str(caught.value)


def test_keys():
    assert read_key("sk-a\n") == read_key("  sk-a\t") == "sk-a"
    assert read_key(None) is read_key("") is read_key(" \n") is None
    for key in ("sk-secret\nX: 1", "sk-sécret", "sk secret", "sk-secret\0", "sk-secret\x7f", "\ud800secret"):
        with pytest.raises(ValueError, match="`api_key`, .* OPENAI_API_KEY, must be printable ASCII") as caught:
            ChatClient("http://localhost", key)
        assert "secret" not in str(caught.value)


def test_the_user_of_an_address_is_sent():
    with ChatServer(hostile=lambda path: "echo with 404") as server:
        url = server.url.replace("http://", "http://me:password@")
        with pytest.raises(ServerError, match=r"with 404 Not Found: bad key Basic \*\*\*;") as caught:
            ChatClient(url, retries=0).chat(HI)
        assert "password" not in str(caught.value) and server.url in str(caught.value)
