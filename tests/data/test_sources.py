"""Which files of a folder are trained on, and that it is said which are not."""

import gzip
import json
import logging
import re
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from datasets import load_dataset_builder
from datasets.data_files import get_data_patterns, resolve_pattern
from tiny_tokenizer import assistant, user

from hf_eagle.data.reading import read_json_records
from hf_eagle.data.records import load_records, to_messages
from hf_eagle.data.sources import HubSource, files_of, split_of
from hf_eagle.door.inputs import check_data


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"prompt": name, "completion": "a"}) + "\n")


def taken(folder, **options):
    return [record["prompt"] for record in load_records(folder, **options)]


@pytest.mark.parametrize(
    "name, split",
    [
        *((f"{word}.jsonl", "train") for word in ("train", "chats", "latest", "contest", "protest_1", "developer")),
        *((f"{word}.jsonl", "test") for word in ("test", "chats-test", "test_0", "a.eval", "evaluation 2", "TEST")),
        *((f"{word}.jsonl", "validation") for word in ("dev", "val", "valid-00000-of-00001", "my_validation")),
        ("test/a.jsonl", "test"),
        ("test/train.jsonl", "test"),
        ("train/test.jsonl", "train"),
        ("data/test.jsonl", "test"),
        ("chats-dev/2/a.jsonl", "validation"),
    ],
)
def test_a_name_speaks_of_a_split(name, split):
    assert split_of(Path(name)) == split


def test_names_are_read_as_datasets_reads_them(tmp_path):
    names = ["train.jsonl", "test.jsonl", "sub/my-dev.jsonl", "a_train_2.jsonl", "sub/eval.jsonl", "validation_1.jsonl"]
    fill(tmp_path, *names)
    for split, patterns in get_data_patterns(str(tmp_path)).items():
        found = set()
        for pattern in patterns:
            with suppress(FileNotFoundError):  # no file has this word
                found |= set(resolve_pattern(pattern, str(tmp_path)))
        assert found and all(split_of(Path(file).relative_to(tmp_path)) == str(split) for file in found)


def test_what_is_left_out_is_said(tmp_path, caplog):
    fill(tmp_path, "data/train.jsonl", "data/test.jsonl", "b.jsonl", ".ipynb_checkpoints/b.jsonl", "__MACOSX/c.jsonl")
    fill(tmp_path, "dataset_info.json", "sub/dev-1.jsonl")
    with caplog.at_level(logging.WARNING):
        assert taken(tmp_path) == ["b.jsonl", "data/train.jsonl"]
    (told,) = [r.getMessage() for r in caplog.records if r.name == "hf_eagle.data.sources"]
    for name in ("data/test.jsonl", "sub/dev-1.jsonl", ".ipynb_checkpoints/b.jsonl", "__MACOSX/c.jsonl"):
        assert name in told
    assert "not data: dataset_info.json" in told and "train.jsonl" not in told
    assert taken(tmp_path, streaming=True) == ["b.jsonl", "data/train.jsonl"]
    assert taken(tmp_path, split="test") == ["data/test.jsonl"]
    assert taken(tmp_path / "data/test.jsonl") == ["data/test.jsonl"]  # named itself, a file is taken


@pytest.mark.parametrize("ending", [".jsonl.bz2", ".jsonl.xz", ".zip", ".txt", ".tar.gz", ".xlsx", ".parquet.gz", ""])
def test_files_of_a_form_that_is_not_read_are_named(ending, tmp_path, caplog):
    fill(tmp_path, "a.jsonl", *(f"sub/{n}{ending}" for n in range(7)))
    # what is no data: pictures, texts about the data, hidden files
    fill(
        tmp_path, "pictures/a.png", "pictures/b.jpeg", "c.mp4", "README.md", "LICENSE", ".gitattributes", ".cache/x.zip"
    )
    for streaming in (False, True):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert taken(tmp_path, streaming=streaming) == ["a.jsonl"]
        (told,) = [r.getMessage() for r in caplog.records if r.name == "hf_eagle.data.sources"]
        assert f"of an unsupported format, to be decompressed or converted first: sub/0{ending}, sub/1" in told
        assert "and 2 more" in told and not any(
            word in told for word in ("pictures", "mp4", "README", "LICENSE", "git")
        )

    (tmp_path / "a.jsonl").unlink()
    message = f"holds no .* file to use .*of an unsupported format.*sub/0{re.escape(ending)}"
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path)


def test_a_compressed_file_beside_itself_is_left_out(tmp_path, caplog):
    """Each record is taken once, whichever ending the other one has; splits and hidden files are as ever."""
    fill(tmp_path, "train.jsonl", "test.jsonl", "sub/a.json")
    others = ("b.jsonl.gz", "c_test.csv.gz", ".d.jsonl.gz", "e.parquet.gz", "f.gz")
    for name in ("train.jsonl.gz", "test.jsonl.gz", *others):
        (tmp_path / name).write_bytes(gzip.compress(json.dumps({"prompt": name}).encode()))
    with caplog.at_level(logging.WARNING):
        assert taken(tmp_path) == ["b.jsonl.gz", "sub/a.json", "train.jsonl"]
    assert "also there without compression: test.jsonl.gz, train.jsonl.gz" in caplog.text
    assert taken(tmp_path / "train.jsonl.gz") == ["train.jsonl.gz"]


@pytest.mark.parametrize("revision", [None, "v1.0", "main", "refs/pr/12", "0123456789" * 4])
@pytest.mark.parametrize(
    ("rest", "subset", "split"),
    [
        ("", None, "train"),
        (":test", None, "test"),
        (":de:test", "de", "test"),
        (":de:", "de", "train"),
        (":train[:100]", None, "train[:100]"),
        (":de:train[10%:20%]", "de", "train[10%:20%]"),
    ],
)
def test_a_name_of_the_hub_is_read_apart(rest, subset, split, revision):
    named = "me/some-chats_1.0" + (f"@{revision}" if revision else "")
    assert HubSource.of(named + rest) == HubSource("me/some-chats_1.0", subset, split, revision)
    check_data("train_data", [named + rest])  # is no path


def test_a_folder_of_tests_alone_is_refused(tmp_path):
    fill(tmp_path, "test.jsonl", "dev.jsonl")
    with pytest.raises(
        ValueError, match="of a different split from train: dev.jsonl, test.jsonl.; to use a file, name"
    ):
        load_records(tmp_path)


def test_a_hub_data_set_of_json_is_read_by_our_reader(tmp_path, monkeypatch):
    """No types are inferred, whole or streaming; the folder stands for what the Hub tells of its files."""
    (tmp_path / "train.jsonl").write_text(
        '{"prompt": "when", "completion": "2024-05-06"}\n{"prompt": 1, "completion": 2}\n'
    )
    (tmp_path / "test.jsonl").write_text('{"prompt": "never"}\n')
    monkeypatch.setattr("hf_eagle.data.sources.load_dataset_builder", lambda _: load_dataset_builder(str(tmp_path)))
    for streaming in (False, True):
        found = [to_messages(record) for record in load_records("some/chats", streaming=streaming)]
        assert found == [[user("when"), assistant("2024-05-06")], [user("1"), assistant("2")]]
    assert taken("some/chats:test") == ["never"]


def test_what_was_downloaded_from_the_hub_is_read_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789" * 4
    held = tmp_path / "datasets--some--chats"
    fill(held / "snapshots" / commit, "train.jsonl", "test.jsonl")
    (held / "refs").mkdir()
    (held / "refs/main").write_text(commit)
    assert taken("some/chats") == ["train.jsonl"]


def test_an_address_is_read_as_it_is_needed():
    with fsspec.open("memory://chats.jsonl", "wb") as file:
        file.write(b'{"a": 1}\n{"a": 2}\n')
    assert [record for _, record in read_json_records("memory://chats.jsonl")] == [{"a": 1}, {"a": 2}]


def test_a_folder_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    def vanished(self, pattern):
        yield tmp_path / "a.jsonl"
        raise OSError(22, "Invalid argument", "/proc/1/task/1/net")

    monkeypatch.setattr(Path, "rglob", vanished)
    message = r"cannot be read as a folder of data \(Invalid argument\): name a different one"
    with pytest.raises(ValueError, match=message):
        files_of(tmp_path, "train")
