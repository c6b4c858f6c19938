"""A signal while a script imports: one line and the status that shells give, as after `run_verb` has begun."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_eagle.door import beginning


ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.name != "__init__.py")
# signals itself where a module is looked for, which no other process could time so well
SIGNALS_ITSELF = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(os.environ["NUMBER"]))
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
@pytest.mark.parametrize(
    ("script", "at"),
    [
        ("compare_runs", "hf_eagle.door.printer"),
        ("train_eagle", "transformers"),
        ("write_prompts", "hf_eagle.arguments"),
    ],
)
def test_a_signal_while_a_script_imports_is_one_line(script, at, number, said, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SIGNALS_ITSELF)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "AT": at, "NUMBER": str(int(number))}
    command = [sys.executable, ROOT / "scripts" / f"{script}.py", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (128 + number, f"{said}\n", "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_imports_the_beginning_before_anything_that_takes_time(script):
    imported = [node for node in ast.parse(script.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imported]
    first, *others = [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names]
    assert first == "hf_eagle.door.beginning" and others


def test_whoever_imports_a_script_keeps_its_signals():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    beginning._begin()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_handles_signals_already_is_left_alone(monkeypatch):
    """`hf-eagle` runs a script as the main module, within `run_verb`."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(SCRIPTS[0]), raising=False)
    own = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        interrupt = signal.getsignal(signal.SIGINT)
        beginning._begin()
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, own)


def test_run_verb_takes_over(monkeypatch):
    from hf_eagle.door.printer import run_verb

    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(SCRIPTS[0]), raising=False)
    seen = []
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        beginning._begin()
        assert signal.getsignal(signal.SIGINT) is beginning._end
        run_verb(lambda: seen.append(signal.getsignal(signal.SIGINT)))
        assert seen == [signal.default_int_handler]
    finally:
        for number, handler in before:
            signal.signal(number, handler)
