"""An empty answer is none: it is counted with its reason, ends its record, and leaves no line without an answer."""

import json
import logging

import pytest
import torch
from chat_server import ChatServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_target import ScriptedTarget
from served_worker import regenerate as regenerate_served
from tiny_tokenizer import CHATML, assistant, tiny_tokenizer, user

from hf_eagle.answers.answer import Answer
from hf_eagle.answers.regeneration import regenerate_answers
from hf_eagle.data.conversations import build_dataset


BLANK = ["", " ", "\n\n", "\t \n"]


def chat(name: str, turns: int) -> dict:
    return {"messages": [message for n in range(turns) for message in (user(f"{name} {n}"), assistant("x"))]}


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(scripts: list[list[str]]) -> list[tuple[int, list[str]]]:
    """The answers of each line, up to the first blank one."""
    ends = [next((n for n, said in enumerate(script) if not said.strip()), len(script)) for script in scripts]
    return [(id, script[:end]) for id, (script, end) in enumerate(zip(scripts, ends, strict=True)) if end]


def written(path) -> list[tuple[int, list[str]]]:
    whole = {row["id"]: row for row in read(path)}
    assert all(row["finish_reason"] for row in whole.values())
    return [(id, [m["content"] for m in row["messages"] if m["role"] == "assistant"]) for id, row in whole.items()]


SAID = st.sampled_from([*BLANK, "four", "the cat"])
SCRIPTS = st.lists(st.lists(SAID, min_size=1, max_size=3), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scripts=SCRIPTS)
def test_records_end_before_an_empty_answer(tmp_path_factory, caplog, scripts):
    """In process, wherever they are; a call that finds the journal writes the same, and asks nothing."""
    tokenizer, folder = tiny_tokenizer(CHATML), tmp_path_factory.mktemp("empty")
    end = [tokenizer.eos_token_id]
    asked = {}

    class Target(ScriptedTarget):
        def generate(self, input_ids, attention_mask, generation_config):
            prompt = tokenizer.decode(input_ids[0])
            id = int(prompt.split("record")[1].split()[0])
            turn = asked[id] = asked.get(id, -1) + 1
            said = tokenizer(scripts[id][turn], add_special_tokens=False)["input_ids"]
            self._answers = iter([said + end])
            return super().generate(input_ids, attention_mask, generation_config)

    chats = [chat(f"record{id}", len(script)) for id, script in enumerate(scripts)]
    arguments = {"batch_size": 1, "max_new_tokens": 64, "progress": False}
    path, lines = folder / "answers.jsonl", expected(scripts)
    blank = sum(any(not said.strip() for said in script) for script in scripts)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="hf_eagle.answers.written_answers"):
        if not lines:
            with pytest.raises(ValueError, match=f"None of the {len(scripts)} records has an answer: {blank} answers"):
                regenerate_answers(Target(tokenizer, []), tokenizer, chats, path, **arguments)
            assert not path.exists()
            return
        regenerate_answers(Target(tokenizer, []), tokenizer, chats, path, **arguments)
    assert written(path) == lines
    told = f"{len(lines)} of {len(scripts)} records answered, {len(scripts) - len(lines)} without an answer"
    assert told in caplog.text
    counted = f"{blank} answers are empty or white space only (by `finish_reason`: {blank} stop), which is no answer"
    assert (counted in caplog.text) == bool(blank)
    assert len(build_dataset(read(path), tokenizer)) == len(read(path))

    before = path.read_bytes()
    path.unlink()
    regenerate_answers(ScriptedTarget(tokenizer, []), tokenizer, chats, path, **arguments)
    assert path.read_bytes() == before


@pytest.mark.parametrize("tells_ids", [False, True])
def test_a_servers_empty_answers_are_counted_with_their_reasons(tells_ids, tmp_path, caplog):
    tokenizer = tiny_tokenizer(CHATML)
    scripts = [["four", "the cat"], ["", "never"], [" \n"], ["a", "\n", "never"], ["four"]]
    reasons = {1: "content_filter", 2: "stop", 3: "stop"}

    def say(body):
        messages = body["messages"]
        # a server is greeted first, which is no record
        name, turn = messages[-1]["content"].split() if messages[0]["content"][:6] == "record" else ("record4", 0)
        id = int(name.removeprefix("record"))
        said = scripts[id][int(turn)]
        told = tokenizer(said, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        reason = "stop" if said.strip() else reasons[id]
        return (prompt if tells_ids else None), told, {"role": "assistant", "content": said}, reason

    chats = [chat(f"record{id}", len(script)) for id, script in enumerate(scripts)]
    path = tmp_path / "answers.jsonl"
    with ChatServer(say=say) as server, caplog.at_level(logging.INFO):
        regenerate_served(path, server.url, records=chats, tokenizer=tokenizer)
        before, kept = path.read_bytes(), (tmp_path / "answers.jsonl.journal").read_bytes()
        regenerate_served(path, server.url, records=chats, tokenizer=tokenizer)
    assert written(path) == expected(scripts) and path.read_bytes() == before
    assert (tmp_path / "answers.jsonl.journal").read_bytes() == kept  # nothing is asked again
    assert "3 of 5 records answered, 2 without an answer" in caplog.text
    assert "3 answers are empty or white space only (by `finish_reason`: 1 content_filter, 2 stop)" in caplog.text
    assert "First, record 1." in caplog.text


def test_a_journal_that_went_on_behind_an_empty_answer(tmp_path):
    """What an earlier version asked further is passed over where that can be told apart, and named where it cannot."""
    tokenizer = tiny_tokenizer(CHATML)
    with ChatServer() as server:
        chats = [chat("a", 2), chat("b", 1)]
        regenerate_served(tmp_path / "served", server.url, records=chats)
        journal = tmp_path / "served.journal"
        first, *rows = read(journal)
        for row in rows:
            if (row["id"], row["turn"]) == (0, 0):
                row["answer"]["message"]["content"] = " "
        journal.write_text("".join(json.dumps(row) + "\n" for row in (first, *rows)))
        regenerate_served(tmp_path / "served", server.url, records=chats)
    assert [row["id"] for row in read(tmp_path / "served")] == [1]

    said = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in "abcd"]
    arguments = {"batch_size": 2, "max_new_tokens": 8, "progress": False}
    chats = [chat("a", 2), chat("b", 2)]

    class Target(ScriptedTarget):
        def generate(self, input_ids, attention_mask, generation_config):
            return torch.cat([input_ids, torch.tensor([next(self._answers) for _ in input_ids])], 1)

    regenerate_answers(Target(tokenizer, said), tokenizer, chats, tmp_path / "out", **arguments)
    journal = tmp_path / "out.journal"
    first, *rows = read(journal)
    rows[0]["answers"][0][1]["message"]["content"] = ""
    journal.write_text("".join(json.dumps(row) + "\n" for row in (first, *rows)))
    with pytest.raises(ValueError, match=r"out.journal holds other records in batch 0 of turn 1; delete it."):
        regenerate_answers(Target(tokenizer, []), tokenizer, chats, tmp_path / "out", **arguments)


@pytest.mark.parametrize(
    ("message", "reason", "ids", "empty"),
    [
        *(({"content": blank}, "stop", ids, True) for blank in BLANK for ids in (None, [7])),
        ({"content": None}, "stop", None, True),
        ({"content": ""}, "length", None, True),
        ({"content": " "}, "length", [7], True),
        ({"content": ""}, "length", [7], False),  # cut before its text began
        ({"content": "", "reasoning_content": "hm"}, "stop", [7], False),
        ({"content": "", "tool_calls": [{}]}, "stop", [7], False),
        ({"content": " a"}, "stop", None, False),
    ],
)
def test_what_is_empty(message, reason, ids, empty):
    assert Answer(message, reason, ids).is_empty == empty
