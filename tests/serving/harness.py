"""Training, measuring and serving by the project's own commands, each in a process of its own.

The tests run in the server's environment; training and measuring run in the project's (`HF_EAGLE_PYTHON`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets"
TARGET = ASSETS / "smollm2-135m-instruct"
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
    "save_strategy": "no",
}


def call(command: list) -> str:
    """Runs a command and returns what it printed; a failure shows the end of it."""
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": "",  # the suite's own must not leak into the other environment
        # threads that sleep while they wait: spinning ones make a shared machine ten times slower
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | defaults,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}"
    return done.stdout


def options(values: dict) -> list:
    """`{"max_steps": 2, "tap_ids": [1, 2]}` -> `["--max_steps", 2, "--tap_ids", 1, 2]`; `None` is left out."""
    tokens = []
    for name, value in values.items():
        if value is not None:
            tokens += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return tokens


def train(folder: Path, data: Path, **changes) -> Path:
    """Trains a draft by `scripts/train_eagle.py` and returns its folder."""
    values = TRAINING | {"train_data": data, "output_dir": folder} | changes
    call([PROJECT_PYTHON, "scripts/train_eagle.py", *options(values)])
    return folder


def measure(
    folder: Path, draft: Path, prompts: Path, script: str = "scripts/evaluate_draft.py", **changes
) -> tuple[dict, list[dict]]:
    """What `scripts/evaluate_draft.py` writes: the result, and prompt and answer ids of every prompt."""
    values = {"target": TARGET, "draft": draft, "prompts": prompts}
    values |= {"output_json": folder / "acceptance.json", "output_tokens": folder / "tokens.json"} | changes
    call([PROJECT_PYTHON, script, *options(values)])
    return json.loads((folder / "acceptance.json").read_text()), json.loads((folder / "tokens.json").read_text())


def serve(folder: Path, prompts: list[list[int]], draft: Path | None = None, **changes) -> dict:
    """Token ids and, with a draft, counters of a real vLLM for these prompts."""
    (folder / "prompt_ids.json").write_text(json.dumps(prompts))
    values = {"target": TARGET, "draft": draft, "max_num_seqs": 8, "prompts": folder / "prompt_ids.json"}
    values |= {"output": folder / "served.json"} | changes
    call([sys.executable, "tests/serving/run_vllm.py", *options(values)])
    return json.loads((folder / "served.json").read_text())


def assert_counts_equal(served: dict, measured: dict) -> None:
    """vLLM's counters are those of `evaluate_draft.py`, every one of them."""
    names = ("drafts", "accepted_tokens", "accepted_per_position")
    assert {name: served[name] for name in names} == {name: measured[name] for name in names}
    assert served["draft_tokens"] == measured["drafts"] * measured["num_speculative_tokens"]
