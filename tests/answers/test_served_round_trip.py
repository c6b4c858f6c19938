"""Answers of a server, of each family of templates: the same lines as in process, which are what is trained on."""

import json
import logging

import pytest
from chat_server import ChatServer
from scripted_target import ScriptedTarget
from template_families import FAMILIES, family_tokenizer
from test_round_trip import HARMONY, OPENED, SAID, THOUGHT, assert_said_is_trained_on, tokens
from tiny_tokenizer import assistant, user

from hf_eagle.answers.chat_client import ServerError
from hf_eagle.answers.regeneration import regenerate_answers
from hf_eagle.answers.served_answers import regenerate_through_server
from hf_eagle.data.conversations import build_dataset


def script(tokenizer, said: list[str], asked: list, splits: bool = False):
    """Says these, one a turn, behind prompts that the tokenizer's own template makes; the greeting gets the first."""

    def say(body):
        options = {"tools": body.get("tools"), **body.get("chat_template_kwargs", {})}
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True, **options)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        ids = tokens(tokenizer, said[turn])
        if body["max_tokens"] > 1:
            asked.append((prompt, ids))
        message = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        if splits:
            message = {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": []}
        return prompt, ids, message, "length" if said[turn].endswith("...") else "stop"

    return say


def served(tmp_path, tokenizer, say, records, **options):
    path = tmp_path / "served.jsonl"
    with ChatServer(say=say) as server:
        regenerate_through_server(
            records,
            path,
            server_url=server.url,
            target="target",
            tokenizer=tokenizer,
            max_new_tokens=64,
            progress=False,
            **options,
        )
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def questions(number: int) -> dict:
    return {"messages": [message for n in range(number) for message in (user(f"what is {n}?"), assistant("x"))]}


@pytest.mark.parametrize("splits", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lines_are_those_of_the_target_in_process(tmp_path, family, splits):
    """Also where the server splits thoughts off, since the token ids tell all."""
    tokenizer, asked = family_tokenizer(family), []
    records = [questions(len(SAID[family]))]
    lines = served(tmp_path, tokenizer, script(tokenizer, SAID[family], asked, splits), records)
    assert_said_is_trained_on(build_dataset(lines, tokenizer), asked)
    target = ScriptedTarget(tokenizer, [tokens(tokenizer, said) for said in SAID[family]])
    path = tmp_path / "in_process.jsonl"
    regenerate_answers(target, tokenizer, records, path, batch_size=1, max_new_tokens=64, progress=False)
    assert lines == [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_a_run_that_goes_on_writes_the_same(tmp_path):
    tokenizer = family_tokenizer("qwen3")
    said, records = [THOUGHT, "four", THOUGHT], [questions(3)] * 4
    whole = served(tmp_path, tokenizer, script(tokenizer, said, []), records)
    journal = tmp_path / "served.jsonl.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:6]))
    assert served(tmp_path, tokenizer, script(tokenizer, said, []), records) == whole


def test_options_and_tools_reach_the_server(tmp_path):
    tokenizer, asked = family_tokenizer("qwen3"), []
    tools = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]
    options, records = {"enable_thinking": False}, [questions(1), questions(1) | {"tools": tools}]
    lines = served(tmp_path, tokenizer, script(tokenizer, ["four"], asked), records, template_kwargs=options)
    assert [line.get("tools") for line in lines] == [None, tools]
    prompts = [tokenizer.decode(prompt) for prompt, _ in asked]
    assert all(prompt.endswith("<think>\n\n</think>\n\n") for prompt in prompts)
    assert sum("look" in prompt for prompt in prompts) == 1
    assert_said_is_trained_on(build_dataset(lines, tokenizer, template_kwargs=options), asked)


@pytest.mark.parametrize(
    ("family", "said", "kept"),
    [
        ("smollm2", " four \n", True),
        ("qwen3", THOUGHT, True),
        ("deepseek_v3", OPENED, False),
        ("gptoss", HARMONY, False),
    ],
)
def test_without_ids_texts_are_compared(tmp_path, caplog, family, said, kept):
    """A line of the log says so; an answer that the template does not write as it was said is refused."""
    caplog.set_level(logging.INFO)
    tokenizer = family_tokenizer(family)
    say = script(tokenizer, [said], [])

    def silent(body):
        return say({**body, "return_token_ids": None})[:1] + (None,) + say(body)[2:]

    if not kept:
        with pytest.raises(ValueError, match="None of the 1 answered records .* the chat template makes"):
            served(tmp_path, tokenizer, silent, [questions(1)])
    else:
        (line,) = served(tmp_path, tokenizer, silent, [questions(1)])
        assert line["messages"][1]["content"].strip() == said.strip() and "answer_token_ids" not in line
        assert len(build_dataset([line], tokenizer)) == 1
    assert "reports no token ids, so answers are compared with the rows of training as text" in caplog.text


def test_thoughts_that_are_split_off_need_ids(tmp_path):
    tokenizer = family_tokenizer("qwen3")
    say = script(tokenizer, [THOUGHT], [], splits=True)
    with pytest.raises(ServerError, match="start it without its reasoning parser"):
        served(tmp_path, tokenizer, lambda body: (None, None, *say(body)[2:]), [questions(1)])


def test_records_of_which_the_server_makes_another_prompt_are_refused(tmp_path, caplog):
    """Those whose prompts were not looked at before the run, too."""
    tokenizer = family_tokenizer("smollm2")
    say = script(tokenizer, ["four"], [])

    def odd(body):
        prompt, *rest = say(body)
        return (prompt[1:] if "what is 1" in json.dumps(body) else prompt, *rest)

    records = [{"messages": [user(f"what is {n}?")]} for n in range(9)]
    lines = served(tmp_path, tokenizer, odd, records)
    assert [line["id"] for line in lines] == [0, 2, 3, 4, 5, 6, 7, 8]
    assert "1 records are left out" in caplog.text and "record 1: " in caplog.text
