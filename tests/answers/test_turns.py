"""What is asked of a record: every user turn, and contents with images as they stand."""

import json

import pytest
from tiny_tokenizer import assistant, system, user

from hf_eagle.answers.answer import Answer
from hf_eagle.answers.turns import answerable, context, read_ids, read_offers, read_turns
from hf_eagle.data.records import load_records


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
TEXT = {"type": "text", "text": "What is this?"}


def test_turns_and_their_context():
    tool = {"role": "tool", "content": "t"}
    messages = [system("s"), user("a"), user("b"), assistant("x"), user("c"), tool, user("d")]
    (turns,) = read_turns([{"messages": messages}])
    assert turns == [[system("s"), user("a"), user("b")], [user("c")]]
    assert context(turns, []) == turns[0]
    y, z = Answer({"content": "y"}, "stop"), Answer({"content": "z", "reasoning_content": "hm"}, "length")
    assert context(turns, [y]) == [*turns[0], assistant("y"), user("c")]
    last = {"role": "assistant", "content": "z", "reasoning_content": "hm"}
    assert context(turns, [y, z]) == [*turns[0], assistant("y"), user("c"), last]


TOOL = {"role": "tool", "content": "t"}


@pytest.mark.parametrize(
    ("chats", "told"),
    [
        ([[user("a"), assistant("x"), user("b")]], None),
        ([[user("a"), assistant("x"), TOOL, assistant("y")]], None),
        ([[user("a"), assistant("x"), TOOL, assistant("y"), user("b"), assistant("z")]], "1 in 1 of 1 records"),
        (
            [[user("a")], [user("a"), TOOL, user("b"), user("c"), assistant("z"), TOOL, user("d")]],
            "2 in 1 of 2 records",
        ),
        ([[user("a"), TOOL, user("b")], [user("a"), TOOL, user("b")]], "2 in 2 of 2 records, first in record 0"),
    ],
)
def test_turns_behind_a_tool_are_counted(chats, told, caplog):
    turns = read_turns([{"messages": messages} for messages in chats])
    assert all(turns) and "tool" not in {message["role"] for own in turns for turn in own for message in turn}
    assert (told is None) == (not caplog.records)
    assert told is None or (f": {told}" in caplog.text and "after a tool's result are not answered" in caplog.text)


def test_a_record_keeps_its_own_id():
    own = ["a-1", 7, "", None, 1.5, ["x"], {"a": 1}]
    assert read_ids([*({"id": id} for id in own), {}]) == ["a-1", 7, "", 3, 4, 5, 6, 7]


def test_tools_on_offer_are_a_record_s_own_or_everybody_s():
    schema = {"type": "function", "function": {"name": "look", "parameters": {}}}
    records = [{"tools": [schema]}, {"tools": json.dumps([schema])}, {}]
    assert read_offers(records) == [[schema], [schema], None]
    assert read_offers([{}], {"tools": [schema], "enable_thinking": True}) == [[schema]]


def test_parts_are_kept_as_they_are():
    padded = {**TEXT, "image_url": None}
    chat = {"messages": [user([IMAGE, padded]), assistant("x"), user("more?"), user([TEXT])], "system": "Look."}
    (turns,) = read_turns([chat], content_parts=True)
    assert turns == [[system("Look."), user([IMAGE, padded])], [user("more?"), user([TEXT])]]
    assert chat["messages"][0]["content"] == [IMAGE, padded]
    with pytest.raises(ValueError, match="Record 1: the content of message 0 must be text"):
        read_turns([{"prompt": "a"}, chat])
    with pytest.raises(ValueError, match="Record 0: every part of the content of message 0 must be"):
        read_turns([{"messages": [user([{"text": "no type"}])]}], content_parts=True)
    with pytest.raises(ValueError, match="Record 0: message 0 must be an object"):
        read_turns([{"messages": ["hello", user([TEXT])]}], content_parts=True)


BAD = [
    {"conversations": []},
    {"messages": [{"role": "nobody", "content": "x"}]},
    {"messages": [assistant("An answer.")]},
    {"messages": [user("What now?")], "tools": [3]},
]


def test_records_that_ask_nothing_are_left_out_and_counted(tmp_path, caplog):
    good = [{"conversations": [{"from": "human", "value": name}]} for name in ("one", "two")]
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([BAD[0], good[0], *BAD[1:], good[1]]))
    records = answerable(load_records([str(path)], skip_bad_records=True))
    assert [turns[0][0]["content"] for turns in read_turns(records)] == ["one", "two"]
    assert f"4 of 6 records are bad and were left out; the first: {path}: Record 0" in caplog.text


@pytest.mark.parametrize("bad", BAD)
def test_if_no_record_asks_anything_the_first_says_why(bad, tmp_path):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([bad]))
    with pytest.raises(ValueError, match=r"chats.json: Record 0"):
        answerable(load_records([str(path)], skip_bad_records=True))
