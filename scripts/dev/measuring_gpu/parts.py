"""Run a part in a process of its own: a fault, a lost device or a time limit ends only that part."""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_eagle.benchmark.run import machine

from . import costs, kernels, runs, watched
from .sizes import REAL, TINY


# a part yields rows: what was measured, and numbers by name, see `report.line`
PARTS = {
    "machine": lambda sizes, device: iter([{"what": "machine", **machine(device)}]),
    "kernels": kernels.measure,
    "draft": costs.draft_alone,
    "step": costs.whole_step,
    "memory": costs.memory,
    "waits": watched.waits,
    "host": watched.host,
    "profile": watched.profile,
    "training": runs.training,
    "decoding": runs.decoding,
    "tests": runs.tests,
}


@dataclass
class Found:
    """What a part has found: its rows, why it ended early if it did, and how long it took."""

    rows: list[dict] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0


def run_part(name: str, tiny: bool, limit: float, log: Path, show: Callable[[dict], None] = lambda row: None) -> Found:
    """Run one part.

    Args:
        name: of the part.
        tiny: with tiny shapes, also on a CPU.
        limit: seconds after which it is stopped.
        log: a new file for what it prints, and for the traceback of its error.
        show: called with each row as it comes.
    """
    found, begun = Found(), time.monotonic()
    # torch is imported once, here; whatever touches a GPU is left to the parts, since a fork cannot use its parent's
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, tiny, log, sending))
    child.start()
    sending.close()

    try:
        while found.error is None and receiving.poll(max(0.0, begun + limit - time.monotonic())):
            row = receiving.recv()
            if isinstance(row, str):
                found.error = row
            else:
                found.rows.append(row)
                show(row)
        if found.error is None:
            found.error = f"stopped after {limit:.0f} s"
    except EOFError:  # the part has closed its end
        child.join(10)
        found.error = f"ended with exit status {child.exitcode}" if child.exitcode else None
    finally:
        _end(child)
    found.seconds = time.monotonic() - begun
    return found


def _end(child: multiprocessing.Process) -> None:
    """End a part's process, with all that it started."""
    if child.is_alive():
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet, or has just ended
            child.kill()
    child.join()


def _child(name: str, tiny: bool, log: Path, sending) -> None:
    os.setsid()
    with log.open("w") as printed:
        for number in (1, 2):
            os.dup2(printed.fileno(), number)

    try:
        for row in _rows(name, tiny):
            sending.send(row)
    except Exception as problem:  # noqa: BLE001 - whatever it is, the other parts go on
        traceback.print_exc()
        said = str(problem).strip().splitlines() or [""]
        sending.send(f"{type(problem).__name__}: {said[0]}")
    sending.close()


def _rows(name: str, tiny: bool) -> Iterator[dict]:
    if not torch.cuda.is_available():
        if not tiny:
            return
        torch.set_num_threads(1)  # in a fork, a pool of threads is not the parent's
    torch.manual_seed(0)
    yield from PARTS[name](TINY if tiny else REAL, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
