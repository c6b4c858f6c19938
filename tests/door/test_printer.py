"""How a verb ends: with a sentence of ours as it is, one line for anything else, and a status for each way."""

import importlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from warm_python import ROOT, warm_python

from hf_eagle import cli
from hf_eagle.door.inputs import check_file
from hf_eagle.door.printer import Terminated, going_on, run_verb
from hf_eagle.door.writing import replaced


# what a stranger's code raises, and what must stand in the line
RAISED = [
    (KeyError("name"), "KeyError: 'name'"),
    (TypeError("unhashable type: 'list'"), "TypeError: unhashable type: 'list'"),
    (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
    (IndexError(), "IndexError"),
    (MemoryError(), "MemoryError"),
    (RecursionError("too deep"), "RecursionError: too deep"),
    (AssertionError(""), "AssertionError"),
    (OSError(28, "No space left on device", "a.json"), "OSError: [Errno 28] No space left on device: 'a.json'"),
    (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), "UnicodeDecodeError"),
    (type("StrangeError", (Exception,), {})("odd"), "StrangeError: odd"),
]


def end_of(main, capsys, **options) -> tuple[int, str]:
    """Exit status and what was printed to stderr."""
    try:
        run_verb(main, **options)
        status = 0
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


def raising(problem):
    def main():
        raise problem

    return main


@pytest.mark.parametrize(("problem", "said"), RAISED, ids=[type(problem).__name__ for problem, _ in RAISED])
@pytest.mark.parametrize("status", [1, 2])
def test_what_nobody_foresaw_is_one_line_with_place_and_type(problem, said, status, capsys):
    found, printed = end_of(raising(problem), capsys, error_status=status)
    assert found == status and len(printed.splitlines()) == 1
    assert printed.startswith("error: ") and " failed in test_printer.py:" in printed and f"with {said}" in printed


def test_a_sentence_of_ours_is_printed_as_it_is(capsys):
    status, printed = end_of(lambda: check_file("prompts", "no/such/file"), capsys)
    assert (status, printed) == (1, "error: `prompts` no/such/file does not exist: correct the path.\n")


def test_the_traceback_is_shown_where_it_is_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("HF_EAGLE_TRACEBACK", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    _, printed = end_of(raising(KeyError("hf_secret_of_mine")), capsys)
    assert "Traceback" in printed and "def main" not in printed and "hf_secret_of_mine" not in printed


@pytest.mark.parametrize(
    ("problem", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("stopped behind step 3"), 130, "stopped behind step 3\n"),
        (Terminated(), 143, "terminated\n"),
        (Terminated("checkpoint-3 is complete."), 143, "checkpoint-3 is complete.\n"),
        (SystemExit(), 0, ""),
        (SystemExit(0), 0, ""),
        (SystemExit(2), 2, ""),
        (SystemExit("no: two\nlines"), 1, "no: two lines\n"),
    ],
)
def test_signals_and_exits(problem, status, said, capsys):
    assert end_of(raising(problem), capsys) == (status, said)


@pytest.mark.parametrize("bars", [1, 2])
@pytest.mark.parametrize(
    ("problem", "said"),
    [(RuntimeError("odd"), "RuntimeError: odd"), (KeyboardInterrupt(), "interrupted"), (Terminated("kept"), "kept")],
)
def test_a_sentence_stands_on_a_line_of_its_own_behind_progress_bars(problem, said, bars, capsys):
    from tqdm.auto import tqdm

    begun = []

    def main():
        for _ in range(bars):
            begun.append(tqdm(total=10, miniters=1, mininterval=0))
            begun[-1].update(3)
        raise problem

    _, printed = end_of(main, capsys)
    *before, last = printed.splitlines()
    assert "3/10" in "".join(before) and "/10" not in last and said in last
    assert printed.endswith(f"{last}\n")
    for bar in begun:  # as Python does when it ends
        bar.close()
    assert capsys.readouterr().err == ""


def test_a_verb_that_ends_well_says_nothing(capsys):
    assert end_of(lambda: 5, capsys) == (0, "")


def test_a_verb_within_a_verb_speaks_once(capsys):
    """`hf-eagle` runs a script, which runs itself."""
    status, printed = end_of(lambda: run_verb(raising(KeyError("x")), error_status=2), capsys)
    assert status == 2 and len(printed.splitlines()) == 1


@pytest.mark.parametrize("text", ["http://user:pass@host/v1 is gone", "the key sk-very-secret is wrong"])
def test_no_secret_is_printed(text, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret\n")
    _, printed = end_of(raising(RuntimeError(text)), capsys)
    assert "***" in printed and "user:pass" not in printed and "very-secret" not in printed


def test_sigterm_ends_what_is_open(tmp_path):
    """The part of a file that is being written is gone, and the status is that of a signal."""

    def main():
        with replaced(tmp_path / "a.json") as part:
            part.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run_verb(main)
    assert end.value.code == 143 and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


# ---- in processes ----

START = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from hf_eagle.door.printer import run_verb
"""


def start(code: str, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = {**os.environ, "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, "-c", START + textwrap.dedent(code)], **(pipes | options))


@pytest.mark.parametrize(("number", "status", "said"), [(2, 130, "interrupted\n"), (15, 143, "terminated\n")])
def test_a_signal_is_one_line(number, status, said):
    process = start("run_verb(lambda: (print('begun', flush=True), time.sleep(60)))")
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, printed = process.communicate()
    assert (process.returncode, printed) == (status, said)


def test_a_reader_that_has_gone_is_no_error():
    """As `hf-eagle check ... | head -1` leaves it."""
    process = start("run_verb(lambda: [print('line', n, flush=True) for n in range(100_000)])")
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, "")
    process.stderr.close()


def test_output_into_a_full_disk_is_told():
    with open("/dev/full", "w") as full:
        process = start("run_verb(lambda: print('a result'))", stdout=full)
    _, printed = process.communicate()
    assert process.returncode == 1
    assert printed == ("error: Standard output cannot be written (No space left on device): make room where it goes.\n")


def test_of_several_ranks_one_speaks(tmp_path):
    """They fail alike, at different times; the launcher ends the others when the first has failed."""
    code = START + "run_verb(lambda: {}['name'])"
    (tmp_path / "fails.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "fails.py")]
    done = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode and done.stderr.count("failed in fails.py:5 with KeyError: 'name'") == 1, done.stderr


# ---- every verb ----


def stub(folder: Path, module: str, code: str) -> dict[str, str]:
    """The environment of a process in which a module of ours is another one, by a hook that finds it first."""
    hook = f"""
import importlib.util, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            return importlib.util.spec_from_file_location(name, {str(folder / "stub.py")!r})
sys.meta_path.insert(0, Finder())
"""
    (folder / "sitecustomize.py").write_text(hook)
    (folder / "stub.py").write_text(code)
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise KeyError('late')", 1, r"error: hf-eagle prune failed in prune_draft.py:\d+ with KeyError: 'late'"),
        (
            "import no_such",
            1,
            r"error: hf-eagle prune failed in prune_draft.py:\d+ with ModuleNotFoundError",
        ),
        ("raise KeyboardInterrupt", 130, "interrupted$"),
    ],
    ids=["error", "package", "interrupt"],
)
def test_what_happens_while_a_script_is_imported_is_one_line(code, status, said, tmp_path):
    """Of the command, which is within the printer before it reads the script."""
    environment = stub(tmp_path, "hf_eagle.arguments.parser", code)
    command = [sys.executable, "-m", "hf_eagle", "prune", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == status and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.match(said, done.stderr)


VERBS = [*cli.VERBS.values(), "quickstart.py", "fetch_assets.py"]
ENDS = [(KeyError("x"), 1), (KeyboardInterrupt(), 130), (Terminated(), 143), (SystemExit(2), 2)]
FAILS = """
import os, runpy, sys
from hf_eagle.arguments.parser import EagleArgumentParser

def fail(*args, **kwargs):
    raise KeyError("x")

EagleArgumentParser.parse_args_and_config = fail
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", VERBS)
def test_every_verb_runs_inside_the_printer(script, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    done = warm_python().run(tmp_path / "fails.py", ROOT / "scripts" / script, cwd=ROOT)
    assert done.returncode == (2 if script == "check_draft.py" else 1) and not done.stdout, done
    assert re.fullmatch(rf"error: {script} failed in \S+:\d+ with KeyError: 'x' \(.*\)\n", done.stderr), done.stderr


@pytest.mark.parametrize("script", VERBS)
def test_no_verb_keeps_an_end_from_the_printer(script, capsys, monkeypatch):
    """Whatever is raised behind the door of a verb ends it as it ends any other."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    verb = importlib.import_module(script.removesuffix(".py"))
    for problem, status in ENDS:
        monkeypatch.setattr(verb, "door", raising(problem))
        found, printed = end_of(verb.main, capsys)
        assert found == status and len(printed.splitlines()) == (status != 2)


@pytest.mark.parametrize(
    ("problem", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on from here\n"),
        (KeyboardInterrupt("saved"), 130, "saved\n"),
        (Terminated(), 143, "terminated: the same command goes on from here\n"),
        (Terminated("saved"), 143, "saved\n"),
    ],
)
def test_work_that_is_kept_goes_on_with_the_same_command(problem, status, said, capsys):
    def work():
        with going_on():
            raise problem

    with pytest.raises(SystemExit) as end:
        run_verb(work)
    assert end.value.code == status and capsys.readouterr().err == said
