"""What may be written where: nothing that is read, nothing of somebody else's, nothing that would fail at the end.

Every verb is walked through the faults of a path in tests/scripts/test_doors.py; here are the finer ones.
"""

import json
import os

import pytest
from faulty import as_anybody

from hf_eagle.door.outputs import (
    begins_with,
    check_apart,
    check_journaled_file,
    check_new_folder,
    check_output_file,
    check_output_folder,
    check_pictures,
    holds_object_with,
    is_png,
)


ours = holds_object_with("acceptance_length")


@pytest.fixture
def folder(tmp_path):
    for name, text in {"mine.json": '{"x": 1}', "ours.json": '{"acceptance_length": 1}', "empty.json": ""}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "ours.json").write_text('{"acceptance_length": 1}')
    return tmp_path


def test_an_earlier_output_may_be_replaced_and_somebody_elses_file_may_not(folder):
    for name in ("ours.json", "empty.json", "new.json", "new/a.json"):
        check_output_file("output_json", folder / name, {}, ours)
    with pytest.raises(ValueError, match="`output_json` .*mine.json exists and was not written by this verb"):
        check_output_file("output_json", folder / "mine.json", {}, ours)


def test_in_a_folder_that_is_read_only_an_earlier_output_may_be_replaced(folder):
    reads = {"draft": str(folder / "model")}
    check_output_file("output_json", folder / "model" / "ours.json", reads, ours)
    check_output_file("output_json", folder / "model" / "new.json", reads, ours)
    for check in (ours, None):
        with pytest.raises(ValueError, match="`output_json` .*config.json is a file of the input `draft` .*: name a"):
            check_output_file("output_json", folder / "model" / "config.json", reads, check)


@pytest.mark.parametrize("way", ["itself", "link", "hard link", "dots", "link above"])
def test_whichever_way_leads_to_an_input(way, folder):
    ways = {"itself": folder / "mine.json", "dots": folder / "model" / ".." / "mine.json"}
    ways |= {"link": folder / "link", "hard link": folder / "hard", "link above": folder / "above" / "mine.json"}
    (folder / "link").symlink_to("mine.json")
    (folder / "hard").hardlink_to(folder / "mine.json")
    (folder / "above").symlink_to(folder)
    with pytest.raises(ValueError, match="`output` .* is also the input `data`: name another file"):
        check_output_file("output", ways[way], {"other": None, "data": ["x/y", str(folder / "mine.json")]})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is empty"),
        ("x" * 300, "cannot be written .File name too long."),
        ("x" * 251, "cannot be written .File name too long."),  # as the file is called while it is written
        ("a\0b", "cannot be written .*null"),
        ("model", "is a folder: name a file"),
        ("new/", "is a folder: name a file"),
        ("mine.json/a.json", "lies under .*mine.json, which is not a folder"),
        ("no/such/a.json", "there is no folder .*no: make it first"),
        ("pipe", "is no ordinary file"),
    ],
)
def test_names_that_no_file_can_have(name, said, folder, monkeypatch):
    monkeypatch.chdir(folder)
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match=f"`output` .*{said}") as problem:
        check_output_file("output", name)
    assert str(problem.value).endswith(".")


def test_a_folder_that_takes_no_files(folder):
    (folder / "locked").mkdir(mode=0o500)
    for check in (check_output_file, check_output_folder):
        with as_anybody(), pytest.raises(OSError, match="`output` .* cannot be written .Permission denied."):
            check("output", folder / "locked" / "new")


def test_models_of_others_are_never_replaced(folder):
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="`output_dir` .* holds somebody else's model or config"):
            check_output_folder("output_dir", folder / "model", overwrite=overwrite, ours=lambda path: False)
    with pytest.raises(FileExistsError, match="already holds a draft: .* replace it with `--overwrite`"):
        check_output_folder("output_dir", folder / "model", ours=lambda path: True)
    check_output_folder("output_dir", folder / "model", overwrite=True, ours=lambda path: True)
    check_output_folder("output_dir", folder / "some" / "new" / "folder")
    with pytest.raises(FileExistsError, match="`fix` .* is not empty: name a new or an empty folder"):
        check_new_folder("fix", folder)


def test_journals(folder):
    check_journaled_file("output", folder / "new.jsonl")
    with pytest.raises(ValueError, match="`output` .*mine.json exists, but not its journal mine.json.journal"):
        check_journaled_file("output", folder / "mine.json")
    (folder / "new.jsonl.journal").write_text("my diary")
    with pytest.raises(ValueError, match="`output` .*journal exists and was not written by this verb"):
        check_journaled_file("output", folder / "new.jsonl")
    (folder / "other.jsonl.journal").mkdir()
    with pytest.raises(ValueError, match="`output` .*journal is a folder: name a file"):
        check_journaled_file("output", folder / "other.jsonl")


def test_pictures_and_outputs_stand_apart(folder):
    check_pictures("output_json", [folder / "a.png"], folder / "a.json")
    with pytest.raises(ValueError, match="`output_json` .*a.png is also the file of its plot"):
        check_pictures("output_json", [folder / "a.png"], folder / "a.png")
    (folder / "mine.png").write_text("no picture")
    with pytest.raises(ValueError, match="`output_json` .*mine.png exists and was not written by this verb"):
        check_pictures("output_json", [folder / "mine.png"], folder / "mine.json")
    check_apart({"one": str(folder / "a"), "two": None, "three": str(folder / "b")})
    with pytest.raises(ValueError, match="`two` .*a is also the output `one`"):
        check_apart({"one": str(folder / "a"), "two": str(folder / "model" / ".." / "a")})


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ({"a": 1, "b": 2}, True),
        ({"a": 1}, False),
        ([{"a": 1, "b": 2}], True),
        ([{"a": 1}], False),
        (3, False),
        (None, False),
    ],
)
def test_what_tells_an_output_of_ours(text, holds, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(text))
    assert holds_object_with("a", "b")(tmp_path / "a.json") == holds
    (tmp_path / "a.json").write_text("{")
    assert not holds_object_with("a", "b")(tmp_path / "a.json")


def test_beginnings(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    assert is_png(tmp_path / "a.png") and not begins_with(b"{")(tmp_path / "a.png") and not is_png(tmp_path / "none")


@pytest.mark.parametrize("place", ["checkpoint-4", "checkpoint-9", "checkpoint-4/new", "link"])
def test_no_folder_is_written_into_a_checkpoint_of_what_is_read(tmp_path, place):
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "run" / "link").symlink_to("checkpoint-4")
    reads = {"draft": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="`output_dir` .* lies in a checkpoint of the input `draft` .*run: name"):
        check_output_folder("output_dir", tmp_path / "run" / place, reads, overwrite=True, ours=lambda path: True)
    check_output_folder("output_dir", tmp_path / "run" / "less", reads)


@pytest.mark.parametrize("root", ["/", "//", "/tmp/.."])
def test_the_root_of_a_file_system_is_no_output(root):
    with pytest.raises(ValueError, match=f"^`output_dir` {root} is the root of a file system: name a path in it."):
        check_output_folder("output_dir", root)
