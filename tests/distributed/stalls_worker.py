"""A run of the training script in which one of two gloo ranks stays away at one place, or ends there; for tests.

    stalls_worker.py SPEC.json    {"out": DIR, "arguments": ["--config", ...], "rank": 1, "at": "module:function",
                                   "do": 120 or "exit", "fsdp2": false}

`do` are the seconds that it stays away.

A rank that fails prints its sentence and ends the other, as a launcher does.
"""

import importlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from nothing_worker import shard_drafts  # noqa: E402

from hf_eagle.door.printer import told  # noqa: E402
from scripts import train_eagle  # noqa: E402


def stay_away(at: str, do: str | float) -> None:
    """Replace a function, or a method, by one that never comes back."""
    module, _, name = at.partition(":")
    *owners, name = name.split(".")
    owner = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    setattr(owner, name, lambda *args, **kwargs: os._exit(3) if do == "exit" else time.sleep(do))


def main():
    spec, rank = json.loads(Path(sys.argv[1]).read_text()), int(os.environ["RANK"])
    out = Path(spec["out"])
    (out / f"pid_{rank}").write_text(str(os.getpid()))
    if spec["fsdp2"]:
        shard_drafts()
    if rank == spec["rank"]:
        stay_away(spec["at"], spec["do"])

    sys.argv = ["train_eagle.py", *spec["arguments"]]
    try:
        train_eagle.main()
    except Exception as problem:
        os.write(2, f"error: {told(problem)}\n".encode())
        with suppress(ProcessLookupError):
            os.kill(int((out / f"pid_{1 - rank}").read_text()), signal.SIGKILL)
        os._exit(1)


if __name__ == "__main__":
    main()
