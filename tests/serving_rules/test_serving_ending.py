"""A run of the serving tests that is interrupted says what ended it, behind the tests that had passed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import os, signal, pytest

def test_first():
    pass

def test_second():
    {ends}
"""


@pytest.fixture
def run(tmp_path):
    """What a run of two tests ends with and prints, through the target of `make` or without it."""

    def get(ends: str, tests: str = TESTS, make: bool = False) -> tuple[int, list[str]]:
        (tmp_path / "test_two.py").write_text(tests.format(ends=ends))
        python = tmp_path / "python"
        arguments = f"-m pytest -q -p ending -p no:cacheprovider --rootdir {tmp_path} {tmp_path / 'test_two.py'}"
        python.write_text(f"#!/bin/sh\nPYTHONPATH={ROOT / 'tests' / 'serving'} exec {sys.executable} {arguments}\n")
        python.chmod(0o755)
        command = ["make", "-o", "assets", "test-serving", "SERVING=", "SERVING_VISION=", f"SERVING_PY={python}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        # in a session of its own: its signals are not for this one
        how = {"cwd": ROOT, "env": environment, "text": True, "start_new_session": True}
        done = subprocess.run(command if make else [python], **how, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout.strip().splitlines()

    return get


def test_an_interrupt_says_where_it_came(run):
    status, printed = run("os.kill(os.getpid(), signal.SIGINT)")
    assert status == 2 and any(line.startswith("1 passed in") for line in printed)
    assert printed[-3].startswith("pytest ended with status 2 (INTERRUPTED): KeyboardInterrupt, raised at ")
    assert "test_two.py:8" in printed[-3]
    assert printed[-2] == "The last test that had begun: test_two.py::test_second"
    assert printed[-1].startswith("A KeyboardInterrupt is the signal SIGINT")


def test_whoever_ends_the_run_is_quoted(run):
    status, printed = run("pytest.exit('no device left')")
    assert status == 2 and "status 2 (INTERRUPTED)" in printed[-2] and "Exit: no device left" in printed[-2]
    status, printed = run("", tests="import nothing_of_that_name{ends}")
    assert status == 2 and "Interrupted: 1 error during collection" in printed[-1]


@pytest.mark.parametrize(("ends", "status"), [("pass", 0), ("assert False", 1)])
def test_other_ends_speak_for_themselves(ends, status, run):
    found, printed = run(ends)
    assert found == status and not any("pytest ended with" in line for line in printed)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this system")
def test_make_names_the_signal(run):
    status, printed = run("os.kill(os.getpid(), signal.SIGKILL)", make=True)
    assert status == 2  # make's own
    assert "tests/serving: pytest ended with exit status 137, which is signal KILL" in printed
