"""Whatever JSON a file holds is what the template writes: alone, in any order, mixed, as a stream, from the cache."""

import json
from datetime import date

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import JSON, OBJECTS, TEXTS
from tiny_tokenizer import assistant, tiny_tokenizer, user

from hf_eagle.data.conversations import build_dataset
from hf_eagle.data.messages import read_record, read_tools
from hf_eagle.data.records import load_records
from hf_eagle.data.rendering import ChatRenderer


# a line for each part of a chat, as JSON
TEMPLATE = (
    "{% for m in messages %}{{ [m.role, m.content] | tojson }}\n{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ ['call', c.function.name, c.function.arguments] | tojson }}\n{% endfor %}{% endif %}{% endfor %}"
    "{{ ['tools', tools] | tojson }}"
)
CHATS = st.fixed_dictionaries(
    {"question": TEXTS, "arguments": OBJECTS, "parameters": OBJECTS, "more": JSON},
    optional={"late": JSON},
)


def record(chat):
    """A chat with a call and a tool, and its further fields, of which one may be missing."""
    call = {"type": "function", "function": {"name": "f", "arguments": chat["arguments"]}}
    tool = {"type": "function", "function": {"name": "f", "parameters": chat["parameters"]}}
    messages = [user(chat["question"]), {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": messages, "tools": [tool], **{k: chat[k] for k in ("more", "late") if k in chat}}


def expected(chat):
    made = record(chat)
    return [["user", chat["question"]], ["assistant", ""], ["call", "f", chat["arguments"]], ["tools", made["tools"]]]


def rendered(records):
    renderer = ChatRenderer(tiny_tokenizer(TEMPLATE))
    texts = [renderer.render(read_record(r, 0)[0], read_tools(r, 0)) for r in records]
    return [[json.loads(line) for line in text.split("\n")] for text in texts]


def write(path, chats, kind):
    records = [record(chat) for chat in chats]
    if kind == "json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif kind == "csv":
        rows = [["messages", "tools"], *([json.dumps(r["messages"]), json.dumps(r["tools"])] for r in records)]
        quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
        path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(CHATS, min_size=1, max_size=3), st.sampled_from(["jsonl", "json", "csv"])),
        min_size=1,
        max_size=3,
    )
)
def test_any_json_survives_from_file_to_rendered_text(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("files")
    paths = [write(folder / f"{n}.{kind}", chats, kind) for n, (chats, kind) in enumerate(files)]
    wanted = [expected(chat) for chats, _ in files for chat in chats]
    assert rendered(load_records(folder)) == wanted
    assert rendered(load_records(paths)) == wanted  # a mixture
    assert rendered(load_records(folder, dataset_format="messages")) == wanted
    assert rendered(load_records(folder, streaming=True)) == wanted
    assert rendered(load_records(paths[::-1]))[-len(files[0][0]) :] == wanted[: len(files[0][0])]
    load_records(folder).with_format(None).save_to_disk(folder / "saved")
    assert (
        rendered(load_records(folder / "saved")) == rendered(load_records(folder / "saved", streaming=True)) == wanted
    )


def test_what_tables_add_is_absent_and_what_they_hold_is_kept(tmp_path):
    """Arrow gives objects each other's keys, with nulls; dates and numbers in place of texts are written out."""
    calls = [{"function": {"name": "f", "arguments": {key: 1}}} for key in "xy"]
    rows = [{"messages": [user("q"), {"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls]
    Dataset.from_list(rows).to_parquet(tmp_path / "calls.parquet")
    Dataset.from_list([{"prompt": "when", "completion": date(2024, 5, 6), "n": 1}]).to_parquet(
        tmp_path / "days.parquet"
    )
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "calls.parquet", tmp_path / "saved"):
        for streaming in (False, True):
            found = [read_record(r, 0)[0][1]["tool_calls"][0] for r in load_records(source, streaming=streaming)]
            assert [call["function"]["arguments"] for call in found] == [{"x": 1}, {"y": 1}]
    days = [read_record(r, 0)[0] for r in load_records(tmp_path / "days.parquet")]
    assert days == [[user("when"), assistant("2024-05-06")]]
    # files whose columns differ, and all kinds together
    assert len(load_records([tmp_path / "calls.parquet", tmp_path / "days.parquet", tmp_path / "saved"])) == 5


@pytest.mark.parametrize("streaming", [False, True])
def test_late_types_leave_earlier_records_alone(tmp_path, streaming):
    """A list of parts, a thought and a column that come behind 10 MB, which is as far as other readers look."""
    long = "word " * 2200
    chats = [{"messages": [user(long), assistant("oak")]} for _ in range(1000)]
    parts = {"messages": [user([{"type": "text", "text": "q"}]), {**assistant("a"), "reasoning_content": "hm"}], "n": 1}
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in [*chats, parts]))
    found = [read_record(r, 0)[0] for r in load_records(tmp_path / "chats.jsonl", streaming=streaming)]
    assert len(found) == 1001 and found[0] == [user(long), assistant("oak")]
    assert found[-1] == [user("q"), {**assistant("a"), "reasoning_content": "hm"}]


def test_records_in_memory_are_named(tmp_path):
    tokenizer = tiny_tokenizer(TEMPLATE)
    for wrong, message in (
        ({"messages": [user("a \ud800"), assistant("b")]}, r"Record 1: it holds the lone surrogate \\ud800"),
        ({"messages": [user("a")], "more": {1, 2}}, "Record 1: it cannot be written as JSON: a value of the type set"),
        (None, "Record 1: a record must be an object .* got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            build_dataset([{"prompt": "q", "completion": "a"}, wrong], tokenizer)
