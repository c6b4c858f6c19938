"""Every verb ends here in one way: with its result, or with one line that says why not.

A sentence that our own code raised is printed as it is. Anything else is unforeseen and becomes one line with place and
type; `HF_EAGLE_TRACEBACK=1` prints its traceback.
"""

import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .beginning import end_of_beginning
from .sentences import first_line, place_of, sentence_of, without_secrets


TRACEBACK = "HF_EAGLE_TRACEBACK"
# what shells report for a process that a signal ended
INTERRUPTED, TERMINATED, UNREAD = 128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + 13  # the last is SIGPIPE


class Terminated(SystemExit):
    """SIGTERM came, as schedulers send it. Ends the process as `SystemExit` does.

    Args:
        message: one sentence about what was kept.
    """

    def __init__(self, message: str = "terminated"):
        super().__init__(TERMINATED)
        self.message = message


def run_verb(main: Callable[[], object], error_status: int = 1) -> None:
    """Run the `main` of a verb. Report whatever goes wrong in one line, and end the process with a status above 0.

    Status 2 is a command line that cannot be read; 130 and 143 are the end by Ctrl-C and by SIGTERM. If several ranks
    fail alike, one speaks. If the reader of the output has gone, as with `head`, nothing is printed, and the status is
    141.

    Args:
        main: of the verb, without arguments.
        error_status: for any other error.
    """
    status, line = 0, None
    with _terminated_by_signal():
        try:
            main()
            _flush()
        except KeyboardInterrupt as problem:
            status, line = INTERRUPTED, first_line(problem) or "interrupted"
        except Terminated as problem:
            status, line = TERMINATED, problem.message
        except SystemExit as problem:
            status, line = _of_exit(problem)
        except Exception as problem:
            problem.__traceback__ = problem.__traceback__.tb_next or problem.__traceback__  # start at the verb
            if isinstance(problem, BrokenPipeError) and _nobody_reads():
                status = UNREAD
            else:
                status, line = error_status, f"error: {told(problem)}"
                if os.environ.get(TRACEBACK):
                    print(without_secrets(traceback.format_exc()), file=sys.stderr)

        if line is not None:
            _say(line)

    if status:
        sys.exit(status)


@contextmanager
def going_on() -> Iterator[None]:
    """Inside, work is kept as it is done: who interrupts it reads that the same command goes on."""
    said = "{}: the same command goes on from here"
    try:
        yield
    except KeyboardInterrupt as problem:
        raise KeyboardInterrupt(first_line(problem) or said.format("interrupted")) from None
    except Terminated as problem:
        whole = problem.message if problem.message != "terminated" else said.format("terminated")
        raise Terminated(whole) from None


def told(problem: BaseException) -> str:
    """Describe an error that `run_verb` caught, in one line."""
    sentence = sentence_of(problem)
    if sentence is not None:
        return sentence

    from .environment import broken_torchvision

    broken = broken_torchvision(problem)
    if broken is not None:
        return broken

    text = first_line(problem)
    kind = type(problem).__name__
    return f"{_verb()} failed in {place_of(problem)} with {kind}{f': {text}' if text else ''} ({TRACEBACK}=1 shows all)"


def _verb() -> str:
    """The command as the user typed it."""
    return Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "hf-eagle"


def _of_exit(problem: SystemExit) -> tuple[int, str | None]:
    if problem.code is None or isinstance(problem.code, int):
        return problem.code or 0, None
    return 1, " ".join(str(problem.code).split())


def _flush() -> None:
    """Flush standard output; `OSError` if that fails, as on a full disk. Python would report it only at exit."""
    try:
        sys.stdout.flush()
    except OSError as problem:
        if isinstance(problem, BrokenPipeError):
            raise

        raise unprinted(problem) from problem


def unprinted(problem: OSError) -> OSError:
    """What to raise if a text could not be printed; what is left to print is thrown away."""
    _throw_away()
    why = problem.strerror or problem
    return OSError(f"What is printed cannot be written ({why}): make room where standard output goes.")


def _nobody_reads() -> bool:
    """Whether the reader of standard output has gone; if so, throw away what is left to print."""
    try:
        asking = select.poll()
        asking.register(sys.stdout.fileno(), 0)  # no event needs asking for: a closed reader is always reported
        gone = bool(asking.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows, or a standard output that is no file
        return False

    if gone:
        _throw_away()
    return gone


def _throw_away() -> None:
    """Redirect standard output to nowhere, or Python would try to write again at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end_progress_bars() -> None:
    """End the line of each progress bar: else a sentence stands behind it, and it is drawn again when Python ends."""
    tqdm = sys.modules.get("tqdm")  # without it there is no bar
    for bar in list(getattr(getattr(tqdm, "tqdm", None), "_instances", ())):
        with suppress(Exception):
            bar.close()


def _say(line: str) -> None:
    """Print a line to stderr; if several ranks would print the same, only the first does.

    The others wait before they print. A launcher ends them as soon as one rank has failed.
    """
    try:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        if rank and os.environ.get("TORCHELASTIC_RUN_ID"):
            time.sleep(min(2 + rank, 10))

        with suppress(OSError, ValueError):
            sys.stdout.flush()
        _end_progress_bars()
        print(without_secrets(line), file=sys.stderr, flush=True)
    except (OSError, KeyboardInterrupt, SystemExit, ValueError):
        pass  # nobody reads any more, or the launcher is ending this rank


@contextmanager
def _terminated_by_signal() -> Iterator[None]:
    """Make SIGTERM raise `Terminated` in here, so that open files are closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
        raise Terminated()

    earlier = signal.signal(signal.SIGTERM, terminate)
    end_of_beginning()

    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if earlier is None else earlier)
