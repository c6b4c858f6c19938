"""Where the host waits for the device, and how the time of a step is divided between the two."""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from transformers import TrainerCallback

from hf_eagle.benchmark import measures
from hf_eagle.benchmark.workload import Step, build_draft

from .costs import batch_of
from .runs import FORMS, train
from .sizes import Sizes


LARGEST = 10  # rows of a profile
FIRST = 2  # optimizer steps before waits are counted: compilation and the first numbers


class Waits(TrainerCallback):
    """Counts where PyTorch says that the host waits, from a run's third step to its last."""

    def __init__(self):
        self.lines, self.steps, self._kept = Counter(), 0, warnings.showwarning

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == FIRST:
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            warnings.showwarning = self._note

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += state.global_step > FIRST
        if state.global_step == state.max_steps:  # saving and ending may wait
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = self._kept

    def _note(self, message, *args, **kwargs):
        if "synchroniz" in str(message):
            self.lines[_line()] += 1


def _line() -> str:
    """The innermost line of hf_eagle on the stack, `elsewhere` if there is none."""
    frame, name = sys._getframe(1), "elsewhere"
    while frame is not None:
        if "/hf_eagle/" in frame.f_code.co_filename:
            return f"{frame.f_code.co_filename.rpartition('/hf_eagle/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return name


def waits(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """Waits a step of short runs, and the lines that wait."""
    for form in FORMS:
        if device.type != "cuda":
            yield {"what": form, "note": "only CUDA says where it waits"}
            continue

        watched = Waits()
        train(sizes, device, form, callbacks=[watched], steps=FIRST + 4)
        found = {line: count / watched.steps for line, count in watched.lines.most_common()}
        yield {"what": form, "waits_per_step": sum(found.values()), **found}


# ---- host against device ----


def host(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """How long the host needs to ask for a step of the draft, how long the device is busy, and both together."""
    for name, (shapes, rows, length) in sizes.launched.items():
        step, batch = _step(sizes, shapes, rows, length, device)
        asked, both = [], []
        for _ in range(1 + sizes.repeats):
            measures.drain(device)
            begun = time.perf_counter()
            step.forward(batch).backward()
            asked.append(time.perf_counter() - begun)
            measures.drain(device)
            both.append(time.perf_counter() - begun)

        best = min(range(1, len(both)), key=both.__getitem__)  # without the first, which compiles
        found = {"host_ms": 1000 * asked[best], "together_ms": 1000 * both[best]}
        if device.type == "cuda":
            kernels = [x for x in _profiled(step, batch, device).events() if x.device_type == DeviceType.CUDA]
            found |= {"device_ms": sum(x.self_device_time_total for x in kernels) / 1000, "kernels": len(kernels)}
        yield {"what": name, **found}


def profile(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """The operations of the largest of those steps that take most time."""
    shapes, rows, length = list(sizes.launched.values())[-1]
    step, batch = _step(sizes, shapes, rows, length, device)
    step.forward(batch).backward()

    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages = _profiled(step, batch, device).key_averages()
    for row in sorted(averages, key=lambda x: getattr(x, time_of), reverse=True)[:LARGEST]:
        yield {"what": row.key[:100], "total_ms": getattr(row, time_of) / 1000, "calls": row.count}


def _step(sizes: Sizes, shapes, rows: int, length: int, device: torch.device) -> tuple[Step, dict]:
    """A step of the draft alone, whose target has answered."""
    step = Step(build_draft(shapes, device), None, sizes.steps, torch.bfloat16)
    batch = step.planned(batch_of(shapes, rows, length, device))
    step.run_target(batch)
    return step, batch


def _profiled(step: Step, batch: dict, device: torch.device) -> torch.profiler.profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as seen:
        step.forward(batch).backward()
        measures.drain(device)
    return seen
