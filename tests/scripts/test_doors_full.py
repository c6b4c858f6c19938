"""A disk that fills up while a verb works: one sentence with the argument, and no half of a file.

The doors of all verbs are tried on a full disk in test_doors.py, and all of them write by hf_eagle/door/writing.py;
here are some that get so far as to write.
"""

import importlib
import json
import sys

import pytest
from faulty import full_disk
from tiny_files import write_chats, write_tiny_target
from warm_python import ROOT

from hf_eagle.door.sentences import sentence_of


sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    write_tiny_target(folder / "target")
    write_chats(folder / "chats.jsonl")
    log = [{"step": step, "loss": 1.0 / step} for step in range(1, 300)]
    (folder / "run").mkdir()
    (folder / "run" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def run(script: str, folder, monkeypatch, *argv) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    importlib.import_module(script).main()


PREVIEW = ("preview_data", "--target", "target", "--train_data", "chats.jsonl", "--num_previews", "0")
REGENERATE = ("regenerate_answers", "--target", "target", "--data", "chats.jsonl", "--max_new_tokens", "4")


@pytest.mark.parametrize(
    ("command", "argument", "name", "size"),
    [
        (PREVIEW, "output_json", "out.json", 400),
        (PREVIEW, "html", "out.html", 200),
        (REGENERATE, "output", "later.jsonl", 900),
        (("compare_runs", "--runs", "run"), "output_png", "out.png", 5000),
    ],
)
def test_the_argument_is_named_and_what_was_there_stays(command, argument, name, size, folder, monkeypatch, capsys):
    """What is printed is kept in memory, which no limit holds for."""
    script, *argv = command
    run(script, folder, monkeypatch, *argv, f"--{argument}", f"warm-{name}")  # what is read is in the cache now
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with full_disk(size), pytest.raises(OSError) as problem:
        run(script, folder, monkeypatch, *argv, f"--{argument}", name)
    said = sentence_of(problem.value)
    assert said.startswith(f"`{argument}`") and name in said and "cannot be written (File too large)" in said
    # a journal holds what was finished, and is gone on with
    after = {path: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".journal"}
    assert after == {path: held for path, held in before.items() if path.suffix != ".journal"}
