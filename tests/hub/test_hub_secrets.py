"""A token of the Hub is never printed, whatever way it came and whatever the Hub says."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hf_eagle import EagleTrainingArguments
from hf_eagle.door.printer import run_verb
from hf_eagle.hub.publish import publish_draft
from hf_eagle.hub.reach import check_reachable


class _Echo(BaseHTTPRequestHandler):
    """Repeats the headers that it was sent, as the Hub itself would not."""

    def do_POST(self):
        headers = str({name.lower(): value for name, value in self.headers.items()})
        self.send_response(500, headers)
        self.send_header("X-Error-Message", headers)
        self.send_header("Content-Length", str(len(headers)))
        self.end_headers()
        self.wfile.write(headers.encode())

    do_GET = do_HEAD = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def echo(monkeypatch):
    """The Hub of this process repeats what it is sent."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture
def draft(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize("way", ["argument", "argument with its line's end", "environment", "stored"])
@pytest.mark.parametrize("verb", ["publish", "train"])
def test_a_hub_that_repeats_headers_shows_no_token(verb, way, echo, draft, monkeypatch, capsys):
    from huggingface_hub import constants

    given = {"argument": "s3cr3t", "argument with its line's end": "s3cr3t\n\n"}.get(way)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(draft / "token"))
    if way == "environment":
        monkeypatch.setenv("HF_TOKEN", "s3cr3t")
    elif way == "stored":
        (draft / "token").write_text("s3cr3t\n")

    def main():
        if verb == "publish":
            publish_draft(draft, "me/x", token=given)
        else:
            args = EagleTrainingArguments(output_dir=str(draft), hub_token=given)
            check_reachable("me/x", args.output_dir, args.hub_token)

    monkeypatch.setenv("HF_EAGLE_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        run_verb(main)
    printed = "".join(capsys.readouterr())
    assert "error: " in printed and "500" in printed and "s3cr3t" not in printed


@pytest.mark.parametrize("token", ["s3cr3t s3cr3t", "s3cr\n3t", "s3cr3t-é", "s3cr3t\0", "s3cr3t\x7f"])
def test_a_token_that_no_header_holds_is_refused_unseen(token, draft):
    with pytest.raises(ValueError, match="^`token` must be printable ASCII without spaces") as publishing:
        publish_draft(draft, "me/x", token=token)
    with pytest.raises(ValueError, match="^`hub_token` must be printable ASCII without spaces") as training:
        EagleTrainingArguments(output_dir=str(draft), hub_token=token)
    assert "s3cr" not in f"{publishing.value} {training.value}"
