"""Seconds of drafting and verifying are those of the device, which works on while the host asks for more."""

import time

import pytest
import torch

from hf_eagle.decoding.answers import RoundClock


class Queue:
    """A device that does what it was asked for once somebody waits; a CPU does it at once."""

    def __init__(self, at_once: bool):
        self.at_once, self.now, self.asked, self.waits = at_once, 0.0, 0.0, []

    def work(self, seconds: float) -> None:
        self.now, self.asked = (self.now + seconds, 0.0) if self.at_once else (self.now, self.asked + seconds)

    def synchronize(self, device=None) -> None:
        self.waits.append(torch.device(device))
        self.now, self.asked = self.now + self.asked, 0.0

    def event(self, enable_timing: bool):
        """As of CUDA: it holds when the device comes to it, in milliseconds."""
        return Event(self)


class Event:
    def __init__(self, queue: Queue):
        self.queue, self.at = queue, None

    def record(self) -> None:
        self.at = self.queue.now + self.queue.asked

    def elapsed_time(self, later: "Event") -> float:
        return 1000 * (later.at - self.at)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1", "mps", "xpu", "xpu:1", "hpu"])
def test_each_part_of_a_round_has_its_own_seconds(name, monkeypatch):
    device = torch.device(name)
    queue = Queue(at_once=name == "cpu")
    monkeypatch.setattr(torch.accelerator, "synchronize", queue.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(time, "perf_counter", lambda: queue.now)

    clock = RoundClock(device)
    queue.work(64.0)  # the prompt's
    for drafting, verifying in ((2.0, 5.0), (0.5, 8.0)):
        start = clock.mark()
        queue.work(drafting)
        drafted = clock.mark()
        queue.work(verifying)
        clock.add(start, drafted, clock.mark())

    assert clock.seconds() == (2.5, 13.0)
    # events measure without the host
    assert set(queue.waits) == (set() if device.type in ("cpu", "cuda") else {device})
