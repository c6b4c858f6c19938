"""A run that stands still says where, on every rank, and ends."""

import json
import os
import threading
import time

import pytest
import torch.distributed as dist
from warm_python import warm_python
from workers import WORKERS

from hf_eagle.training.stalls import StallWatch, why_stopped


def watch_said(work, timeout=0.4):
    """What a watch says while this thread works."""
    said = []
    watch = StallWatch(timeout, 1, 2, lambda: 17, said.append)
    with watch.watching():
        work(watch)
    return said


def test_a_thread_that_stands_is_told_once_with_its_place():
    said = watch_said(lambda watch: threading.Event().wait(0.8))
    assert len(said) == 1 and said[0].startswith("rank 1 of 2 is at ") and " in step 17 since 0 s" in said[0]


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
        found = why_stopped(raised)
    assert found is None if wanted is None else found.startswith(wanted)


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
        assert "rank 1 of 2 is at" in printed and "in step 3 since" in printed

    for rank in (0, 1):  # no process is left
        pid = int((tmp_path / "out" / f"pid_{rank}").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
