"""The other side of a pipe or of a socket may say anything: it is told, with the last words of its log."""

import sys

import pytest
from chat_server import HOSTILE, ChatServer

from hf_eagle.door import connection
from hf_eagle.serving import vllm_server
from hf_eagle.serving.far_end import FarEnd


READY = "import sys\nprint('last words', file=sys.stderr, flush=True)\nprint('1', flush=True)\n"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("raise SystemExit('no vLLM here')", "vLLM ended; its last words:\nno vLLM here"),
        ("print('INFO 12:00 loading', flush=True); input()", "printed 'INFO 12:00 loading.*no line of JSON"),
        ("print('[' * 100000, flush=True); input()", "which is no line of JSON"),
        (READY, "vLLM ended; its last words:\nlast words"),
        (READY + "input()\nprint('{', flush=True)\n", "printed '{.*which is no line of JSON.*\nlast words"),
    ],
)
def test_whatever_is_no_answer_is_told_with_the_last_words(tmp_path, script, message):
    (tmp_path / "far.py").write_text(script)
    with pytest.raises(RuntimeError, match=message):
        far_end = FarEnd(sys.executable, tmp_path / "far.py", {}, tmp_path / "log")
        try:
            with far_end as engine:
                engine.ask({"prompts": [[1]]})
        finally:
            far_end.process.kill()
            far_end.process.wait()
            far_end.process.stdin.close()
            far_end.process.stdout.close()


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
