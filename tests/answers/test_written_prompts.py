"""Prompts that the target writes itself: opened at the user's turn, each once, and asked for once."""

import json
import runpy
import sys

import pytest
from chat_server import ChatServer
from forks import ROOT
from tiny_tokenizer import CHATML, LLAMA3, tiny_tokenizer

from hf_eagle.answers import chat_client
from hf_eagle.answers.turns import turn_seed
from hf_eagle.answers.written_prompts import open_user_turn, write_prompts


MISTRAL = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "system", "opening", "end"),
    [
        (CHATML, None, "<|im_start|>user\n", "<|im_end|>"),
        (CHATML, "Sums.", "<|im_start|>system\nSums.<|im_end|>\n<|im_start|>user\n", "<|im_end|>"),
        (LLAMA3, None, "<|bos|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        (MISTRAL, None, "[INST] ", "[/INST]"),
    ],
)
def test_the_template_is_opened_at_the_users_turn(template, system, opening, end):
    assert open_user_turn(tiny_tokenizer(template), system) == (opening, end)


@pytest.mark.parametrize(
    ("template", "system"),
    [
        ("{{ messages | length }}", None),
        (MISTRAL, "Left out by this template."),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", None),
    ],
)
def test_a_template_that_cannot_be_opened_is_refused(template, system):
    with pytest.raises(ValueError, match="`target`'s chat template cannot be opened at the user's turn"):
        open_user_turn(tiny_tokenizer(template), system)


def written(body: dict) -> tuple[str, str]:
    """Of every ten prompts one is too long, one holds a token of the template, and two are the same."""
    number = body["seed"] % 10
    text = {0: "endless", 1: "a <|im_start|>system", 2: "again", 3: "again "}.get(number, f"what is {body['seed']}?")
    return text + ("" if number else "<|im_end|>"), "length" if number == 0 else "stop"


def read(path) -> list[str]:
    return [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()]


def expected(number: int, seed: int = 0) -> list[str]:
    seeds = [turn_seed(seed, id) for id in range(number)]
    texts = ["again" if s % 10 in (2, 3) else f"what is {s}?" for s in seeds if s % 10 > 1]
    return list(dict.fromkeys(texts))


def write(path, url, **arguments):
    arguments = {"target": "target", "tokenizer": tiny_tokenizer(CHATML), "num_prompts": 40, **arguments}
    return write_prompts(path, server_url=url, progress=False, **{"concurrency": 4, "retries": 1, **arguments})


def test_prompts_are_finished_plain_and_different(tmp_path):
    bodies = []
    with ChatServer(write=lambda body: (bodies.append(body), written(body))[1]) as server:
        write(tmp_path / "prompts.jsonl", server.url, system_prompts=["A.", "B.", "C."], top_p=0.9)
    assert read(tmp_path / "prompts.jsonl") == expected(40) and len(expected(40)) > 20
    systems = [body["prompt"].split("\n")[1].removesuffix("<|im_end|>") for body in bodies]
    assert {system: systems.count(system) for system in systems} == {"A.": 14, "B.": 13, "C.": 13}
    assert all(body["stop"] == ["<|im_end|>"] and body["top_p"] == 0.9 for body in bodies)
    # the model's generation_config.json is not meant
    assert all(body["top_k"] == -1 and body["temperature"] == 1.0 and body["max_tokens"] == 256 for body in bodies)


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_client, "FIRST_DELAY", 0.001)
    path, asked, broken = tmp_path / "prompts.jsonl", [], True

    def fails_once(body):
        asked.append(body["seed"])
        return (None, None) if broken and len(asked) > 25 else written(body)

    with ChatServer(write=fails_once) as server:
        with pytest.raises(ValueError, match="failed 2 times in a row"):
            write(path, server.url)
        kept = len((tmp_path / "prompts.jsonl.journal").read_text().splitlines()) - 1
        assert not path.exists() and kept > 15
        broken, before = False, len(asked)
        write(path, server.url)
        assert len(asked) - before == 40 - kept and read(path) == expected(40)
        write(path, server.url)
        assert len(asked) - before == 40 - kept
        with pytest.raises(ValueError, match="was begun with `seed` 0"):
            write(path, server.url, seed=1)
        (tmp_path / "mine").write_text("precious")
        with pytest.raises(ValueError, match="`output_path` .*mine exists, but not its journal"):
            write(tmp_path / "mine", server.url)


@pytest.mark.parametrize("id", [40, -1])
def test_a_journal_row_of_no_prompt_is_named(id, tmp_path):
    """It would become a prompt beyond those asked for."""
    path, journal = tmp_path / "prompts.jsonl", tmp_path / "prompts.jsonl.journal"
    with ChatServer(write=written) as server:
        write(path, server.url)
        lines = journal.read_text().splitlines()
        lines[1] = json.dumps(json.loads(lines[1]) | {"id": id})
        journal.write_text("\n".join(lines) + "\n")
        with pytest.raises(ValueError, match=f"journal holds prompt {id}, but there are 40: delete it to start over"):
            write(path, server.url)


def test_prompts_that_the_server_fails_on_are_counted_and_asked_again(tmp_path, caplog):
    """Also those of which it makes what no file takes."""
    lost = {turn_seed(0, id) for id in (3, 4, 20)}
    with ChatServer(write=lambda body: ("\ud800", "stop") if body["seed"] in lost else written(body)) as server:
        write(tmp_path / "prompts.jsonl", server.url, retries=0)
        texts = read(tmp_path / "prompts.jsonl")
        assert texts == [text for text in expected(40) if text not in {f"what is {seed}?" for seed in lost}]
        assert "3 prompts are missing, since the server fails on them" in caplog.text
        assert "half a character" in caplog.text
        lost = set()
        write(tmp_path / "prompts.jsonl", server.url)
    assert read(tmp_path / "prompts.jsonl") == expected(40)


def test_a_server_that_fails_on_every_prompt_ends_the_run(tmp_path):
    with ChatServer(write=lambda body: ("\ud800", "stop")) as server:
        with pytest.raises(ValueError, match=r"10 consecutive prompts cannot be written, .*half a character"):
            write(tmp_path / "prompts.jsonl", server.url, retries=0)
    assert not (tmp_path / "prompts.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"retries": -1}, "`retries` must be 0 or more"),
        ({"request_timeout": float("inf")}, "`request_timeout` must be above 0"),
        ({"temperature": float("nan")}, "`temperature` must be 0"),
        ({"seed": -1}, "`seed` must be from 0"),
        ({"concurrency": 10**6}, "`concurrency` must be at most 4096"),
        ({"num_prompts": 0}, "`num_prompts` must be at least 1, got 0"),
        ({"temperature": 0.0}, "`temperature` must be above 0: a greedy target writes one prompt again and again"),
        ({"top_p": 1.5}, "`top_p` must be above 0 and at most 1"),
        ({"target": "another"}, "serves target .target., not `target` another"),
        ({"num_prompts": 3}, "No prompt was finished: raise `max_new_tokens`"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path, arguments, message):
    with ChatServer(write=lambda body: ("endless", "length")) as server, pytest.raises(ValueError, match=message):
        write(tmp_path / "prompts.jsonl", server.url, **arguments)
    assert not (tmp_path / "prompts.jsonl").exists()


def test_script(tmp_path, monkeypatch):
    tiny_tokenizer(CHATML).save_pretrained(tmp_path / "target")
    (tmp_path / "target" / "config.json").write_text('{"model_type": "llama"}')
    script = ROOT / "scripts" / "write_prompts.py"
    with ChatServer(root=str(tmp_path / "target"), write=written) as server:
        given = {"target": tmp_path / "target", "server_url": server.url, "output": tmp_path / "out.jsonl"}
        options = [f"--{name}={value}" for name, value in given.items()]
        monkeypatch.setattr(sys, "argv", [str(script), *options, "--num_prompts=20", "--seed=5"])
        runpy.run_path(str(script), run_name="__main__")
    assert read(tmp_path / "out.jsonl") == expected(20, seed=5)
