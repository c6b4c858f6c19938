"""Imported first by each script: until `run_verb` takes over, a signal ends it in one line, and not in a traceback.

What a script imports takes a second. A script that is imported itself, or run by `hf-eagle`, leaves signals to who does
so.
"""

import os
import signal
import sys


_SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_SCRIPTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts")


def end_of_beginning() -> None:
    """Ctrl-C raises `KeyboardInterrupt` again, for whoever has something to close."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame) -> None:
    """Nothing is open yet, and an exception might be caught by whatever is being imported."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several ranks, one speaks
        os.write(2, f"{_SAID[number]}\n".encode())
    os._exit(128 + number)


def _begin() -> None:
    started = getattr(sys.modules["__main__"], "__file__", None)
    in_scripts = started is not None and os.path.realpath(os.path.dirname(started)) == os.path.realpath(_SCRIPTS)
    if in_scripts and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        for number in _SAID:
            if signal.getsignal(number) != signal.SIG_IGN:  # as after `nohup`, or behind `&`
                signal.signal(number, _end)


_begin()
