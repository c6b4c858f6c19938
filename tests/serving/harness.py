"""Training, measuring and serving by the project's own commands, each in a process of its own.

The tests run in the server's environment; training and measuring run in the project's (`HF_EAGLE_PYTHON`). Both have
imported their libraries already: see warm_python.py.
"""

import json
import os
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from local_hub import TOKEN, LocalHub  # noqa: E402
from warm_python import LIBRARIES, WarmPython  # noqa: E402


ASSETS = ROOT / "assets"
TARGET = ASSETS / "smollm2-135m-instruct"
# torchvision for a vLLM without CUDA, and what lets it be imported; a vLLM with CUDA has its own
TORCHVISION = ROOT / ".venv-serving" / "torchvision"
WITHOUT_CUDA = [ROOT / "tests" / "serving" / "without_cuda", TORCHVISION]
PROJECT_PYTHON = os.environ.get("HF_EAGLE_PYTHON", str(ROOT / ".venv" / "bin" / "python"))

# long enough for a story, short enough for a minute; everything else is the scripts' default
TRAINING = {
    "target": TARGET,
    "target_dtype": "bfloat16",
    "bf16": True,
    "ttt_steps": 3,
    "max_length": 128,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-3,
    "warmup_steps": 4,
    "max_steps": 32,
    "logging_steps": 8,
    "cache_mode": "first_epoch",  # of five, the target is half of what a step costs
    "save_strategy": "no",
}

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": "",  # the suite's own must not leak into the other environment
    # threads that sleep while they wait: spinning ones make a shared machine ten times slower
    "OMP_NUM_THREADS": str(os.cpu_count()),
    "OMP_WAIT_POLICY": "PASSIVE",
}
SERVER_LIBRARIES = ("vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker")
SERVER_LIBRARIES += ("vllm.v1.spec_decode.eagle", "vllm.model_executor.models.llama_eagle3", "compressed_tensors")


@cache
def project() -> WarmPython:
    """The project's environment."""
    return WarmPython(PROJECT_PYTHON, LIBRARIES, **ENVIRONMENT)


@cache
def server(vision: bool = False) -> WarmPython:
    """The server's environment, with torchvision or without."""
    path = {"PYTHONPATH": os.pathsep.join(map(str, WITHOUT_CUDA))} if vision else {}
    return WarmPython(sys.executable, SERVER_LIBRARIES, **ENVIRONMENT | path)


def call(python: WarmPython, script: str | Path, *arguments) -> str:
    """Runs a script and returns what it printed; a failure shows the end of it."""
    done = python.run(script, *arguments)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(done.args)} failed:\n{printed[-4000:]}"
    return printed


def call_fresh(python: str | Path, script: str, *arguments, **environment: str) -> None:
    """As `call`, by a Python that imports its libraries now, for what they read while they are imported."""
    command = [str(part) for part in (python, script, *arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}"


def options(values: dict) -> list:
    """`{"max_steps": 2, "tap_ids": [1, 2]}` -> `["--max_steps", 2, "--tap_ids", 1, 2]`; `None` is left out."""
    tokens = []
    for name, value in values.items():
        if value is not None:
            tokens += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return tokens


def train(folder: Path, data: Path, **changes) -> Path:
    """Trains a draft by `scripts/train_eagle.py` and returns its folder."""
    store = folder.with_name(f"{folder.name}-features")
    values = TRAINING | {"train_data": data, "output_dir": folder, "feature_store": store} | changes
    call(project(), "scripts/train_eagle.py", *options(values))
    return folder


def measure(
    folder: Path, draft: Path, prompts: Path, script: str = "scripts/evaluate_draft.py", **changes
) -> tuple[dict, list[dict]]:
    """What `scripts/evaluate_draft.py` writes: the result, and prompt and answer ids of every prompt."""
    values = {"target": TARGET, "draft": draft, "prompts": prompts}
    values |= {"output_json": folder / "acceptance.json", "output_tokens": folder / "tokens.json"} | changes
    call(project(), script, *options(values))
    return json.loads((folder / "acceptance.json").read_text()), json.loads((folder / "tokens.json").read_text())


def serve(folder: Path, prompts: list, draft: Path | None = None, **changes) -> dict:
    """Token ids and, with a draft, counters of a real vLLM for these prompts, see run_vllm.py."""
    (folder / "prompt_ids.json").write_text(json.dumps(prompts))
    values = {"target": TARGET, "draft": draft, "max_num_seqs": 8, "prompts": folder / "prompt_ids.json"}
    values |= {"output": folder / "served.json"} | changes
    vision = TORCHVISION.is_dir() and "max_images" in changes
    call(server(vision), "tests/serving/run_vllm.py", *options(values))
    return json.loads((folder / "served.json").read_text())


def through_the_hub(folder: Path, draft: Path, prompts: list[list[int]]) -> dict:
    """Publishes a draft on a hub of this machine; what `stranger.py` found there, in a fresh environment."""
    (folder / "prompt_ids.json").write_text(json.dumps(prompts))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    published = {"repo_id": "me/draft", "target": TARGET}
    values = published | {"prompts": folder / "prompt_ids.json", "output": folder / "stranger.json"}
    with LocalHub() as hub:
        hubs = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        homes = {who: {**hubs, "HF_HOME": str(folder / who)} for who in ("publisher", "stranger")}
        call_fresh(PROJECT_PYTHON, "scripts/publish_draft.py", draft, *options(published), **homes["publisher"])
        python = folder / "venv" / "bin" / "python"
        call_fresh(python, "tests/serving/stranger.py", *options(values), **homes["stranger"])
    return json.loads((folder / "stranger.json").read_text())


def assert_counts_equal(served: dict, measured: dict) -> None:
    """vLLM's counters are those of `evaluate_draft.py`, every one of them."""
    names = ("drafts", "accepted_tokens", "accepted_per_position")
    assert {name: served[name] for name in names} == {name: measured[name] for name in names}
    assert served["draft_tokens"] == measured["drafts"] * measured["num_speculative_tokens"]
