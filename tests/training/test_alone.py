"""One run at a time writes into a folder; a lock of a process that died, or of its workers, does not count."""

import os
import signal
import time

import pytest
from test_train_script import train
from tiny_files import write_chats, write_tiny_target

from hf_eagle.training.alone import writing_alone


def holding(folder, then):
    """A process that has the lock of a folder, and what it then does; returns once the lock is held."""
    ready, told = os.pipe()
    process = os.fork()
    if not process:
        with writing_alone("output_dir", folder):
            then(told)
            os.write(told, b"x")
            time.sleep(600)
    os.read(ready, 1)
    return process


def end(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_second_process_is_refused_until_the_first_dies(tmp_path):
    first = holding(tmp_path, lambda told: None)
    try:
        for path in (tmp_path, tmp_path / "." / "", os.path.relpath(tmp_path)):
            with pytest.raises(ValueError, match="`output_dir` .* is being written by another process: wait"):
                with writing_alone("output_dir", path):
                    pass
    finally:
        end(first)
    with writing_alone("output_dir", tmp_path):
        pass


def test_a_worker_that_outlives_its_parent_keeps_no_lock(tmp_path):
    def start_worker(told):
        if not os.fork():
            time.sleep(20)
            os._exit(0)

    end(holding(tmp_path, start_worker))
    with writing_alone("output_dir", tmp_path):
        pass


def test_a_folder_is_made_and_left_only_with_something_in_it(tmp_path):
    (tmp_path / "runs" / "theirs").mkdir(parents=True)
    for name, content in (("kept", True), ("empty", False), ("theirs", False)):
        with writing_alone("output_dir", tmp_path / "runs" / name):
            if content:
                (tmp_path / "runs" / name / "file").touch()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["kept", "theirs"]


def test_another_rank_takes_no_lock(tmp_path):
    with writing_alone("output_dir", tmp_path, rank=0), writing_alone("output_dir", tmp_path, rank=1):
        pass


def test_a_run_is_refused_before_it_deletes_another(tmp_path):
    write_tiny_target(tmp_path / "target")
    write_chats(tmp_path / "chats.jsonl")
    (tmp_path / "recipe.yaml").write_text(
        f"target: {tmp_path / 'target'}\ntrain_data: [{tmp_path / 'chats.jsonl'}]\nmax_length: 64\nttt_steps: 2\n"
        "max_steps: 1\nsave_steps: 1\n"
    )
    out = tmp_path / "out"
    train(tmp_path, "--output_dir", out)
    first = holding(out, lambda told: None)
    try:
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for ranks in (1, 2):
            printed = train(tmp_path, "--output_dir", out, "--overwrite", ranks=ranks, expect=1)
            assert printed.count(f"`output_dir` {out} is being written by another process") == ranks
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    finally:
        end(first)
    train(tmp_path, "--output_dir", out, "--overwrite")
