"""A run that stands still says where, on every rank, and ends."""

import json
import os
import threading
import time

import pytest
import torch.distributed as dist
import yaml
from tiny_files import write_chats, write_tiny_target
from warm_python import warm_python
from workers import WORKERS

from hf_eagle.training.stalls import StallWatch, why_stopped


def watch_said(work, timeout=0.4):
    """What a watch says while this thread works."""
    said = []
    watch = StallWatch(timeout, 1, 2, lambda: "in step 17", said.append)
    with watch.watching():
        work(watch)
    return said


def test_a_thread_that_stands_is_told_once_with_its_place():
    said = watch_said(lambda watch: threading.Event().wait(0.8))
    assert len(said) == 1 and said[0].startswith("rank 1 of 2 is at ") and " in step 17 for 0 s" in said[0]


def test_a_collective_is_named():
    code = compile(
        "def all_reduce(event):\n    event.wait(0.8)\n",
        os.path.join(os.path.dirname(dist.__file__), "distributed_c10d.py"),
        "exec",
    )
    space = {}
    exec(code, space)
    said = watch_said(lambda watch: space["all_reduce"](threading.Event()))
    assert len(said) == 1 and said[0].startswith("rank 1 of 2 waits in all_reduce (called at ")


def test_a_rank_that_gets_on_is_not_told():
    def work(watch):
        for _ in range(20):
            time.sleep(0.04)
            watch.beat()

    assert watch_said(work) == []


def test_a_rank_that_computes_is_not_said_to_wait():
    def work(watch):
        until = time.monotonic() + 0.8
        while time.monotonic() < until:
            sum(i * i for i in range(100))

    said = watch_said(work)
    assert len(said) == 1 and "waits" not in said[0]


@pytest.mark.parametrize(
    ("problem", "wanted"),
    [
        (
            RuntimeError("[gloo/buffer.cc:81] Timed out waiting 10ms for recv operation to complete"),
            "waited in",
        ),
        (RuntimeError("Application timeout caused pair closure"), "waited in"),
        (RuntimeError("[gloo/pair.cc:1] Connection closed by peer [127.0.0.1]:1"), "lost another rank in"),
        (
            RuntimeError("[gloo/pair.cc:1] Connection closed by peer [127.0.0.1]:1. GLHF \N{BEACH WITH UMBRELLA}"),
            "lost",
        ),
        (dist.DistBackendError("NCCL watchdog: Timeout at collective"), "waited in"),
        (RuntimeError("shape mismatch"), None),
        (RuntimeError("a timeout of something else"), None),
        (ValueError("gloo timed out"), None),
    ],
)
def test_only_what_collectives_raise_of_other_ranks_is_explained(problem, wanted):
    try:
        raise problem
    except Exception as raised:
        found = why_stopped(raised, "in step 5", 4.0)
    if wanted is None:
        assert found is None
        return
    assert found.startswith(wanted) and ", in step 5: " in found
    mend = "look at what that rank printed" if "lost" in wanted else "raise `ddp_timeout` (4 s) if"
    assert mend in found and found.endswith(".")
    assert not any(part in found for part in ("gloo", "[", "127.0.0.1", "NCCL", "GLHF"))  # the library's words


# where rank 1 stays away, and the collective that rank 0 waits in
@pytest.mark.parametrize(
    ("event", "do", "wanted", "step"),
    [
        ("on_step_begin", 60.0, "a broadcast of buffers (called at training/step.py:", 3),
        ("on_optimizer_step", 60.0, "all_reduce (called at training/trainer.py:", 4),
        ("on_step_end", "SIGSTOP", "all_reduce (called at training/trainer.py:", 3),
    ],
)
def test_the_rank_that_waits_says_where_and_ends(event, do, wanted, step, tmp_path):
    path = tmp_path / "spec.json"
    at = [{"rank": 1, "event": event, "step": 2, "do": do}]
    args = {"per_device_train_batch_size": 2, "ddp_timeout": 4, "save_strategy": "no", "logging_strategy": "no"}
    told = {"out": str(tmp_path / "out"), "args": args, "at": at}
    path.write_text(json.dumps({"runs": [told], "end_others": True}))
    done = warm_python().run(WORKERS / "stopping_worker.py", path, ranks=2)
    assert done.returncode != 0
    printed = done.stdout + done.stderr
    assert f"rank 0 of 2 waits in {wanted}" in printed, printed[-3000:]
    assert f"TimeoutError: Rank 0 of 2 waited in {wanted}" in printed and f"in step {step}: " in printed
    if event == "on_step_begin":
        assert "rank 1 of 2 is at" in printed and "in step 3 for" in printed

    for rank in (0, 1):  # no process is left
        pid = int((tmp_path / "out" / f"pid_{rank}").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# ---- outside of training ----

TRAINER, PARTS = "hf_eagle.training.trainer:EagleTrainer", "hf_eagle.training.parts"
# who stays away, at what, and what the other one says: the collective, the line, and the stage
STAGES = {
    "data": (0, f"{PARTS}:build_dataset", "barrier (called at training/parts.py:", "while the data are prepared"),
    "target": (1, "hf_eagle.training.target_of_run:load_target", "", "while the target is loaded"),
    "ready": (1, f"{PARTS}:draft_for", "full_tensor (called at targets/sharding.py:", "while the run is made ready"),
    "saving": (1, f"{TRAINER}.save_model", "all_reduce (called at training/", "while the draft is saved"),
    "evaluation": (1, f"{TRAINER}.evaluate", "", "in the evaluation after step 1"),
    "results": (0, f"{TRAINER}.create_model_card", "barrier (called at training/", "while the results are written"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    write_tiny_target(folder / "target")
    write_chats(folder / "chats.jsonl", 4)
    told = {"target": str(folder / "target"), "train_data": [str(folder / "chats.jsonl")], "max_length": 64}
    told |= {"eval_data": [str(folder / "chats.jsonl")], "ttt_steps": 2, "per_device_train_batch_size": 2}
    told |= {"max_steps": 1, "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "ddp_timeout": 4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**told, "target_sharding": "fsdp2"}))
    return folder / "recipe.yaml"


def ended(folder, recipe, rank, at, do, fsdp2=False):
    """What both ranks print in a run in which one stays away."""
    arguments = ["--config", str(recipe), "--output_dir", str(folder / "run")]
    spec = {"out": str(folder), "arguments": arguments, "rank": rank, "at": at, "do": do, "fsdp2": fsdp2}
    (folder / "spec.json").write_text(json.dumps(spec))
    done = warm_python().run(WORKERS / "stalls_worker.py", folder / "spec.json", ranks=2)
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_of_a_run_says_where_it_stands_and_ends(stage, recipe, tmp_path):
    away, at, wanted, doing = STAGES[stage]
    printed = ended(tmp_path, recipe, away, at, 8 if stage == "target" else 120, fsdp2=stage == "saving")
    other = f"{1 - away} of 2"
    lines = [line for line in printed.splitlines() if line.startswith((f"rank {other} ", f"error: Rank {other} "))]
    assert lines, printed[-3000:]
    assert lines[0].startswith(f"rank {other} waits in {wanted}") and f" {doing} for " in lines[0]
    assert f"rank {away} of 2 is at" in printed
    if stage == "target":  # a group that is made there waits as long as torch does by itself
        return
    assert lines[1].startswith(f"error: Rank {other} waited in {wanted}") and f", {doing}: " in lines[1]


@pytest.mark.parametrize("stage", ["data", "evaluation"])
def test_a_rank_that_is_gone_is_said_in_our_words(stage, recipe, tmp_path):
    away, at, wanted, doing = STAGES[stage]
    printed = ended(tmp_path, recipe, away, at, "exit")
    said = next(line for line in printed.splitlines() if line.startswith("error: "))
    assert said.startswith(f"error: Rank {1 - away} of 2 lost another rank in {wanted}"), printed[-3000:]
    assert said.endswith(f", {doing}: look at what that rank printed before it ended.")
