"""Runs of scripts in which one rank of two has nothing at all: one chat, one held-out chat, one prompt.

    nothing_worker.py SPEC.json    {"out": DIR, "fsdp2": false, "runs": [["train_eagle", ["--config", ...]], ...]}

A run of "stopped" is one of "train_eagle" in whose first step the last rank gets SIGTERM. Leaves in `out`, of each
rank, `called_RANK.json`: the functions of the package that were called, as `FILE FUNCTION`.
"""

import importlib
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from checked_collectives import check_collectives  # noqa: E402
from collectives import PACKAGE  # noqa: E402

from hf_eagle.arguments.training import EagleTrainingArguments  # noqa: E402
from hf_eagle.training import distributed  # noqa: E402
from hf_eagle.training.stalls import name_of  # noqa: E402


CALLED: set[str] = set()


def note(frame, event: str, _) -> None:
    """Take down a call, as `sys.setprofile` asks."""
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(str(PACKAGE)):
        CALLED.add(f"{Path(code.co_filename).relative_to(PACKAGE)} {name_of(frame)}")


def shard_drafts() -> None:
    """As a launch config asks for; on a CPU accelerate takes DDP in its place, unless it is told of several GPUs."""
    finish = EagleTrainingArguments.__post_init__

    def finish_and_tell(args) -> None:
        args.fsdp, args.fsdp_config = True, {}
        finish(args)
        args.device  # noqa: B018  the processes meet
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    EagleTrainingArguments.__post_init__ = finish_and_tell


def run_stopped() -> None:
    """Train until SIGTERM, which the last rank gets alone."""
    from hf_eagle import EagleTrainer
    from scripts import train_eagle

    step = EagleTrainer.training_step

    def get_signal(trainer, *args, **kwargs):
        if trainer.args.process_index == trainer.args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    EagleTrainer.training_step = get_signal
    with suppress(SystemExit):
        train_eagle.main()
    EagleTrainer.training_step = step


def main():
    check_collectives()
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec["fsdp2"]:
        shard_drafts()
    leave, distributed.leave = distributed.leave, lambda: None  # it ends the process

    sys.setprofile(note)
    for script, arguments in spec["runs"]:
        sys.argv = [script, *arguments]
        run_stopped() if script == "stopped" else importlib.import_module(f"scripts.{script}").main()
    sys.setprofile(None)

    rank = dist.get_rank() if dist.is_initialized() else 0
    CALLED.add("training/distributed.py leave")  # the last line
    (Path(spec["out"]) / f"called_{rank}.json").write_text(json.dumps(sorted(CALLED)))
    leave()


if __name__ == "__main__":
    main()
