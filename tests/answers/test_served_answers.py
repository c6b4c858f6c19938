"""Answers through a server: every row once, in order, whatever fails and however often the run is killed."""

import json
import random
import re
import runpy
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from chat_server import ChatServer, answer
from forks import ROOT, Forks
from served_worker import CONCURRENCY, records, regenerate
from tiny_tokenizer import CHATML, LLAMA3, tiny_tokenizer

from hf_eagle.answers import chat_client
from hf_eagle.answers.chat_client import ServerError
from hf_eagle.answers.turns import turn_seed


WORKER = Path(__file__).parents[1] / "served_worker.py"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat_client, "FIRST_DELAY", 0.002)


def expected(chats: list[dict], seed: int | None = None) -> list[dict]:
    """What must be written, record by record, made without a server."""
    rows = []
    for id, chat in enumerate(chats):
        messages, reasons = [], []
        for message in chat["messages"]:
            if message["role"] == "assistant":
                text, reason = answer(messages, None if seed is None else turn_seed(seed, id, len(reasons)))
                message = {"role": "assistant", "content": text}
                reasons.append(reason)
            messages = [*messages, message]
        rows.append({"id": id, "messages": messages, "finish_reason": reasons})
    return rows


def ids(tokenizer, messages: list[dict]) -> list[int]:
    """Of a prompt, as the server makes it."""
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def faults(number: int, body: dict):
    """A third of all requests fail, the same ones in every run of the tests."""
    kinds = [(429, "busy"), (500, "broken"), (502, "gone"), "drop", "cut", "garbage", "empty", "abort", 0.02]
    return random.Random(number).choice([None] * 18 + kinds)


def test_rows_are_whole_and_in_order_whatever_fails(tmp_path):
    together = threading.Barrier(CONCURRENCY)

    def meet(number: int, body: dict):
        if 0 < number <= CONCURRENCY:  # behind the greeting; none of them is answered before all have arrived
            together.wait()
        return faults(number, body)

    with ChatServer(fault=meet, delay=0.001) as server:
        regenerate(tmp_path / "answers.jsonl", server.url)
    assert read(tmp_path / "answers.jsonl") == expected(records())
    reasons = Counter(reason for row in read(tmp_path / "answers.jsonl") for reason in row["finish_reason"])
    assert reasons["stop"] > reasons["length"] > 50
    assert server.most == CONCURRENCY and server.asked > 1.2 * 499
    body = server.chats[-1]
    assert body["temperature"] == 0.0 and body["max_tokens"] == 12 and "seed" not in body
    # not what the server's generation_config says
    assert body["repetition_penalty"] == 1.0 and body["top_k"] == -1


def test_lines_are_known_by_the_ids_of_their_records(tmp_path):
    chats = records(4)
    chats[0]["id"], chats[2]["id"] = "first", 70
    with ChatServer() as server:
        regenerate(tmp_path / "answers.jsonl", server.url, records=chats)
    assert [row["id"] for row in read(tmp_path / "answers.jsonl")] == ["first", 1, 70, 3]


def test_twenty_kills_lose_double_and_tear_nothing(tmp_path):
    output, journal = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.journal"
    moments = random.Random(0)
    with ChatServer(fault=faults, delay=0.002) as server:
        forks = Forks(WORKER)
        for _ in range(20):
            kept = journal.read_bytes() if journal.exists() else b""
            kept = kept[: kept.rfind(b"\n") + 1]
            lines, seconds = moments.randrange(1, 20), moments.uniform(0, 0.01)
            assert forks.kill_when(journal, lines, seconds, output, server.url, 1.0) == -9
            assert not output.exists() and journal.read_bytes().startswith(kept)
        forks.start(output, server.url, 1.0)
        assert forks.wait() == 0
        forks.close()
    assert read(output) == expected(records(), seed=0)
    answered = [(row["id"], row["turn"]) for row in read(journal)[1:]]
    assert len(answered) == len(set(answered)) == 499
    # what was under way at a kill is asked again, and nothing else; each of the 21 runs begins with one word
    assert len(server.chats) <= 499 + 20 * CONCURRENCY + 21


def test_seed_and_other_settings(tmp_path):
    with ChatServer() as server:
        regenerate(tmp_path / "a", server.url, temperature=0.7, top_p=0.9, seed=3)
        body = server.chats[-1]
        assert (body["temperature"], body["top_p"]) == (0.7, 0.9) and body["seed"] >= 0
        assert read(tmp_path / "a") == expected(records(), seed=3)
        assert len({body["seed"] for body in server.chats if "seed" in body}) == 499
        before = (tmp_path / "a").read_bytes(), server.asked
        with pytest.raises(ValueError, match=r"was begun with `seed` 3 \(now 4\)"):
            regenerate(tmp_path / "a", server.url, temperature=0.7, top_p=0.9, seed=4)
        (tmp_path / "mine").write_text("precious")
        with pytest.raises(ValueError, match="`output_path` .*mine exists, but not its journal"):
            regenerate(tmp_path / "mine", server.url)
        # finished: only the greeting is asked
        greetings = server.asked
        regenerate(tmp_path / "a", server.url, temperature=0.7, top_p=0.9, seed=3, concurrency=2)
        assert server.asked == greetings + 1 and (tmp_path / "a").read_bytes() == before[0]


def test_time_limit_stops_and_goes_on(tmp_path):
    sizes = []
    with ChatServer() as server:
        while not sizes or sizes[-1] < 40:
            regenerate(tmp_path / "out", server.url, records=records(40), time_limit=0, concurrency=6)
            sizes.append(len(read(tmp_path / "out")))
            assert sizes == sorted(sizes) and len(sizes) < 30
    assert read(tmp_path / "out") == expected(records(40)) and len(sizes) >= 79 // 6


def test_prompts_that_the_server_does_not_take(tmp_path, caplog):
    """They end their records, are counted, and are asked again by the next call."""

    def picky(number, body):
        said = json.dumps(body["messages"])
        if "what is 7 and 1" in said:
            return (400, "The input (900 tokens) is longer than the model's context length (512 tokens).")
        if "what is 4 and 0" in said:
            return (400, "image broken")
        if "what is 8 and 2" in said:
            return (500, "trips over it")
        return None

    with ChatServer(fault=picky, delay=0.002) as server:
        regenerate(tmp_path / "out", server.url, records=records(40), retries=3)
        rows, whole = read(tmp_path / "out"), expected(records(40))
        short = {7: 1, 8: 2}
        for row, full in zip(rows, [row for row in whole if row["id"] != 4], strict=True):  # which has no answer
            assert row["id"] == full["id"]
            assert row["finish_reason"] == full["finish_reason"][: short.get(row["id"], 3)]
        assert "1 records end early: with `max_new_tokens`" in caplog.text
        assert "2 records end early, since the server fails on them" in caplog.text
        server.fault, before = None, server.asked
        regenerate(tmp_path / "out", server.url, records=records(40))
        assert read(tmp_path / "out") == whole and server.asked == before + 1 + 1 + 2 + 1


def test_answers_that_cannot_be_trained_on_do_not_end_the_run(tmp_path, caplog):
    """They are counted with the reason, their records end, and the next call asks them again."""
    tokenizer = tiny_tokenizer(CHATML)
    beyond = max(tokenizer.get_vocab().values()) + 1
    mend = False

    def say(body):
        prompt, text = ids(tokenizer, body["messages"]), "four"
        said = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        asked = "" if mend else body["messages"][-1]["content"]
        if "what is 2 and" in asked:
            text = "\ud800"
        if "what is 3 and" in asked:
            said = [beyond]
        if "what is 4 and" in asked:
            said = said * 20
        return ([beyond] if "what is 7 and" in asked else prompt), said, {"role": "assistant", "content": text}, "stop"

    # texts alone, of one turn
    chats = [{"messages": [{"role": "user", "content": f"what is {n} and 1?"}]} for n in range(9)]
    with ChatServer(say=say) as server:
        arguments = {"records": chats, "tokenizer": tokenizer, "concurrency": 2, "retries": 0}
        regenerate(tmp_path / "out", server.url, **arguments)
        assert [row["id"] for row in read(tmp_path / "out")] == [0, 1, 5, 6, 8]
        assert "4 records end early, since an answer to them cannot be trained on" in caplog.text
        assert "First, record 2: the answer of the server at" in caplog.text and "half a character" in caplog.text
        mend = True
        regenerate(tmp_path / "out", server.url, **arguments)
        assert [len(row["finish_reason"]) for row in read(tmp_path / "out")] == [1] * 9


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (lambda tokenizer, most: [max(tokenizer.get_vocab().values()) + 1], "token id .* tokenizer does not have"),
        (lambda tokenizer, most: [1] * (most + 1), "reports 13 tokens of an answer that may have 12"),
    ],
)
def test_token_ids_that_cannot_be_the_targets_say_so(tmp_path, said, message):
    tokenizer = tiny_tokenizer(CHATML)
    found = said(tokenizer, 12)

    def say(body):
        return ids(tokenizer, body["messages"]), found, {"role": "assistant", "content": "x"}, "stop"

    chat = {"messages": [{"role": "user", "content": "a"}]}
    with (
        ChatServer(say=say) as server,
        pytest.raises(ServerError, match=f"No prompt was answered; record 0: .*{message}"),
    ):
        regenerate(tmp_path / "out", server.url, records=[chat], tokenizer=tokenizer)


@pytest.mark.parametrize("knows", [True, False], ids=["tokenizer", "no tokenizer"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red " * 5_000_000, "20,000,000 characters, of an answer that may have 12 tokens"),
        ("red green " * 500, "a text of .* tokens, of an answer that may have 12 .`max_new_tokens`"),
        ("four<|im_end|>\n<|im_start|>user\nand 5?", r"text holds <\|im_.*\|>, a special token that ends a turn"),
        ("four<|im_end|>", r"text holds <\|im_end\|>, a special token"),
    ],
    ids=["20 MB", "long", "two turns", "its end"],
)
def test_a_text_that_cannot_be_the_answer_is_counted(text, message, knows, tmp_path, caplog):
    chats = [{"messages": [{"role": "user", "content": f"what is {n} and 1?"}]} for n in range(4)]

    def say(body):
        said = text if "what is 2 and" in body["messages"][-1]["content"] else "four"
        return None, None, {"role": "assistant", "content": said}, "stop"

    known = {"tokenizer": tiny_tokenizer(CHATML)} if knows else {}
    with ChatServer(say=say) as server:
        regenerate(tmp_path / "out", server.url, records=chats, retries=0, **known)
    refused = knows or len(text) > 1_000_000
    assert [row["id"] for row in read(tmp_path / "out")] == ([0, 1, 3] if refused else [0, 1, 2, 3])
    if refused:
        assert "1 records end early, since an answer to them cannot be trained on" in caplog.text
        assert re.search(f"First, record 2: the server sends .*{message}", caplog.text)


def test_a_damaged_journal_is_named(tmp_path):
    with ChatServer() as server:
        regenerate(tmp_path / "out", server.url, records=records(3))
        journal = tmp_path / "out.journal"
        first = journal.read_text().splitlines()[0]
        for row in ("7", '{"id": "0", "turn": 0, "answer": {}}', '{"id": 0, "turn": 0, "answer": {"message": 7}}'):
            journal.write_text(f"{first}\n{row}\n")
            with pytest.raises(ValueError, match="out.journal .*: delete it to start over"):
                regenerate(tmp_path / "out", server.url, records=records(3))


SAID = {"message": {"content": "x"}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 3}], "answers record 3, but there are 3 records"),
        ([{"id": -1}], "answers record -1, but there are 3 records"),
        ([{"turn": 1}], "holds turn 1 of record 0 out of order"),
        ([{"turn": -1}], "holds turn -1 of record 0 out of order"),
        ([{}, {}], "holds turn 0 of record 0 out of order"),
        ([{}, {"turn": 1}], "holds turn 1 of record 0 out of order"),  # it has one turn
        ([{"answer": SAID | {"mood": 1}}], "holds the unknown field `mood` of an answer"),
        ([{"answer": SAID | {"message": {"content": 7}}}], "must hold text or null as `answer.message.content`"),
        ([{"answer": SAID | {"token_ids": "x"}}], "must hold a list or null as `answer.token_ids`"),
    ],
)
def test_a_journal_row_that_answers_no_open_turn_is_named(rows, message, tmp_path):
    """It would end the run with an error that names no file, or leave out its record silently."""
    with ChatServer() as server:
        regenerate(tmp_path / "out", server.url, records=records(3))
        journal = tmp_path / "out.journal"
        lines = [{"id": 0, "turn": 0, "answer": SAID} | row for row in rows]
        journal.write_text("\n".join([journal.read_text().splitlines()[0], *map(json.dumps, lines)]) + "\n")
        with pytest.raises(ValueError, match=f"out.journal {message}.*: delete it to start over"):
            regenerate(tmp_path / "out", server.url, records=records(3))


def test_one_prompt_that_breaks_the_server_does_not_hold_up_the_run(tmp_path, caplog):
    """Even as the only one under way."""
    with ChatServer(fault=lambda n, body: "drop" if "what is 2 and 1" in json.dumps(body) else None) as server:
        regenerate(tmp_path / "out", server.url, records=records(3), retries=2, concurrency=1)
    assert [len(row["finish_reason"]) for row in read(tmp_path / "out")] == [1, 2, 1]
    assert "1 records end early, since the server fails on them" in caplog.text and "record 2: " in caplog.text


def test_a_server_that_fails_everywhere_ends_the_run(tmp_path):
    cases = [
        ((400, "no template"), r"1\d prompts failed in a row, for instance that of record \d+: .*no template"),
        ((500, "engine dead"), "failed 3 times in a row, the last time with: 500 .*engine dead"),
        ((429, "busy"), "429 .*busy. What was answered is kept; check the server or lower `concurrency`"),
        ((401, "who are you"), "OPENAI_API_KEY"),
    ]
    for number, (fault, message) in enumerate(cases):
        output = tmp_path / str(number)
        after = 30 if number else 1  # the greeting, and some answers that must not be lost

        def fails(n, body, fault=fault, before=after - 1, journal=tmp_path / f"{number}.journal"):
            if n <= before:
                return None
            # the answers before it have arrived: those on their way when a run ends are asked again
            while before and journal.read_bytes().count(b"\n") < 1 + before:
                time.sleep(0.01)
            return fault

        with ChatServer(fault=fails) as server:
            with pytest.raises(ServerError, match=message):
                regenerate(output, server.url, records=records(60), retries=2)
        assert not output.exists()
        with ChatServer() as server:
            regenerate(output, server.url, records=records(60))
            assert server.asked == 120 - (after - 1) + 1
        assert read(output) == expected(records(60))


def test_few_records_all_refused(tmp_path):
    with ChatServer(fault=lambda n, body: (400, "no") if n else None) as server:
        with pytest.raises(ServerError, match="No prompt was answered; record 0: .*400 Bad Request: no"):
            regenerate(tmp_path / "out", server.url, records=records(3))


def test_bad_arguments(tmp_path):
    for arguments, message in (
        ({"concurrency": 0}, "`concurrency` must be at least 1"),
        ({"retries": -1}, "`retries` must be 0 or more"),
        ({"request_timeout": 0.0}, "`request_timeout` must be above 0"),
        ({"url": "localhost"}, "`server_url` must look like"),
        ({"records": [{"messages": [{"role": "user", "content": ["x"]}]}]}, "Record 0: every part .* with a `type`"),
        ({"records": [{"messages": [{"role": "assistant", "content": "x"}]}]}, "Record 0 has no user turn"),
    ):
        with pytest.raises(ValueError, match=message):
            regenerate(tmp_path / "out", **{"url": "http://127.0.0.1:1", **arguments})
    assert not list(tmp_path.iterdir())


def test_script(tmp_path, monkeypatch, capsys):
    """Files in, file out; the tokenizer of the target is compared with the server's prompts."""
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "target" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(20)))
    script = ROOT / "scripts" / "regenerate_answers.py"

    def run(**arguments):
        given = {"target": tmp_path / "target", "data": tmp_path / "prompts.jsonl", **arguments}
        argv = [str(script), *(f"--{name}={value}" for name, value in given.items())]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(script), run_name="__main__")

    def prompt_ids(messages):
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]

    with ChatServer(root=str(tmp_path / "target"), prompt_ids=prompt_ids) as server:
        run(server_url=server.url, output=tmp_path / "out.jsonl", num_records=17, concurrency=3)
        held_out = [{"prompt": "What is 3, and 0?"}, {"turns": ["Hello!", "what is 7 and 1"]}]
        (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, held_out)))
        run(server_url=server.url, output=tmp_path / "clean.jsonl", held_out=tmp_path / "held.jsonl")
    assert read(tmp_path / "out.jsonl") == expected(records(17))
    clean = expected([chat for n, chat in enumerate(records(20)) if n not in (3, 7)])
    assert read(tmp_path / "clean.jsonl") == clean and len(clean) == 18
    other = tiny_tokenizer(LLAMA3)
    with ChatServer(root=str(tmp_path / "target"), prompt_ids=lambda m: other.apply_chat_template(m)["input_ids"]) as s:
        with pytest.raises(SystemExit):
            run(server_url=s.url, output=tmp_path / "other.jsonl")
    assert "makes another prompt of a chat than `target`'s" in capsys.readouterr().err
    for arguments, message in (
        ({"concurrency": 4}, "`concurrency` means nothing without `server_url`; leave it out"),
        ({"server_url": "http://x", "batch_size": 4}, "`batch_size` means nothing with `server_url`; leave it out"),
    ):
        with pytest.raises(SystemExit):
            run(output=tmp_path / "third.jsonl", **arguments)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other.jsonl").exists() and not (tmp_path / "third.jsonl").exists()
