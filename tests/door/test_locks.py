"""One process at a time has a lock, of a file or of a folder."""

import os
import subprocess
import sys

import pytest
from forks import ROOT

from hf_eagle.door import locks
from hf_eagle.door.locks import is_free


ASK = "import os, sys; from hf_eagle.door.locks import is_free; print(is_free(os.open(sys.argv[1], os.O_RDONLY)))"


def asked_elsewhere(path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ASK, str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_another_process_finds_it_taken_until_it_is_closed(kind, tmp_path):
    path = tmp_path / kind
    path.write_text("") if kind == "file" else path.mkdir()
    held = os.open(path, os.O_RDONLY)
    assert is_free(held)
    assert asked_elsewhere(path) == "False"
    os.close(held)
    assert asked_elsewhere(path) == "True"


def test_everything_is_free_where_there_are_no_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    held = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    assert is_free(held)
    monkeypatch.setattr(locks, "fcntl", None)
    assert is_free(held)
    os.close(held)
