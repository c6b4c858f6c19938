"""`max_new_tokens` is compared with what the target reads, and with what a server says that it reads."""

import importlib
import json
import sys

import pytest
from chat_server import ChatServer
from tiny_files import write_chats, write_tiny_target
from warm_python import ROOT

from hf_eagle.door.sentences import is_sentence


sys.path.insert(0, str(ROOT / "scripts"))

REGENERATE = ("regenerate_answers", "--data", "chats.jsonl", "--num_records", "2")
WRITE = ("write_prompts", "--num_prompts", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    write_tiny_target(folder / "target")
    write_chats(folder / "chats.jsonl")
    return folder


@pytest.fixture
def longest(folder) -> int:
    return json.loads((folder / "target" / "config.json").read_text())["max_position_embeddings"]


def run(command, folder, monkeypatch, *words):
    script, *argv = command
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, "--target", "target", "--output", "out.jsonl", *argv, *words])
    importlib.import_module(script).main()


@pytest.mark.parametrize(("command", "served"), [(REGENERATE, True), (REGENERATE, False), (WRITE, True)])
def test_more_than_the_target_reads_is_refused(command, served, folder, longest, monkeypatch):
    with ChatServer(model="target") as server:
        for tokens in (longest, longest + 1, 100_000):
            words = ["--max_new_tokens", str(tokens), *(["--server_url", server.url] if served else [])]
            with pytest.raises(
                ValueError, match=rf"^`max_new_tokens` is {tokens}, but `target` target reads {longest} "
            ):
                run(command, folder, monkeypatch, *words)
    assert not server.chats and not server.asked and not list(folder.glob("out*"))


@pytest.mark.parametrize("command", [REGENERATE, WRITE], ids=lambda command: command[0])
def test_more_than_the_server_reads_is_refused(command, folder, monkeypatch):
    with ChatServer(model="target") as server:
        for length in (8, 4, 1):
            server.listed[0]["max_model_len"] = length
            with pytest.raises(
                ValueError, match=rf"^`max_new_tokens` is 8, but .* reads and writes {length} "
            ) as problem:
                run(command, folder, monkeypatch, "--max_new_tokens", "8", "--server_url", server.url)
            assert is_sentence(problem.value)
    assert not server.chats and not list(folder.glob("out*"))


@pytest.mark.parametrize("told", [9, None])
def test_what_both_read_is_asked(told, folder, monkeypatch):
    """A server need not say how much it reads."""
    with ChatServer(model="target") as server:
        server.listed[0] = {"id": "target"} | ({"max_model_len": told} if told else {})
        run(REGENERATE, folder, monkeypatch, "--max_new_tokens", "8", "--server_url", server.url)
    assert server.chats
    for path in folder.glob("out*"):
        path.unlink()
