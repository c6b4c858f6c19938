"""Inputs that cannot be read are told of with their argument, and Hub ids are left to the Hub."""

import os

import pytest
from faulty import as_anybody

from hf_eagle.data.tables import KINDS
from hf_eagle.door.inputs import (
    DATA_FILES,
    check_data,
    check_draft,
    check_file,
    check_folder,
    check_model,
    check_target,
    naming,
)
from hf_eagle.door.json_files import read_json
from hf_eagle.door.reading import reading


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("draft", "adapter", "nothing"):
        (tmp_path / name).mkdir()
    for name in ("draft/config.json", "adapter/adapter_config.json", "a.jsonl", "locked.jsonl", "a.gguf"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "adapter" / "model.gguf").write_text("x")
    (tmp_path / "locked.jsonl").chmod(0)
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo("pipe")
    return tmp_path


def test_what_can_be_read_passes(folder):
    check_file("prompts", "a.jsonl")
    check_folder("draft", "draft", "config.json")
    for name in ("draft", "you/your-draft", "gpt2"):
        check_draft("draft", name)
    for name in ("draft", "adapter", "you/model"):
        check_target("target", name)
    check_target("target", "adapter", "model.gguf")
    check_data("data", ["a.jsonl", "draft", "you/data:test", str(folder / "a.jsonl")])
    check_data("data", [])


def check_one_source(argument, source):
    check_data(argument, [source])


@pytest.mark.parametrize(
    ("check", "path", "said"),
    [
        *(
            (check, "/no/such/place", "does not exist")
            for check in (check_file, check_folder, check_model, check_one_source)
        ),
        *((check, "", "is empty") for check in (check_file, check_model, check_one_source)),
        *((check, "x" * 5000 + "/y/z", "does not exist") for check in (check_file, check_model, check_one_source)),
        *((check, "a\0/b/c", "does not exist") for check in (check_file, check_model, check_one_source)),
        *((check, "locked.jsonl", "cannot be read .Permission denied.") for check in (check_file, check_one_source)),
        *((check, "pipe", "is neither a file nor a folder") for check in (check_file, check_one_source)),
        *((check, "a.jsonl", "is a file: name a folder") for check in (check_folder, check_model, check_target)),
        *((check, "nothing", "holds no config.json") for check in (check_target, check_draft)),
        (check_file, "draft", "is a folder: name a file"),
        (check_file, "gone", "is a link to nothing"),
        (check_draft, "adapter", "holds no config.json: name another folder"),
        (check_one_source, "chats.jsonl", "does not exist"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(check, path, said, folder):
    with as_anybody(), pytest.raises(ValueError, match=f"^`name` .*{said}") as problem:
        check("name", path)
    assert str(problem.value).endswith(".")


def test_a_gguf_file_is_looked_for_by_its_name(folder):
    with pytest.raises(ValueError, match="`target` draft holds no other.gguf: name another folder"):
        check_target("target", "draft", "other.gguf")


def test_the_endings_of_data_are_those_that_are_read():
    assert set(DATA_FILES) == KINDS.keys()


def test_a_sentence_about_a_file_names_its_argument(folder):
    with pytest.raises(ValueError, match="^`data`: .*none.json cannot be read"), naming("data"):
        read_json(folder / "none.json")
    with pytest.raises(ValueError, match="^`data`: "), naming("all"), naming("data"):
        read_json(folder / "none.json")
    with pytest.raises(ValueError, match="^.*none.json cannot be read"), naming("output", "out.json"):
        read_json(folder / "none.json")
    with pytest.raises(ValueError, match="^strange"), naming("data"):
        raise ValueError("strange")  # of somebody else


@pytest.mark.parametrize("check", [check_file, check_folder, check_model, check_target, check_draft])
@pytest.mark.parametrize("empty", ["", "  ", "\n"])
def test_an_empty_argument_is_told_so(check, empty):
    with pytest.raises(ValueError, match="^`what` is empty: name what to read, or leave it out"):
        check("what", empty)
    with pytest.raises(ValueError, match="^`what` is empty: name what to read, or leave it out"):
        check_data("what", [__file__, empty])


SPECIAL = ("model.safetensors", "config.json", "tokenizer.json", "other.bin")


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_in_a_folder_is_refused_at_once(name, kind, folder):
    (folder / "draft" / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / "draft" / name)
    else:
        (folder / "draft" / name).symlink_to("/dev/zero")

    said = f"^`name` draft holds {name}, which is no ordinary file: replace it"
    for check in (check_draft, check_target):
        with pytest.raises(ValueError, match=said):
            check("name", "draft")
    with pytest.raises(ValueError, match=said), reading("name", "draft"):
        raise AssertionError("was read")
