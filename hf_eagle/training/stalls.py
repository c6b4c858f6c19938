"""Report where a run stands still: each rank names the collective that it waits in, its caller, and the step.

While a run is prepared, evaluated or saved, it names that instead of the step. A gloo collective raises after
`ddp_timeout`; NCCL then ends the process. So a thread checks shortly before, and prints where the main thread is. It
ends nothing: a rank may simply compute for long.
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
from torch.distributed.distributed_c10d import _set_pg_timeout, _world
from transformers import TrainerCallback


PACKAGE = Path(__file__).resolve().parents[1]
TRAINER = Path(transformers.__file__).parent / "trainer.py"
HERE = {__file__, str(Path(__file__).with_name("stopping.py"))}  # only pass on
_C10D = f"torch{os.sep}distributed{os.sep}distributed_c10d.py"
# functions of autograd, DDP, DTensor and FSDP2 that reach a collective without naming it in Python
_INSIDE = {
    "_engine_run_backward": "the backward pass, which reduces gradients",
    "_distributed_broadcast_coalesced": "a broadcast of buffers",
    "full_tensor": "full_tensor",
    "wait_for_unshard": "a gather of weights",
    "wait_tensor": "a collective",
}
_LOOKS = 3  # a stack must be the same this often before it counts as waiting
# gloo's words for a rank that did not come, and for one that is gone
_TIMES_OUT, _IS_GONE = (
    ("timed out", "timeout"),
    ("closed by peer", "reset by peer", "broken pipe", "connection refused"),
)


# ---- where a stack is ----


def collective_of(frames: list[FrameType]) -> str | None:
    """The collective that a stack is in, `None` for none; frames go from the outermost to the innermost."""
    for frame in frames:
        code = frame.f_code
        if code.co_filename.endswith(_C10D) and code.co_name != "wrapper":
            return code.co_name
        if code.co_name in _INSIDE:
            return _INSIDE[code.co_name]
    return None


def place_of(frames: list[FrameType], lines: list[int]) -> str:
    """`file:line function` of the innermost frame of this package or of the Trainer; else of the innermost one."""
    called = list(zip(frames, lines, strict=True))
    ours = [each for each in called if _is_ours(each[0].f_code.co_filename)]

    frame, line = (ours or called)[-1]
    path = Path(frame.f_code.co_filename)
    near = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else Path(*path.parts[-2:])
    return f"{near}:{line} {name_of(frame)}"


def name_of(frame: FrameType) -> str:
    """The function's name with its class, which Python before 3.11 does not keep with the code."""
    code, owner = frame.f_code, frame.f_locals.get("self", frame.f_locals.get("cls"))
    if hasattr(code, "co_qualname"):
        return code.co_qualname

    classes = getattr(owner if isinstance(owner, type) else type(owner), "__mro__", ())
    within = next((each for each in classes if getattr(vars(each).get(code.co_name), "__code__", None) is code), None)
    return code.co_name if within is None else f"{within.__name__}.{code.co_name}"


def _is_ours(file: str) -> bool:
    return file not in HERE and (Path(file) == TRAINER or Path(file).is_relative_to(PACKAGE))


def why_stopped(problem: BaseException, doing: str, timeout: float) -> str | None:
    """Return a message if a collective failed because another rank did not join it or has ended; else `None`.

    The library's own text, with addresses of C++ code and of machines, helps no user.

    Args:
        doing: this rank's activity, such as "in step 3".
        timeout: seconds that a collective waits.
    """
    problem = next((each for each in _causes(problem) if _is_of_collective(each)), None)
    if problem is None:
        return None

    text = str(problem).lower()
    gone, late = (any(part in text for part in parts) for parts in (_IS_GONE, _TIMES_OUT))
    if not gone and not late:
        return None

    walked = list(walk_tb(problem.__traceback__))
    frames, lines = [frame for frame, _ in walked], [line for _, line in walked]
    where = f"in {collective_of(frames) or 'a collective'} (called at {place_of(frames, lines)})"

    if gone:
        return f"lost another rank {where}, {doing}: look at what that rank printed before it ended."
    return (
        f"waited {where} for a rank that did not join, {doing}: look at what the others printed, or raise "
        f"`ddp_timeout` ({timeout:g} s) if they only need longer."
    )


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes: code that reads files may wrap a collective's error as a file's."""
    while problem is not None:
        yield problem
        problem = problem.__cause__


def _is_of_collective(problem: BaseException) -> bool:
    text = str(problem).lower()
    told = isinstance(problem, dist.DistError) or "gloo" in text or "pair closure" in text
    return isinstance(problem, RuntimeError) and told


# ---- watching the main thread ----


class StallWatch:
    """Prints where a thread is if nothing has happened for almost as long as a collective waits.

    Args:
        timeout: seconds that a collective waits (`ddp_timeout`).
        rank: of this process.
        ranks: of the run.
        doing: returns what the rank is doing, as "in step 3".
        say: gets the line; `None` prints it to stderr.

    Attributes:
        now: the watch of this process, `None` without one.
    """

    now: "StallWatch | None" = None

    def __init__(self, timeout: float, rank: int, ranks: int, doing: Callable[[], str], say=None):
        self.limit, self.rank, self.ranks, self.doing = 0.9 * timeout, rank, ranks, doing
        self.say = say or (lambda line: os.write(2, f"{line}\n".encode()))
        self._over = threading.Event()
        self.beat()

    def beat(self) -> None:
        """Note that something has happened."""
        self._at, self._told, self._stood, self._stack = time.monotonic(), False, 0, None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calling thread inside the block."""
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
            # only a stack that stays the same for a while waits; one that moves computes
            if time.monotonic() - self._at > 0.7 * self.limit and not self._told:
                self._look(thread)

    def _look(self, thread: int) -> None:
        top = sys._current_frames().get(thread)
        if top is None:
            return
        walked = list(walk_stack(top))[::-1]
        frames, lines = [frame for frame, _ in walked], [line for _, line in walked]

        # keep no frames: they would hold the tensors of a step
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
        stands = f"is at {place}" if collective is None else f"waits in {collective} (called at {place})"
        return f"rank {self.rank} of {self.ranks} {stands} {self.doing()} for {quiet:.0f} s"


@contextmanager
def watched(args, doing: str | Callable[[], str]) -> Iterator[None]:
    """Make a rank that stands still inside the block print where, and what it was doing; the innermost block counts.

    Args:
        args ([`TrainingArguments`]): of the run.
        doing: what all ranks are doing, as "in step 3"; or a function that returns it.

    Raises:
        TimeoutError: on every rank that waited for another in vain, or lost it.
    """
    if args.world_size == 1:
        yield
        return

    if dist.is_initialized() and dist.get_backend() == "gloo":
        for group in list(_world.pg_map):  # `TrainingArguments` leaves them at half an hour on CPUs
            _set_pg_timeout(args.ddp_timeout_delta, group)

    rank, ranks, timeout = args.process_index, args.world_size, args.ddp_timeout
    told = doing if callable(doing) else lambda: doing
    try:
        with _looking(timeout, rank, ranks, told):
            yield
    except TimeoutError:
        raise  # raised by an inner block
    except Exception as problem:
        reason = why_stopped(problem, told(), timeout)
        if reason is None:
            raise
        raise TimeoutError(f"Rank {rank} of {ranks} {reason}") from problem


@contextmanager
def _looking(timeout: float, rank: int, ranks: int, doing: Callable[[], str]) -> Iterator[None]:
    outer = StallWatch.now
    if outer is not None:
        before, outer.doing = outer.doing, doing
        outer.beat()
        try:
            yield
        finally:
            outer.doing = before
            outer.beat()
        return

    StallWatch.now = StallWatch(timeout, rank, ranks, doing)
    try:
        with StallWatch.now.watching():
            yield
    finally:
        StallWatch.now = None


class _Beats(TrainerCallback):
    """Notes in a watch all that happens."""

    def _beat(self, args, state, control, **kwargs):
        if StallWatch.now is not None:
            StallWatch.now.beat()

    on_step_begin = on_substep_end = on_step_end = on_optimizer_step = on_prediction_step = on_save = _beat
    on_evaluate = on_log = on_epoch_begin = on_epoch_end = on_train_begin = on_train_end = _beat


class StallMixin:
    """Reports where a run of several ranks stands still while it trains, evaluates or saves; place before `Trainer`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_Beats())

    def train(self, *args, **kwargs):
        """As in `Trainer`.

        Raises:
            TimeoutError: on every rank that waited for another in vain, or lost it.
        """
        with watched(self.args, lambda: f"in step {self._step_under_way()}"):
            return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """As in `Trainer`; raises as `train`."""
        with watched(self.args, f"in the evaluation after step {self.state.global_step}"):
            return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As in `Trainer`; raises as `train`."""
        if _internal_call:  # of a checkpoint, within a step
            return super().save_model(output_dir, _internal_call)
        with watched(self.args, "while the draft is saved"):
            return super().save_model(output_dir, _internal_call)

    def _step_under_way(self) -> int:
        """The step, counted from 1, including the logging, evaluation and saving after it."""
        done = self.control.should_log or self.control.should_evaluate or self.control.should_save
        return self.state.global_step + (not done)
