"""Trainings that signals stop, one after the other in one launch; started by tests, alone or on several gloo ranks.

    stopping_worker.py SPEC.json    {"runs": [{"out": DIR, "args": {...}, "resume": "last", "fsdp2": false,
                                     "at": [{"rank": 1, "event": "on_step_begin", "step": 2, "do": "SIGTERM"}]}]}

`do` is a signal that the rank sends itself, or seconds that it sleeps. With `"end_others": true` a rank that fails ends
the other, as a launcher does. Leaves in each run's `out`: `pid_RANK`, `outcome_RANK.json`, `draft.pt`, and the
trainer's own `output_dir`.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from transformers import TrainerCallback


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from checked_collectives import check_collectives  # noqa: E402
from datasets import Dataset  # noqa: E402
from tiny import random_chats, tiny_pair  # noqa: E402

from hf_eagle import EagleTrainer, EagleTrainingArguments  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


class At(TrainerCallback):
    """Does something to one rank, at an event of a step."""

    def __init__(self, event: str, step: int, do: str | float, rank: int = 0):
        def act(args, state, control, **kwargs):
            if state.global_step != step or args.process_index != rank:
                return
            if isinstance(do, str):
                os.kill(os.getpid(), getattr(signal, do))
            else:
                time.sleep(do)

        setattr(self, event, act)


def stopping_trainer(spec: dict) -> EagleTrainer:
    """The trainer of one run: six steps of four chats, and six chats to evaluate on."""
    fields = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "ttt_steps": 2, "max_steps": 6}
    fields |= {"per_device_train_batch_size": 4, "logging_steps": 2, "save_steps": 100}
    fields |= {"output_dir": str(Path(spec["out"]) / "run"), **spec["args"]}
    if spec.get("fsdp2"):
        fields |= {"fsdp": True, "fsdp_config": {}}
    args = EagleTrainingArguments(**fields)
    args.device  # noqa: B018  the processes meet
    if spec.get("fsdp2"):  # on a CPU accelerate takes DDP in its place
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    target, draft = tiny_pair(40)
    chats = {"train_dataset": Dataset.from_list(random_chats(16, seed=1))}
    if spec.get("stream"):
        chats["train_dataset"] = chats["train_dataset"].to_iterable_dataset()
    chats["eval_dataset"] = Dataset.from_list(random_chats(6, seed=2))
    callbacks = [At(**each) for each in spec.get("at", [])]
    return EagleTrainer(model=draft, args=args, target=target, callbacks=callbacks, **chats)


def run(spec: dict) -> dict:
    """Train, and how it ended on this rank."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    trainer, problem = stopping_trainer(spec), None
    try:
        trainer.train(resume_from_checkpoint=spec.get("resume"))
    except (KeyboardInterrupt, SystemExit) as stopped:
        status = getattr(stopped, "code", 130)
        problem = [status, getattr(stopped, "message", str(stopped))]
    assert before == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    assert problem is None or not trainer.is_in_train

    state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero():
        torch.save(state, Path(spec["out"]) / "draft.pt")
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"problem": problem, "step": trainer.state.global_step, "evaluated": evaluated}


def main():
    check_collectives()
    spec, rank = json.loads(Path(sys.argv[1]).read_text()), int(os.environ.get("RANK", 0))
    for told in spec["runs"]:
        out = Path(told["out"])
        out.mkdir(parents=True, exist_ok=True)
        (out / f"pid_{rank}").write_text(str(os.getpid()))
        try:
            outcome = run(told)
        except OSError:
            traceback.print_exc()
            if spec.get("end_others"):
                os.kill(int((out / f"pid_{1 - rank}").read_text()), signal.SIGKILL)
            leave(1)
        (out / f"outcome_{rank}.json").write_text(json.dumps(outcome))
    leave()


if __name__ == "__main__":
    main()
