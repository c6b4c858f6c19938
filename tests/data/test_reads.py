"""What a stream reads, as checkpoints note it: the same data are known again, other data are not."""

import json
import shutil

import pytest
from datasets import Dataset, DatasetDict

from hf_eagle.data.reads import same_is_read, told_reads, what_is_read


LINE = json.dumps({"prompt": "q", "completion": "a"}) + "\n"


def data(folder):
    """A folder, two files and a saved data set in it; their names."""
    folder.mkdir()
    for place, name in enumerate(("big.jsonl", "good.jsonl", "chats/a.jsonl", "chats/sub/b.jsonl")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(LINE * (place + 1))
    (folder / "c.csv").write_text("prompt,completion\nq,a\n")
    Dataset.from_list([{"text": "t"}]).save_to_disk(folder / "saved")
    DatasetDict({"train": Dataset.from_list([{"text": "t"}])}).save_to_disk(folder / "splits")
    return folder


def reads(folder, *names, weights=None):
    return what_is_read([name if name.startswith("org/") else str(folder / name) for name in names], weights)


def test_what_is_read_is_names_shares_and_bytes(tmp_path):
    found = reads(data(tmp_path / "data"), "big.jsonl", "chats", "org/chats:train", weights=[1, 2, 1])
    files = {"a.jsonl": 3 * len(LINE), "sub/b.jsonl": 4 * len(LINE)}
    assert found == [
        {"source": "big.jsonl", "share": 0.25, "files": {"big.jsonl": len(LINE)}},
        {"source": "chats", "share": 0.5, "files": files},
        {"source": "org/chats:train", "share": 0.25},
    ]
    assert json.loads(json.dumps(found)) == found
    for name in ("saved", "splits"):
        assert [file[-6:] for file in reads(tmp_path / "data", name)[0]["files"]] == [".arrow"]


def test_nothing_is_logged_again(tmp_path, caplog):
    (data(tmp_path / "data") / "chats" / "test.jsonl").write_text(LINE)
    reads(tmp_path / "data", "chats")
    assert not caplog.records


SAME = [("big.jsonl",), ("big.jsonl", "c.csv"), ("chats",), ("saved",), ("splits",), ("org/chats", "big.jsonl")]


@pytest.mark.parametrize("names", SAME)
def test_moved_data_are_the_same(names, tmp_path, monkeypatch):
    before = reads(data(tmp_path / "data"), *names)
    assert same_is_read(before, reads(tmp_path / "data", *names, weights=[7.0] * len(names)))
    monkeypatch.chdir(tmp_path / "data")
    assert same_is_read(before, what_is_read(list(names)))
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert same_is_read(before, reads(tmp_path / "moved", *names))


OTHER = {
    "another file": (("big.jsonl", "c.csv"), ("good.jsonl", "c.csv"), "big.jsonl (35 bytes) and c.csv (22 bytes)"),
    "another order": (("big.jsonl", "c.csv"), ("c.csv", "big.jsonl"), "big.jsonl (35 bytes) and c.csv (22 bytes)"),
    "one more": (("big.jsonl",), ("big.jsonl", "c.csv"), "big.jsonl (35 bytes)"),
    "a folder": (("big.jsonl",), ("chats",), "big.jsonl (35 bytes)"),
    "of the Hub": (("org/chats",), ("org/other",), "org/chats"),
    "another split": (("org/chats",), ("org/chats:test",), "org/chats"),
    "not of the Hub": (("org/chats", "c.csv"), ("chats", "c.csv"), "org/chats and c.csv (22 bytes)"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_data_are_told_apart(case, tmp_path):
    names, others, told = OTHER[case]
    before, now = reads(data(tmp_path / "data"), *names), reads(tmp_path / "data", *others)
    assert not same_is_read(before, now) and told_reads(before, now) == told != told_reads(now, before)


def test_other_shares_are_told_apart(tmp_path):
    names = ("big.jsonl", "c.csv")
    before, now = reads(data(tmp_path / "data"), *names), reads(tmp_path / "data", *names, weights=[3, 1])
    assert not same_is_read(before, now)
    assert told_reads(now, before) == "big.jsonl (35 bytes, share 0.75) and c.csv (22 bytes, share 0.25)"


@pytest.mark.parametrize("change", ["cut", "longer", "removed", "added"])
def test_a_folder_whose_files_change_is_told_apart_and_they_are_named_first(change, tmp_path):
    folder = data(tmp_path / "data") / "chats"
    for number in range(5):
        (folder / f"0{number}.jsonl").write_text(LINE)
    before = reads(tmp_path / "data", "chats")
    last = folder / "sub" / "b.jsonl"
    if change == "removed":
        last.unlink()
    elif change == "added":
        (folder / "sub" / "c.jsonl").write_text(LINE)
    else:
        last.write_text(LINE[:-3] if change == "cut" else LINE * 9)
    now = reads(tmp_path / "data", "chats")
    assert not same_is_read(before, now) and told_reads(before, now) != told_reads(now, before)
    named = told_reads(before, now) if change == "removed" else told_reads(now, before)
    assert named.startswith(f"chats (sub/{'c' if change == 'added' else 'b'}.jsonl of ") and " more)" in named
