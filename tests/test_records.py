"""Every file format and source, alone and mixed, and what is said about broken ones."""

import json

import pytest
from datasets import Dataset
from tiny_tokenizer import assistant, user

from hf_eagle.data.records import load_records, read_record, to_messages


QA = [user("q"), assistant("a")]


def _write(path, kind):
    rows = [{"messages": QA}, {"messages": [*QA, user("r")]}]
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_file_formats(tmp_path, kind):
    path = tmp_path / f"chats.{kind}"
    _write(path, kind)
    assert [to_messages(record) for record in load_records(path)] == [QA, [*QA, user("r")]]


def test_json_of_one_object_a_line_and_csv(tmp_path):
    (tmp_path / "lines.json").write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "r"}\n')
    assert [to_messages(record) for record in load_records(tmp_path / "lines.json")] == [QA, [user("r")]]
    (tmp_path / "table.csv").write_text("instruction,input,output\nq,,a\n")
    assert [to_messages(record) for record in load_records(tmp_path / "table.csv")] == [QA]


def test_several_sources_and_folders(tmp_path):
    """Different forms come together as messages; the reason why an answer ended survives."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/b.jsonl").write_text(json.dumps({"messages": QA, "finish_reason": ["length"]}) + "\n")
    (tmp_path / "folder/c.jsonl").write_text(json.dumps({"messages": QA[:1], "finish_reason": []}) + "\n")
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "q", "input": "", "output": "a", "id": "x"}]))
    records = load_records([tmp_path / "a.json", str(tmp_path / "folder")])
    assert [read_record(record, 0) for record in records] == [(QA, None), (QA, ["length"]), (QA[:1], [])]
    assert len(load_records(tmp_path / "folder")) == 2


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.jsonl", None, "missing.jsonl does not exist"),
        ("bad.jsonl", '{"prompt": "q"}\nhello\n', "Line 2 of .*bad.jsonl is not JSON: Expecting value"),
        ("bad.json", "[{]", "bad.json is not JSON"),
        ("empty.jsonl", "", "empty.jsonl holds no record"),
        ("empty.json", "[]", "empty.json holds no record"),
        ("chats.txt", "hello", "chats.txt must end in one of .json"),
        ("bad.parquet", "hello", "bad.parquet cannot be read as parquet"),
    ],
)
def test_unreadable_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path / name)


def test_unreadable_folder_and_hub_id(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no .json, .jsonl, .parquet, .csv, .arrow file"):
        load_records(tmp_path)
    with pytest.raises(ValueError, match="`sources` is empty"):
        load_records([])
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"nobody/no-such-data is neither a file nor a Hub data set .*split 'train'"):
        load_records("nobody/no-such-data")
