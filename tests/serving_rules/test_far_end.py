"""The other side of a pipe or of a socket may say anything: it is told, with the last words of its log."""

import sys

import pytest
from chat_server import HOSTILE, ChatServer

from hf_eagle.door import connection
from hf_eagle.serving import far_end, vllm_server
from hf_eagle.serving.far_end import FarEnd


READY = "import sys\nprint('last words', file=sys.stderr, flush=True)\nprint('1', flush=True)\n"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("raise SystemExit(1)", "^`serving_python` .* ended without any output: name the python of an environment"),
        ("raise SystemExit('no vLLM here')", "vLLM ended; its last output:\nno vLLM here"),
        ("print('INFO 12:00 loading', flush=True); input()", "printed 'INFO 12:00 loading.*which is not JSON"),
        ("print('[' * 100000, flush=True); input()", "which is not JSON"),
        (READY, "vLLM ended; its last output:\nlast words"),
        (READY + "input()\nprint('{', flush=True)\n", "printed '{.*which is not JSON.*\nlast words"),
    ],
)
def test_whatever_is_no_answer_is_told_with_the_last_words(tmp_path, script, message):
    (tmp_path / "far.py").write_text(script)
    with pytest.raises(RuntimeError, match=message):
        other_end = FarEnd(sys.executable, tmp_path / "far.py", {}, tmp_path / "log")
        try:
            with other_end as engine:
                engine.ask({"prompts": [[1]]})
        finally:
            other_end.process.kill()
            other_end.process.wait()
            other_end.process.stdin.close()
            other_end.process.stdout.close()


ANSWERS = READY + "for line in sys.stdin:\n    print(len(line), flush=True)\n"
SLEEPS = "import time\ntime.sleep(600)\n"
# a child keeps the pipe open that is read from
HAS_CHILD = "import subprocess, time\nsubprocess.Popen(['sleep', '20'])\ntime.sleep(600)\n"


@pytest.mark.parametrize("script", [SLEEPS, READY + SLEEPS, HAS_CHILD, READY + HAS_CHILD])
def test_silence_has_a_deadline(tmp_path, script, monkeypatch):
    monkeypatch.setattr(far_end, "READY_WITHIN", 0.2 if "print" not in script else 60.0)
    monkeypatch.setattr(far_end, "ANSWER_WITHIN", 0.2)
    (tmp_path / "far.py").write_text(script)
    engine = FarEnd(sys.executable, tmp_path / "far.py", {}, tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"vLLM sent nothing for 0\.2 seconds and was ended; its last output:"):
        engine.__enter__()
        engine.ask({"prompts": [[1] * 200_000]})  # more than a pipe holds
    assert engine.process.wait() < 0


def test_questions_are_answered_in_turn(tmp_path):
    (tmp_path / "far.py").write_text(ANSWERS)
    with FarEnd(sys.executable, tmp_path / "far.py", {}, tmp_path / "log") as engine:
        assert [engine.ask("x" * length) for length in (1, 300_000)] == [4, 300_003]
    assert engine.process.returncode == 0


def test_a_server_is_ready_when_it_says_so(monkeypatch):
    monkeypatch.setattr(connection, "LARGEST_REPLY", 100_000)
    monkeypatch.setattr(vllm_server, "_PATIENCE", 0.2)
    with ChatServer() as server:
        assert not vllm_server._is_ready(server.url)
        server.hostile = lambda path: "list"
        assert vllm_server._is_ready(server.url)
        # in 200 a server may still send what is no reply
        for fault in ("drip", "drip of headers", "no length", "other protocol", "no content", "who are you"):
            assert fault in HOSTILE
            server.hostile = lambda path, fault=fault: fault
            assert not vllm_server._is_ready(server.url)
    assert not vllm_server._is_ready(server.url)


@pytest.mark.parametrize(("text", "mode"), [("print(1)", 0o644), ("no program", 0o755), ("#!/no/such/python", 0o755)])
def test_a_python_that_is_no_program_is_named(tmp_path, text, mode):
    python = tmp_path / "python"
    python.write_text(text)
    python.chmod(mode)
    with pytest.raises(RuntimeError, match="^`serving_python` .*python cannot be run .*: name the python of an"):
        FarEnd(python, tmp_path / "far.py", {}, tmp_path / "log")
