"""A script in a fork of a warm process is what `python SCRIPT` would be."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from warm_python import WarmPython


SCRIPT = """
import json, os, signal, sys, time
alarm = signal.getitimer(signal.ITIMER_REAL), signal.getsignal(signal.SIGALRM)
print(*alarm, signal.pthread_sigmask(signal.SIG_BLOCK, []))
told = sys.argv, __name__, os.getcwd(), sys.path[0], os.environ.get("RANK"), os.environ["OWN"], sys.stdin.read()
sys.stdout.write(" ".join(map(str, told)) + "\\n")  # at once: ranks share the file, and Python may not buffer
if "exits" in sys.argv: sys.exit("error: one sentence")
if "dies" in sys.argv: os.kill(os.getpid(), 9)
if "signals" in sys.argv: os.killpg(os.getpgrp(), signal.SIGINT)
if "hangs" in sys.argv:
    sys.stdout.flush()
    alive = open("alive", "w")
    os.fork() or time.sleep(600)
    print("x", end="", file=alive, flush=True)
    time.sleep(600)
if "fails" in sys.argv: 1 / 0
"""


@pytest.fixture(scope="module")
def warm():
    return WarmPython(modules=("json",))


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


@pytest.mark.parametrize("way", ["ends", "exits", "dies", "fails", "signals"])
def test_it_is_what_python_would_run(way, warm, script, monkeypatch):
    found = warm.run(script, way, cwd=script.parent, OWN="x")
    monkeypatch.setenv("OWN", "x")
    command, options = [sys.executable, str(script), way], {"cwd": script.parent, "stdin": subprocess.DEVNULL}
    wanted = subprocess.run(command, **options, capture_output=True, text=True, start_new_session=True)
    assert (found.returncode, found.stdout) == (wanted.returncode, wanted.stdout)
    assert found.stderr.splitlines()[-1:] == wanted.stderr.splitlines()[-1:]


def test_ranks_know_their_number_and_the_first_bad_exit_code_counts(warm, script):
    found = warm.run(script, "fails", ranks=2, OWN="x")
    assert found.returncode == 1
    assert sorted(line.split()[-2] for line in found.stdout.splitlines() if "__main__" in line) == ["0", "1"]


class TimeIsOver(Exception):
    pass


def test_what_hangs_ends_with_its_test_and_so_does_what_it_has_started(warm, script, monkeypatch, capsys):
    """As pytest-timeout ends a test: by an exception out of a signal, while the script sleeps."""

    def raise_it(*_):
        raise TimeIsOver

    def interrupt():
        with open(script.parent / "alive") as alive:
            alive.read(1)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            alive.read()  # to the end: until nobody has it open for writing

    former = signal.signal(signal.SIGUSR1, raise_it)
    os.mkfifo(script.parent / "alive")
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(TimeIsOver):
            warm.run(script, "hangs", cwd=script.parent, OWN="x")
    finally:
        signal.signal(signal.SIGUSR1, former)
    thread.join()
    assert "'hangs'] __main__" in capsys.readouterr().err  # how far it has come
    assert warm.run(script, "ends", OWN="x").returncode == 0


def test_a_script_does_not_outlive_the_tests(script):
    """Not even where nothing of them can be run any more."""
    os.mkfifo(script.parent / "alive")
    run = f"run({str(script)!r}, 'hangs', cwd={str(script.parent)!r})"
    tests = f"from warm_python import WarmPython; WarmPython(modules=('json',)).{run}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OWN": "x"}
    process = subprocess.Popen([sys.executable, "-c", tests], cwd=script.parent, env=environment)
    with open(script.parent / "alive") as alive:
        alive.read(1)
        process.kill()
        process.wait()
        alive.read()
