"""The one way in which every verb ends: with its result, or with one line that says why not.

A sentence that our own code raised is printed as it is. Anything else becomes one line with the place and the type, for
nobody foresaw it; `HF_EAGLE_TRACEBACK=1` shows where it came from.
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
# what shells give to a process that a signal ended
INTERRUPTED, TERMINATED, UNREAD = 128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + 13  # the last is SIGPIPE


class Terminated(SystemExit):
    """SIGTERM came, which schedulers send. The process is to end, as with `SystemExit`.

    Args:
        message: one sentence about what was kept.
    """

    def __init__(self, message: str = "terminated"):
        super().__init__(TERMINATED)
        self.message = message


def run_verb(main: Callable[[], object], error_status: int = 1) -> None:
    """Run the `main` of a verb. Whatever goes wrong is told in one line, and the process ends with a status above 0.

    Status 2 is a command line that cannot be read, 130 and 143 the end by Ctrl-C and by SIGTERM. Of several ranks that
    fail alike, one speaks. When the reader of what is printed has gone, as `head` does, nothing is said, with status
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
            problem.__traceback__ = problem.__traceback__.tb_next or problem.__traceback__  # from the verb on
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


def told(problem: BaseException) -> str:
    """An error that `run_verb` has caught, in one line."""
    sentence = sentence_of(problem)
    if sentence is not None:
        return sentence
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
    """Write what was printed; `OSError` if it cannot be, into a file on a full disk. Python would tell only at exit."""
    try:
        sys.stdout.flush()
    except OSError as problem:
        if isinstance(problem, BrokenPipeError):
            raise
        _throw_away()
        why = problem.strerror or problem
        raise OSError(f"What is printed cannot be written ({why}): make room where standard output goes.") from problem


def _nobody_reads() -> bool:
    """Whether standard output leads to a reader that has gone; what is left to print is thrown away then."""
    try:
        asking = select.poll()
        asking.register(sys.stdout.fileno(), 0)  # a reader that has gone is always told
        gone = bool(asking.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows, or a standard output that is no file
        return False
    if gone:
        _throw_away()
    return gone


def _throw_away() -> None:
    """Keep Python from trying once more at its exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    """Print a line to stderr; of several ranks that would say the same, the first is heard.

    The others wait before they speak. A launcher ends them as soon as one rank has failed.
    """
    try:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        if rank and os.environ.get("TORCHELASTIC_RUN_ID"):
            time.sleep(min(2 + rank, 10))
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        print(without_secrets(line), file=sys.stderr, flush=True)
    except (OSError, KeyboardInterrupt, SystemExit, ValueError):
        pass  # nobody listens any more, or the launcher is ending this rank


@contextmanager
def _terminated_by_signal() -> Iterator[None]:
    """SIGTERM raises `Terminated` in here, so that what is open is closed."""
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
