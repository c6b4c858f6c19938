"""A script in a fork of a warm process is what `python SCRIPT` would be."""

import subprocess
import sys

import pytest
from warm_python import WarmPython


SCRIPT = """
import json, os, sys, time
print(sys.argv, __name__, os.getcwd(), sys.path[0], os.environ.get("RANK"), os.environ["OWN"], sys.stdin.read())
if "exits" in sys.argv: sys.exit("error: one sentence")
if "dies" in sys.argv: os.kill(os.getpid(), 9)
if "hangs" in sys.argv: time.sleep(60)
if "fails" in sys.argv: 1 / 0
"""


@pytest.fixture(scope="module")
def warm():
    return WarmPython(modules=("json",))


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


@pytest.mark.parametrize("way", ["ends", "exits", "dies", "fails"])
def test_it_is_what_python_would_run(way, warm, script, monkeypatch):
    found = warm.run(script, way, cwd=script.parent, OWN="x")
    monkeypatch.setenv("OWN", "x")
    command, options = [sys.executable, str(script), way], {"cwd": script.parent, "stdin": subprocess.DEVNULL}
    wanted = subprocess.run(command, **options, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (wanted.returncode, wanted.stdout)
    assert found.stderr.splitlines()[-1:] == wanted.stderr.splitlines()[-1:]


def test_ranks_know_their_number_and_the_first_bad_exit_code_counts(warm, script):
    found = warm.run(script, "fails", ranks=2, OWN="x")
    assert found.returncode == 1
    assert sorted(line.split()[-2] for line in found.stdout.splitlines()) == ["0", "1"]


def test_what_hangs_is_ended(warm, script):
    assert warm.run(script, "hangs", timeout=1, OWN="x").returncode == -14
    assert warm.run(script, "ends", OWN="x").returncode == 0
