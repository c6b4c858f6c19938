"""A run that stands still says where: each rank names the collective that it waits in, who called it, and the step.

A gloo collective raises after `ddp_timeout`; NCCL ends the process then. So a thread looks shortly before, and prints
where the main thread is. It ends nothing: a rank may simply compute for long.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_stack, walk_tb
from types import FrameType

import torch.distributed as dist
import transformers
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import TrainerCallback


PACKAGE = Path(__file__).resolve().parents[1]
TRAINER = Path(transformers.__file__).parent / "trainer.py"
HERE = {__file__, str(Path(__file__).with_name("stopping.py"))}  # only pass on
_C10D = f"torch{os.sep}distributed{os.sep}distributed_c10d.py"
# of autograd and of DDP, where no Python code calls a collective by its name
_INSIDE = {
    "_engine_run_backward": "the backward pass, which reduces gradients",
    "_distributed_broadcast_coalesced": "a broadcast of buffers",
}
_LOOKS = 3  # so often a stack must be the same before it is said to wait
# what gloo says of a rank that did not come, and of one that is gone
_TIMES_OUT, _IS_GONE = (
    ("timed out", "timeout"),
    ("closed by peer", "reset by peer", "broken pipe", "connection refused"),
)


# ---- where a stack stands ----


def collective_of(frames: list[FrameType]) -> str | None:
    """The collective that a stack is in, `None` if it is in none; frames from the outermost to the innermost."""
    for frame in frames:
        code = frame.f_code
        if code.co_filename.endswith(_C10D) and code.co_name != "wrapper":
            return code.co_name
        if code.co_name in _INSIDE:
            return _INSIDE[code.co_name]
    return None


def place_of(frames: list[FrameType], lines: list[int]) -> str:
    """`file:line function` of the innermost frame of ours or of the Trainer's; else of the innermost one."""
    called = list(zip(frames, lines, strict=True))
    ours = [each for each in called if _is_ours(each[0].f_code.co_filename)]
    frame, line = (ours or called)[-1]
    path, code = Path(frame.f_code.co_filename), frame.f_code
    near = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else Path(*path.parts[-2:])
    return f"{near}:{line} {getattr(code, 'co_qualname', code.co_name)}"


def _is_ours(file: str) -> bool:
    return file not in HERE and (Path(file) == TRAINER or Path(file).is_relative_to(PACKAGE))


def why_stopped(problem: BaseException) -> str | None:
    """The sentence's end for what a collective raised, because another rank did not come or is gone; else `None`."""
    text = str(problem).lower()
    collective = isinstance(problem, dist.DistError) or "gloo" in text or "pair closure" in text
    if not isinstance(problem, RuntimeError) or not collective:
        return None
    gone, late = (any(part in text for part in parts) for parts in (_IS_GONE, _TIMES_OUT))
    if not gone and not late:
        return None
    walked = list(walk_tb(problem.__traceback__))
    frames, lines = [frame for frame, _ in walked], [line for _, line in walked]
    where = f"in {collective_of(frames) or 'a collective'} (called at {place_of(frames, lines)})"
    return f"lost another rank {where}" if gone else f"waited {where} for a rank that did not come"


# ---- looking at the main thread ----


class StallWatch:
    """Prints where a thread is when nothing has happened for almost as long as a collective waits.

    Args:
        timeout: seconds that a collective waits (`ddp_timeout`).
        rank: of this process.
        ranks: of the run.
        step: asked for the step under way, counted from 1.
        say: takes the line; `None` prints it to stderr.
    """

    def __init__(self, timeout: float, rank: int, ranks: int, step: Callable[[], int], say=None):
        self.limit, self.rank, self.ranks, self.step = 0.9 * timeout, rank, ranks, step
        self.say = say or (lambda line: os.write(2, f"{line}\n".encode()))
        self._over = threading.Event()
        self.beat()

    def beat(self) -> None:
        """Something has happened."""
        self._at, self._told, self._stood, self._stack = time.monotonic(), False, 0, None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the calling thread is looked at."""
        watched = threading.get_ident()
        thread = threading.Thread(target=self._watch, args=(watched,), name="stalls", daemon=True)
        self._over.clear()
        self.beat()
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self, thread: int) -> None:
        while not self._over.wait(self.limit / 20):
            # only a stack that was the same for a while stands; one that moves computes
            if time.monotonic() - self._at > 0.7 * self.limit and not self._told:
                self._look(thread)

    def _look(self, thread: int) -> None:
        top = sys._current_frames().get(thread)
        if top is None:
            return
        walked = list(walk_stack(top))[::-1]
        frames, lines = [frame for frame, _ in walked], [line for _, line in walked]

        # frames are not kept, since they would hold the tensors of a step
        stack = [(frame.f_code, frame.f_lasti) for frame in frames]
        self._stood = self._stood + 1 if stack == self._stack else 1
        self._stack = stack

        quiet = time.monotonic() - self._at
        if quiet > self.limit:
            self._told = True
            self.say(self._line(frames, lines, quiet))

    def _line(self, frames: list[FrameType], lines: list[int], quiet: float) -> str:
        collective = collective_of(frames) if self._stood >= _LOOKS else None
        place = place_of(frames, lines)
        doing = f"is at {place}" if collective is None else f"waits in {collective} (called at {place})"
        return f"rank {self.rank} of {self.ranks} {doing} in step {self.step()} since {quiet:.0f} s"


class _Beats(TrainerCallback):
    """Tells a watch of all that happens."""

    def __init__(self, trainer: "StallMixin"):
        self.trainer = trainer

    def _beat(self, args, state, control, **kwargs):
        if self.trainer.stalls is not None:
            self.trainer.stalls.beat()

    on_step_begin = on_substep_end = on_step_end = on_optimizer_step = on_prediction_step = on_save = _beat
    on_evaluate = on_log = on_epoch_begin = on_epoch_end = on_train_begin = on_train_end = _beat


class StallMixin:
    """Says where a run of several ranks stands still; to be placed before `Trainer`.

    Attributes:
        stalls ([`StallWatch`], *optional*): while a run of several ranks trains.
    """

    stalls: StallWatch | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_Beats(self))
        if self.args.world_size > 1 and dist.is_initialized() and dist.get_backend() == "gloo":
            # `TrainingArguments` leaves it at half an hour for ranks on CPUs
            _set_pg_timeout(self.args.ddp_timeout_delta)

    def train(self, *args, **kwargs):
        """As in `Trainer`.

        Raises:
            TimeoutError: on every rank that waited for one that did not come, or lost it.
        """
        if self.args.world_size == 1:
            return super().train(*args, **kwargs)
        rank, ranks = self.args.process_index, self.args.world_size
        self.stalls = StallWatch(self.args.ddp_timeout, rank, ranks, self._step_under_way)
        try:
            with self.stalls.watching():
                return super().train(*args, **kwargs)
        except RuntimeError as problem:
            reason = why_stopped(problem)
            if reason is None:
                raise
            where = f"in step {self._step_under_way()}"
            raise TimeoutError(f"Rank {rank} of {ranks} {reason}, {where}: {problem}") from problem
        finally:
            self.stalls = None

    def _step_under_way(self) -> int:
        """The step, counted from 1, with what is logged, evaluated and saved behind it."""
        done = self.control.should_log or self.control.should_evaluate or self.control.should_save
        return self.state.global_step + (not done)
