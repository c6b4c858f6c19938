"""Each script imports this first: until `run_verb` takes over, a signal ends the script in one line, not a traceback.

The imports of a script take a second. A script that is itself imported, or run by `hf-eagle`, leaves signals to its
caller.
"""

import os
import signal
import sys


_SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_SCRIPTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts")


def end_of_beginning() -> None:
    """Make Ctrl-C raise `KeyboardInterrupt` again, so that open files can be closed."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame) -> None:
    """End at once: nothing is open yet, and whatever is being imported might catch an exception."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank speaks for all
        os.write(2, f"{_SAID[number]}\n".encode())
    os._exit(128 + number)


def _begin() -> None:
    started = getattr(sys.modules["__main__"], "__file__", None)
    in_scripts = started is not None and os.path.realpath(os.path.dirname(started)) == os.path.realpath(_SCRIPTS)

    if in_scripts and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        for number in _SAID:
            if signal.getsignal(number) != signal.SIG_IGN:  # ignored under `nohup`, or in the background (`&`)
                signal.signal(number, _end)


_begin()
