"""Every file format and source, alone and mixed, and what is said about broken ones."""

import json
import logging
import shutil

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tiny_tokenizer import assistant, user

from hf_eagle.data.records import load_records, read_record, read_tools, to_messages


QA = [user("q"), assistant("a")]


def _write(path, kind):
    rows = [{"messages": QA}, {"messages": [*QA, user("r")]}]
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).save_to_disk(path.parent / "saved")
        shutil.copy(path.parent / "saved/data-00000-of-00001.arrow", path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "arrow"])
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


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(records):
    return [to_messages(record)[-1]["content"] for record in records]


def test_saved_folder_and_its_splits(tmp_path):
    rows = Dataset.from_list([{"messages": QA}])
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    for folder in ("saved", "splits"):
        assert [to_messages(record) for record in load_records(tmp_path / folder)] == [QA]
    with pytest.raises(ValueError, match="has the splits train, but no 'test'"):
        load_records(tmp_path / "splits", split="test")


def test_the_form_is_told_and_can_be_named(tmp_path, caplog):
    both = write(tmp_path / "both.jsonl", [{"messages": QA, "instruction": "r", "output": "b"}] * 3)
    with caplog.at_level(logging.INFO):
        assert answers(load_records(both)) == ["a"] * 3
        assert answers(load_records(both, dataset_format="alpaca")) == ["b"] * 3
    told = [record.getMessage() for record in caplog.records if record.name == "hf_eagle.data.records"]
    assert told[0] == f"{both}: 3 records, `messages` (role, content)"
    assert told[1] == f"{both}: 3 records, `instruction` with `input` and `output`"
    with pytest.raises(ValueError, match="`dataset_format` must be auto, preference, messages, .* got 'chatml'"):
        load_records(both, dataset_format="chatml")
    with pytest.raises(ValueError, match="both.jsonl: Record 0: `dataset_format` is text, which is read from `text`"):
        load_records(both, dataset_format="text")
    words = write(tmp_path / "words.jsonl", [{"words": "hello"}])
    with pytest.raises(ValueError, match="words.jsonl: Record 0: no conversation in the columns"):
        load_records(words)


FORMS_AND_FILES = {
    "a.jsonl": ([{"messages": QA}], "`messages`"),
    "b.jsonl": ([{"text": "plain"}], "plain `text`"),
    "c.csv": ([{"instruction": "q", "output": "a"}], "`instruction`"),
    "d.json": ([{"prompt": "q", "completion": "a"}], "`prompt` with"),
    "sub/e.parquet": (
        [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
        "ShareGPT",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("names", [["a.jsonl", "b.jsonl"], ["a.jsonl", "c.csv"], list(FORMS_AND_FILES)])
def test_each_form_of_a_folder_is_told(names, streaming, tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    for name in names:
        rows = Dataset.from_list(FORMS_AND_FILES[name][0] * 20)
        kind = name.rpartition(".")[2]
        getattr(rows, f"to_{kind.removesuffix('l')}")(tmp_path / name, **({"lines": True} if kind == "jsonl" else {}))
    with caplog.at_level(logging.INFO):
        load_records(tmp_path, streaming=streaming)
    (told,) = [record.getMessage() for record in caplog.records if record.name == "hf_eagle.data.records"]
    assert [told.count(FORMS_AND_FILES[name][1]) for name in names] == [1] * len(names)
    assert ("a stream of records" if streaming else f"{20 * len(names)} records") in told


def test_among_many_files_one_of_each_ending_is_looked_at(tmp_path, caplog):
    for n in range(100):
        write(tmp_path / f"{n:03}.jsonl", [{"messages": QA}])
    (tmp_path / "z.csv").write_text("prompt,completion\nq,a\n")
    with caplog.at_level(logging.INFO):
        load_records(tmp_path, streaming=True)
    assert "`messages` (role, content) and `prompt` with `completion`" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_file_behind_the_first_is_named_at_once_or_left_out(streaming, tmp_path):
    write(tmp_path / "a.jsonl", [{"messages": QA}])
    write(tmp_path / "b.jsonl", [{"words": "hello"}, {"messages": QA}])
    with pytest.raises(ValueError, match="b.jsonl: Record 0: no conversation in the columns .'words'."):
        load_records(tmp_path, streaming=streaming)
    load_records(tmp_path, streaming=streaming, skip_bad_records=True)


@pytest.mark.parametrize(
    ("number", "said"), [(1, "1 record cannot be read and is"), (2, "2 records cannot be read and are")]
)
def test_a_stream_names_what_it_cannot_read_once(number, said, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": QA}) + "\n" + "oops\n" * number)
    for _ in range(2):  # another run says it again
        caplog.clear()
        records = load_records(path, streaming=True, skip_bad_records=True)
        for _ in range(3):
            assert len(list(records)) == 1
        told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
        assert told == [f"{path}: {said} left out; the first: {told[0].partition('first: ')[2]}"]
        assert "Line 2 of" in told[0]


def test_tools_and_calls_survive_the_common_form(tmp_path):
    called = {"function": {"name": "f", "arguments": {"x": 1}}}
    other = {"function": {"name": "g", "arguments": {"y": ["a", {"z": None}]}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    rows = [
        {"messages": [user("q"), {"role": "assistant", "content": "", "tool_calls": [c]}], "tools": tools}
        for c in (called, other)
    ]
    records = load_records([write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", [{"messages": QA}])])
    calls = [message["tool_calls"][0] for record in list(records)[:2] for message in to_messages(record)[1:]]
    assert [call["function"] for call in calls] == [called["function"], other["function"]]
    assert [read_tools(record, 0) for record in records] == [tools, tools, None]


def test_weights(tmp_path):
    paths = [
        write(tmp_path / f"{n}.jsonl", [{"prompt": "q", "completion": f"{n}{i}"} for i in range(10)]) for n in "ab"
    ]
    mixed = answers(load_records(paths, weights=[0.5, 2]))
    assert len(mixed) == 25 and mixed[5:] == [f"b{i}" for i in range(10)] * 2
    assert len(set(mixed[:5])) == 5 and mixed[:5] == sorted(mixed[:5])
    assert answers(load_records(paths, weights=[0.5, 2])) == mixed
    assert answers(load_records(paths, weights=[0.5, 2], seed=1)) != mixed
    assert len(load_records(paths[0], weights=[1.5])) == 15
    for weights, message in (
        ([1], "1 numbers for 2 sources"),
        ([0, 1], "must be above 0"),
        ([0.01, 1], "takes none of"),
    ):
        with pytest.raises(ValueError, match=message):
            load_records(paths, weights=weights)


def test_streams(tmp_path):
    paths = [
        write(tmp_path / f"{n}.jsonl", [{"prompt": "q", "completion": f"{n}{i}"} for i in range(40)]) for n in "ab"
    ]
    one = load_records(paths[0], streaming=True)
    assert isinstance(one, IterableDataset) and answers(one) == answers(load_records(paths[0]))
    first = answers(load_records(paths, weights=[3, 1], streaming=True))[:40]
    assert first.count("b0") == 1 and 22 <= sum(answer.startswith("a") for answer in first) <= 38
    (tmp_path / "bad.jsonl").write_text("hello")
    with pytest.raises(ValueError, match="Line 1 of .*bad.jsonl is not JSON"):
        load_records(tmp_path / "bad.jsonl", streaming=True)


@pytest.mark.parametrize(
    "name, content",
    [
        ("state.json", "[]"),
        ("state.json", "{}"),
        ("state.json", "null"),
        ("dataset_dict.json", "[]"),
        ("dataset_dict.json", '{"splits": ["train"]}'),
    ],
)
def test_a_folder_that_is_no_saved_data_set_is_named(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    for more in ("{}", "[]"):
        (tmp_path / "dataset_info.json").write_text(more)
        with pytest.raises(ValueError, match="is no data set of `save_to_disk`") as caught:
            load_records(tmp_path)
        assert str(tmp_path) in str(caught.value)


def test_a_named_form_holds_in_every_way(tmp_path):
    """Whole, as a stream and in a mixture, for a record whose columns speak for another form too."""
    path = write(tmp_path / "both.jsonl", [{"messages": QA, "instruction": "r", "output": n} for n in range(3)])
    other = write(tmp_path / "other.jsonl", [{"prompt": "x", "instruction": "r", "output": "c"}])
    for streaming in (False, True):
        assert answers(load_records(path, dataset_format="alpaca", streaming=streaming)) == ["0", "1", "2"]
        mixed = load_records([path, other], dataset_format="alpaca", streaming=streaming)
        assert set(answers(mixed)) == {"0", "1", "2", "c"}
    Dataset.from_list([{"messages": QA, "text": "once"}]).save_to_disk(tmp_path / "saved")
    assert answers(load_records(tmp_path / "saved", dataset_format="text")) == ["once"]


def test_bad_records_are_left_out_whatever_the_first_ones_are(tmp_path):
    path = write(tmp_path / "some.jsonl", [*({"words": n} for n in range(20)), {"prompt": "q", "completion": "a"}])
    with pytest.raises(ValueError, match="Record 0: no conversation in the columns .'words'."):
        load_records(path)
    with pytest.raises(ValueError, match="Record 0: no conversation in the columns .'words'."):
        load_records(path, skip_bad_records=True)  # a file of another kind than chats
    path = write(path, [{"words": 1}, {"prompt": "q", "completion": "a"}])
    assert len(load_records(path, skip_bad_records=True)) == 2  # `build_dataset` leaves it out


def test_a_name_that_is_too_long_for_a_file_is_one_sentence():
    with pytest.raises(ValueError, match="^long.* is neither a file nor a Hub data set"):
        load_records(["long" * 5000])
