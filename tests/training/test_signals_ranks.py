"""SIGTERM and Ctrl-C on two ranks: all stop behind the same step, and go on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny_files import write_chats, write_tiny_target
from workers import run_worker

from hf_eagle.training.checkpoints import checkpoints, why_incomplete


ROOT = Path(__file__).resolve().parents[2]
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}
EVERY_PASS = {"eval_strategy": "epoch", "save_strategy": "epoch"}
# which rank gets what, where and when; what is saved; what was evaluated in the end
ON_RANKS = {
    "one": ([{"rank": 1, "event": "on_step_begin", "step": 2, "do": "SIGTERM"}], {}, 3, []),
    "first": ([{"rank": 0, "event": "on_optimizer_step", "step": 2, "do": "SIGINT"}], {}, 3, []),
    "both": (
        [
            {"rank": 0, "event": "on_step_begin", "step": 2, "do": "SIGTERM"},
            {"rank": 1, "event": "on_step_begin", "step": 3, "do": "SIGTERM"},
        ],
        {},
        3,
        [],
    ),
    "evaluation": (
        [{"rank": 1, "event": "on_prediction_step", "step": 2, "do": "SIGTERM"}],
        {**EVERY_STEP, "per_device_eval_batch_size": 1},
        2,
        [1, 2, 3, 4, 5, 6],
    ),
    "pass": ([{"rank": 1, "event": "on_step_begin", "step": 3, "do": "SIGINT"}], EVERY_PASS, 4, [4, 6]),
    "save": ([{"rank": 1, "event": "on_save", "step": 2, "do": "SIGTERM"}], {"save_steps": 2}, 2, []),
    "last": ([{"rank": 1, "event": "on_step_begin", "step": 5, "do": "SIGTERM"}], {}, 6, []),
}


@pytest.fixture(scope="module", params=["map", "stream", "fsdp2"])
def on_ranks(request, tmp_path_factory):
    """All runs of `ON_RANKS`, each stopped and gone on from, behind one that nothing disturbs."""
    out = tmp_path_factory.mktemp(request.param)
    kind = {} if request.param == "map" else {request.param: True}
    batch = {"per_device_train_batch_size": 2}
    if request.param == "stream":
        batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    runs = [{"out": str(out / "whole"), "args": batch, **kind}]
    for name, (at, args, *_) in ON_RANKS.items():
        args = {**batch, **args, "output_dir": str(out / name / "run")}
        runs.append({"out": str(out / name), "args": args, "at": at, **kind})
        runs.append({"out": str(out / f"{name}_again"), "args": args, "resume": "last", **kind})
    run_worker(out, 2, worker="stopping_worker.py", runs=runs)
    return out


@pytest.mark.parametrize("name", list(ON_RANKS))
def test_all_ranks_stop_behind_the_same_step(name, on_ranks):
    at, _, saved, evaluations = ON_RANKS[name]
    stopped, again = ([outcome(on_ranks / x, rank) for rank in (0, 1)] for x in (name, f"{name}_again"))
    assert stopped[0] == stopped[1] and stopped[0]["step"] == saved
    if saved == 6:
        assert stopped[0]["problem"] is None
    else:
        status, said = stopped[0]["problem"]
        assert (
            status == {"SIGTERM": 143, "SIGINT": 130}[at[0]["do"]]
            and f"checkpoint-{saved} is saved: go on with" in said
        )
    assert why_incomplete(on_ranks / name / "run" / f"checkpoint-{saved}") is None

    assert again[0]["problem"] is None and again[0]["step"] == 6
    stream = on_ranks.name.startswith("stream") and "pass" in name  # whose pass is over when nothing more comes
    assert again[0]["evaluated"] == evaluations or stream
    found, wanted = (torch.load(on_ranks / x / "draft.pt") for x in (f"{name}_again", "whole"))
    assert found.keys() == wanted.keys() and all(torch.equal(x, wanted[name]) for name, x in found.items())


def outcome(out: Path, rank: int) -> dict:
    return json.loads((out / f"outcome_{rank}.json").read_text())


# ---- the verb, as it is started ----


@pytest.mark.parametrize(
    ("launcher", "name", "status"),
    [
        ([], "SIGINT", 130),
        # a launcher hands the signal on, and has a status of its own
        (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], "SIGTERM", 1),
    ],
)
def test_the_verb_saves_and_says_so(launcher, name, status, tmp_path):
    write_tiny_target(tmp_path / "target")
    write_chats(tmp_path / "chats.jsonl")
    recipe = {"target": str(tmp_path / "target"), "train_data": [str(tmp_path / "chats.jsonl")], "max_length": 64}
    recipe |= {"ttt_steps": 2, "max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1, "report_to": "none"}
    recipe |= {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "train_eagle.py"), "--config", "recipe.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    printed = tmp_path / "printed"
    with printed.open("w") as file:
        run = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=tmp_path)
    while ": loss " not in printed.read_text():
        assert run.poll() is None, printed.read_text()[-3000:]
        time.sleep(0.05)
    run.send_signal(getattr(signal, name))
    assert run.wait() == status

    [saved] = checkpoints(tmp_path / "out")
    assert why_incomplete(saved) is None
    assert f"; {saved} is saved: go on with `--resume_from_checkpoint last`" in printed.read_text()

    text = printed.read_text()  # torchrun prints one of its own, behind what the ranks say
    assert "Traceback" not in (text.partition("Stopped by")[0] if launcher else text)
