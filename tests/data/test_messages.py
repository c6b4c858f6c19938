"""Every form of record, and what is said about broken ones."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import JSON
from tiny_tokenizer import assistant, system, user

from hf_eagle.data.forms import recognise_form
from hf_eagle.data.messages import ROLES, read_record, read_tools, to_messages


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALL = call("add", {"x": 1, "y": "two"})
TEXT_CALL = {"function": {"name": "add", "arguments": '{"x": 1, "y": "two"}'}}
QA = [user("q"), assistant("a")]
FORMS = {
    "messages": ({"messages": QA, "id": 3}, QA),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
    "conversations with roles": ({"conversations": QA}, QA),
    "system field": ({"system": "s", "messages": QA}, [system("s"), *QA]),
    "texts": ({"prompt": "q", "completion": "a"}, QA),
    "message lists": ({"prompt": [system("s"), user("q")], "completion": [assistant("a")]}, [system("s"), *QA]),
    "prompt only": ({"prompt": "q"}, [user("q")]),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, QA),
    "alpaca with input": ({"instruction": "q", "input": "x", "output": "a"}, [user("q\nx"), assistant("a")]),
    "absent columns": ({"messages": None, "prompt": "q", "completion": None}, [user("q")]),
    "every speaker": (
        {"conversations": [{"from": who, "value": who} for who in ("system", "human", "chatgpt", "user", "bing")]},
        [system("system"), user("human"), assistant("chatgpt"), user("user"), assistant("bing")],
    ),
    "call that is no JSON": (
        {"conversations": [{"from": "function_call", "value": "f"}, {"from": "observation", "value": "o"}]},
        [assistant("f"), {"role": "tool", "content": "o"}],
    ),
    "call as JSON": (
        {"conversations": [{"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1, "y": "two"}}'}]},
        [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    "typed parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}]},
        [user("q\nr")],
    ),
    "tool calls": (
        {
            "messages": [
                {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", **TEXT_CALL}]},
                {"role": "tool", "content": "o", "tool_call_id": "c", "name": None},
            ]
        },
        [
            {"role": "assistant", "content": "", "tool_calls": [{"id": "c", **CALL}]},
            {"role": "tool", "content": "o", "tool_call_id": "c"},
        ],
    ),
    "tool calls as JSON, and a null that was said": (
        {
            "messages": [
                {"role": "assistant", "content": "", "tool_calls": json.dumps([TEXT_CALL])},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}],
                },
            ]
        },
        [
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "assistant", "content": "", "tool_calls": [call("f", {"x": None})]},
        ],
    ),
    "numbers and booleans": (
        {"prompt": 7, "completion": False, "id": 1},
        [user("7"), assistant("false")],
    ),
    "numbers in alpaca": (
        {"instruction": "q", "input": 0, "output": 2.5, "history": [[1, True]]},
        [user("1"), assistant("true"), user("q\n0"), assistant("2.5")],
    ),
    "thoughts as parts": (
        {
            "messages": [
                user("q"),
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}],
                },
            ]
        },
        [user("q"), {"role": "assistant", "content": "a", "reasoning_content": "hm"}],
    ),
    "thoughts": (
        {"messages": [{"role": "assistant", "content": "a", key: "hm"} for key in ("reasoning", "reasoning_content")]},
        [{"role": "assistant", "content": "a", "reasoning_content": "hm"}] * 2,
    ),
    "alpaca with history": (
        {"instruction": "r", "output": "b", "history": [["q", "a"]]},
        [*QA, user("r"), assistant("b")],
    ),
    "question and answer": ({"question": "q", "answer": "a"}, QA),
    "whole conversations to choose from": ({"prompt": "q", "chosen": QA, "rejected": [user("q")]}, QA),
    "answers to choose from": ({"prompt": "q", "chosen": "a", "rejected": "b"}, QA),
    "one message to choose": (
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}},
        QA,
    ),
    "transcripts to choose from": ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": ""}, QA),
    "plain text": ({"text": "once upon", "meta": 1}, [{"role": "text", "content": "once upon"}]),
    "messages as JSON": ({"messages": json.dumps(QA)}, QA),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    record, expected = FORMS[form]
    assert to_messages(record) == expected


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, "Record 4: the conversation is empty"),
        ({"prompt": ""}, "Record 4: the conversation is empty"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "message 0 has the unknown role 'narrator'; known are"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "the content of message 0 must be text, but holds a part of the type .image.",
        ),
        ({"messages": [{"role": "user"}]}, "content of message 0 must be text, got NoneType"),
        ({"messages": "hello"}, "must be a list of messages, got str"),
        ({"messages": ["hello"]}, "message 0 must be an object with role and content, got str"),
        ({"words": "hello"}, r"no conversation in the columns \['words'\]; a record needs `chosen`"),
        ("hello", "a record must be an object .* got str"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"message 0 has the unknown role \['user'\]"),
        ({"messages": QA, "finish_reason": 7}, "`finish_reason` must be .* got 7"),
        ({"messages": QA, "finish_reason": [7]}, "`finish_reason` must be "),
        ({"instruction": "q", "history": [["a", "b", "c"]]}, "`history` must be a list of pairs"),
        ({"instruction": "q", "history": 3}, "`history` must be a list of pairs"),
        ({"messages": "[" * 100_000}, "the conversation is nested more than 100 levels"),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "hm"}]}]},
            "message 0 must be text, but holds a part of the type 'thinking'",
        ),
    ],
)
def test_malformed_record_is_named(record, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_record(record, 4)
    assert str(caught.value).startswith("Record 4: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("spelt", [str.upper, str.title, str.capitalize, str.swapcase])
@pytest.mark.parametrize("role", ROLES)
def test_roles_are_known_in_any_case(role, spelt):
    for turn in ({"role": role, "content": "x"}, {"from": role, "value": json.dumps(CALL["function"])}):
        key = "role" if "role" in turn else "from"
        assert to_messages({"messages": [{**turn, key: spelt(role)}]}) == to_messages({"messages": [turn]})


@pytest.mark.parametrize("role", ["narrator", "USER 1", "", " user", None, 7])
def test_an_unknown_role_is_told_with_those_that_are_known(role):
    with pytest.raises(ValueError, match="Record 3: message 1 has the unknown role .*; known are") as caught:
        read_record({"messages": [user("q"), {"role": role, "content": "x"}]}, 3)
    assert all(known in str(caught.value) for known in ROLES) and repr(role or None) in str(caught.value)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"data": [{"messages": QA}]}, "data"),
        ({"version": "1.0", "count": 1, "rows of it": [{"prompt": "q", "completion": "a"}], "tags": []}, "rows of it"),
        ({"train": [{"text": "x"}] * 3, "names": ["a", "b"]}, "train"),
    ],
)
def test_one_object_around_all_records_is_told(record, named):
    held = len(record[named])
    with pytest.raises(ValueError, match=rf"Its `{named}` is a list of {held} objects: .* `jq '.\[\"{named}\"\]' old"):
        to_messages(record)


@pytest.mark.parametrize("record", [{"a": [{}], "b": [{}]}, {"a": ["x"]}, {"a": []}, {"a": {"b": [{}]}}, {}])
def test_what_is_no_wrapper_gets_no_hint(record):
    with pytest.raises(ValueError, match="no conversation in the columns") as caught:
        to_messages(record)
    assert "jq" not in str(caught.value)


def test_a_form_can_be_named():
    both = {"messages": QA, "text": "once upon"}
    assert recognise_form(both) == "messages"
    assert to_messages(both, "text") == [{"role": "text", "content": "once upon"}]
    with pytest.raises(
        ValueError, match="`dataset_format` is alpaca, which is read from `instruction`, but the columns"
    ):
        to_messages(both, "alpaca")


def test_tools():
    schema = {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
    tool = {"type": "function", "function": schema}
    for written in ([tool], [schema], json.dumps([schema]), [json.dumps(tool)]):
        assert read_tools({"tools": written}, 0) == [tool]
    assert (
        read_tools({"tools": None}, 0) is None and read_tools({}, 0) is None and read_tools({"tools": "[]"}, 0) is None
    )
    for broken in ("add", "[1]", [3]):
        with pytest.raises(ValueError, match="Record 7: `tools` "):
            read_tools({"tools": broken}, 7)


def test_a_broken_call_is_named():
    with pytest.raises(ValueError, match="Record 2: the `tool_calls` of message 0 cannot be read"):
        read_record({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}, 2)


NAMES = (
    "messages conversations prompt completion chosen instruction input output history system text finish_reason tools"
)
TURN_NAMES = "role from content value tool_calls function_call reasoning_content name tool_call_id".split()
TURNS = st.lists(
    st.dictionaries(st.sampled_from(TURN_NAMES), st.one_of(JSON, st.sampled_from(["user", "assistant", "tool"])))
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES.split()), st.one_of(JSON, TURNS)))
def test_any_record_is_read_or_refused_in_a_sentence(record):
    for read in (read_record, read_tools):
        try:
            read(record, 5)
        except ValueError as problem:
            assert str(problem).startswith("Record 5: ")
