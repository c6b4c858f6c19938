"""No key, token or password is printed or written, however a server fails, answers or repeats what it was sent."""

import base64
import io
import json
import logging
import runpy
import sys

import pytest
from chat_server import HOSTILE, ChatServer
from forks import ROOT
from tiny_tokenizer import CHATML, tiny_tokenizer

from hf_eagle.answers import chat_client
from hf_eagle.door import connection as connection_module


KEY, TOKEN, PASSWORD = "sk-planted-key-0001", "hf_plantedtoken0002", "planted-password-0003"
SECRETS = (KEY, TOKEN, PASSWORD, base64.b64encode(f"me:{PASSWORD}".encode()).decode())
# each fault of the first request, or of those alone that come after it: one way with a key, the other with a password
FAULTS = [(fault, ("/v1/models", "/v1/c")[::step]) for fault, step in zip(sorted(HOSTILE), [1, -1] * 50, strict=False)]
SCRIPTS = {
    "regenerate_answers": {"data": "prompts.jsonl", "num_records": 2},
    "write_prompts": {"num_prompts": 2},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat_client, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(connection_module, "LARGEST_REPLY", 100_000)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tiny_tokenizer(CHATML).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def planted(monkeypatch, tmp_path, script: str, target, url: str) -> list[str]:
    """A command line with secrets all around it: those of the server in its address, in a YAML file."""
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "what is 1?"}\n{"prompt": "what is 2?"}\n')
    common = {"target": str(target), "output": "out.jsonl", "server_url": url, "retries": 1, "request_timeout": 0.2}
    (tmp_path / "planted.yaml").write_text(
        json.dumps(common | {"concurrency": 2, "max_new_tokens": 4} | SCRIPTS[script])
    )
    return [str(ROOT / "scripts" / f"{script}.py"), "--config", "planted.yaml"]


def run(argv: list[str], monkeypatch, capsys) -> str:
    """All that a script says: what it prints and what it logs."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    monkeypatch.setattr(sys, "argv", argv)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit:
        pass
    finally:
        logging.getLogger().removeHandler(handler)
    said = capsys.readouterr()
    return said.out + said.err + log.getvalue()


def written(tmp_path) -> str:
    """All that stands in files, but for the one that the secrets are planted in."""
    paths = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "planted.yaml"]
    return "".join(path.read_text(errors="replace") for path in paths)


@pytest.mark.parametrize("script", sorted(SCRIPTS))
@pytest.mark.parametrize("in_address", [False, True])
def test_no_secret_is_told_whatever_the_server_does(script, in_address, target, tmp_path, monkeypatch, capsys):
    for number, (fault, paths) in enumerate(FAULTS):
        path = paths[in_address]
        hostile = lambda asked, fault=fault, path=path: fault if asked.startswith(path) else None  # noqa: E731
        with ChatServer(root=str(target), hostile=hostile) as server:
            url = server.url.replace("http://", f"http://me:{PASSWORD}@") if in_address else server.url
            folder = tmp_path / str(number)
            folder.mkdir()
            said = run(planted(monkeypatch, folder, script, target, url), monkeypatch, capsys)
        assert "error: " in said and "Traceback" not in said and " failed in " not in said, (fault, path, said)
        for secret in SECRETS:
            assert secret not in said + written(folder), (fault, path, said)


@pytest.mark.parametrize("script", sorted(SCRIPTS))
@pytest.mark.parametrize("port", [99999, "x", 0, 9])
def test_no_secret_is_told_of_an_address_that_cannot_be_used(script, port, target, tmp_path, monkeypatch, capsys):
    said = run(
        planted(monkeypatch, tmp_path, script, target, f"http://me:{PASSWORD}@127.0.0.1:{port}"), monkeypatch, capsys
    )
    assert "error: " in said and ("`server_url`" in said or "The server at http://127.0.0.1:9 failed" in said)
    assert not any(secret in said + written(tmp_path) for secret in SECRETS)
