"""Receive SIGTERM and Ctrl-C as requests to stop; a second one ends the process at once.

A scheduler sends SIGTERM before it kills, a person presses Ctrl-C. `stopping.py` then stops the trainer.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ..door.printer import Terminated


SIGNALS = (signal.SIGTERM, signal.SIGINT)
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
# A scheduler signals launcher and ranks, and the launcher signals its ranks again within a second. A person who reads
# the notice needs longer than this to ask again.
GRACE = 2.0  # seconds
_OVER = b"\0"  # not the number of a signal
_NOTICE = "{}: the run stops when this step is done and saved; another signal after over {:.0f} s ends it at once.\n"


def ending(number: int, message: str) -> BaseException:
    """The exception that ends a run: `KeyboardInterrupt` for Ctrl-C, `SystemExit` with status 143 for SIGTERM."""
    return KeyboardInterrupt(message) if number == signal.SIGINT else Terminated(message)


class StopSignals:
    """Catch SIGTERM and Ctrl-C inside a block, and keep the first as a request.

    A second one that does not merely repeat the first stops at once. A single process raises it on the spot. One of
    several ranks may be inside a collective, where Python runs no handler: there a thread ends the process.

    Args:
        alone: whether this is the only rank.
        tells: whether this process prints a notice.

    Attributes:
        asked (`signal.Signals`, *optional*): the signal that asks this process to stop.
    """

    _heard_by: "StopSignals | None" = None

    def __init__(self, alone: bool = True, tells: bool = True):
        self.alone, self.tells = alone, tells
        self.asked: signal.Signals | None = None
        self._at = 0.0
        self._earlier: dict[int, object] = {}

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Treat signals as requests inside the block; restore the earlier handlers after it.

        Handlers belong to the main thread: in another one, do nothing. A signal that is ignored stays ignored.
        """
        self.asked = None
        ours = threading.current_thread() is threading.main_thread()
        taken = [x for x in SIGNALS if ours and signal.getsignal(x) not in (None, signal.SIG_IGN)]
        if not taken:
            yield
            return

        self._earlier = {number: signal.signal(number, self._handle) for number in taken}
        StopSignals._heard_by = self
        close = None if self.alone else self._listen()
        try:
            yield
        finally:
            for number, handler in self._earlier.items():
                signal.signal(number, handler)
            StopSignals._heard_by = None
            if close is not None:
                close()

    def _handle(self, number: int, frame) -> None:
        if not self.alone:
            # the thread judges later ones: after a collective, a rank may get here late with the first one
            if self.asked is None:
                self._take(number)
        elif self._take(number):
            raise ending(number, self._at_once(number))

    def _take(self, number: int) -> bool:
        """Note a signal; whether it is a second one."""
        if self.asked is not None:
            return time.monotonic() - self._at > GRACE

        self._at, self.asked = time.monotonic(), signal.Signals(number)
        if self.tells:  # not with print, whose buffer may be in use when the signal comes
            os.write(2, _NOTICE.format(NAMES[self.asked], GRACE).encode())
        return False

    @staticmethod
    def _at_once(number: int) -> str:
        return f"Stopped at once by a second signal, {NAMES[number]}: go on with `--resume_from_checkpoint last`."

    def _listen(self) -> Callable[[], None]:
        """Start a thread that sees signals while the main thread is in a collective; return what ends it."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        thread = threading.Thread(target=self._hear, args=(reader,), name="signals", daemon=True)
        thread.start()

        def close() -> None:
            signal.set_wakeup_fd(earlier)
            os.write(writer, _OVER)  # closing it is not enough: a forked child may hold it open
            thread.join()
            os.close(writer)
            os.close(reader)

        return close

    def _hear(self, reader: int) -> None:
        first = True
        for byte in iter(partial(os.read, reader, 1), _OVER):
            number = byte[0]
            if number not in self._earlier:
                continue

            # the first signal must not count as the second one, however late this thread sees it
            if self._take(number) and not first:
                os.write(2, f"{self._at_once(number)}\n".encode() if self.tells else b"")
                os._exit(128 + number)
            first = False


def _forget_in_child() -> None:
    """Give a forked child the earlier handlers: a signal that ends it is no request to its parent."""
    heard_by, StopSignals._heard_by = StopSignals._heard_by, None
    if heard_by is not None:
        signal.set_wakeup_fd(-1)
        for number, handler in heard_by._earlier.items():
            signal.signal(number, handler)


os.register_at_fork(after_in_child=_forget_in_child)


# ---- processes that read data ----


def leave_signals_to_parent(earlier: Callable[[int], None] | None, worker: int) -> None:
    """Keep a `DataLoader` worker alive as long as its parent: the step under way needs its batches.

    Launchers and terminals signal whole groups of processes. A signal from the parent itself still ends the worker.

    Args:
        earlier: the previous `worker_init_fn`, called first.
        worker: number of the worker.
    """
    if earlier is not None:
        earlier(worker)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_parent, args=(os.getppid(),), daemon=True).start()


def _await_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
