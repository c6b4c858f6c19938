"""Files of features over HTTP: only to who brings the token, only files of the connector's names."""

import http.client
import os

import pytest

from hf_eagle.serving.connector.feature_port import TOKEN, FeaturePort
from hf_eagle.targets import feature_client


NAME = "0123456789abcdef" * 2
SECRET = "a-long-secret"


@pytest.fixture
def port(tmp_path):
    (tmp_path / "features").mkdir()
    (tmp_path / "other.safetensors").write_bytes(b"mine")
    with FeaturePort(tmp_path / "features", "127.0.0.1", 0, SECRET) as port:
        yield port
        port.shutdown()


def ask(port, method, path, token=SECRET):
    connection = http.client.HTTPConnection("127.0.0.1", port.server_port, timeout=20)
    try:
        connection.putrequest(method, path)
        if token is not None:
            connection.putheader("Authorization", token if token.startswith("Basic") else f"Bearer {token}")
        connection.endheaders()
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_a_file_is_sent_and_deleted(port):
    content = os.urandom(3 * 2**20 + 7)
    (port.folder / f"{NAME}.safetensors").write_bytes(content)
    assert ask(port, "GET", f"/{NAME}") == (200, content)
    assert ask(port, "GET", f"/{NAME}") == (200, content)  # until it is deleted, an attempt may be repeated
    assert ask(port, "DELETE", f"/{NAME}") == (200, b"")
    assert ask(port, "GET", f"/{NAME}")[0] == 404 and not any(port.folder.iterdir())
    assert ask(port, "DELETE", f"/{NAME}")[0] == 200


def test_the_reason_of_a_failure_is_sent(port):
    (port.folder / f"{NAME}.failed").write_text("OSError: full")
    assert ask(port, "GET", f"/{NAME}") == (409, b"OSError: full")
    ask(port, "DELETE", f"/{NAME}")
    assert not any(port.folder.iterdir())


@pytest.mark.parametrize("token", [None, "", "another", SECRET + "x", SECRET[:-1], "Basic abc", "\xe9"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_nothing_is_done_without_the_token(port, method, token):
    (port.folder / f"{NAME}.safetensors").write_bytes(b"states")
    assert ask(port, method, f"/{NAME}", token) == (401, b"another token")
    assert (port.folder / f"{NAME}.safetensors").read_bytes() == b"states"


PATHS = ["/", "/../other", "/%2e%2e/other", f"/{NAME}.safetensors", f"/{NAME}/", f"/{NAME[:16]}"]


@pytest.mark.parametrize("path", [*PATHS, f"/{NAME}?x", f"/{NAME[:-1]}", f"/{NAME}0"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_no_other_path_names_a_file(port, method, path):
    (port.folder / f"{NAME}.safetensors").write_bytes(b"states")
    assert ask(port, method, path)[0] == 404
    assert (port.folder / f"{NAME}.safetensors").exists()
    assert (port.folder.parent / "other.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("token", [None, "", "  ", "two words"])
def test_without_a_token_no_port_is_opened(tmp_path, token):
    with pytest.raises(ValueError, match=f"environment variable {TOKEN} is not set"):
        FeaturePort(tmp_path, "127.0.0.1", 0, token)


def test_trainer_and_server_read_the_same_variable():
    """Neither may import the other's."""
    assert feature_client.TOKEN == TOKEN
