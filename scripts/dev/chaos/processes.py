"""Ranks as forks of a process that has imported all they need: started, watched, and gone when they should be.

The process that forks computes nothing itself, so its children find torch as a new interpreter would.
"""

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


_PARENT_DEATH_SIGNAL = 1  # of prctl(2)
_GRACE = 15.0  # seconds in which the helpers of a rank that was killed find out
_TORCHRUN_LOOKS = 0.1  # seconds between two looks of torchrun at its ranks
LIBRARIES = (
    *("hf_eagle.training.run_arguments", "hf_eagle.training.parts", "hf_eagle.training.trainer"),
    *("hf_eagle.training.acceptance", "hf_eagle.evaluation.plots", "hf_eagle.serving.check"),
    *("transformers.models.llama.modeling_llama", "transformers.trainer", "peft"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "torch.distributed.fsdp"),
)


@dataclass
class Ended:
    """How some ranks ended.

    Attributes:
        codes: of each rank, negative where a signal ended it.
        printed: by each rank.
        journals: of each rank, the objects in its journal.
        hung: whether they had to be ended, since their time was over.
        left: processes that outlived them.
        seconds: that it took.
    """

    codes: list[int]
    printed: list[str]
    journals: list[list[dict]]
    hung: bool = False
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0


def warm_up() -> None:
    """Import what ranks need."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


class Ranks:
    """Some forks, each of which runs a function and exits as a script does.

    Args:
        work: called with the number of the rank and the file descriptor of its journal.
        ranks: how many.
        folder: where they run, and where `pids.json` will be.
        environment: what is added to this process's.
    """

    def __init__(self, work: Callable[[int, int], None], ranks: int, folder: Path, environment: dict[str, str]):
        self.selector = selectors.DefaultSelector()
        self.texts = [{"printed": bytearray(), "journal": bytearray()} for _ in range(ranks)]
        port = _free_port()
        (folder / "pids.json").unlink(missing_ok=True)
        self.pids = []
        for rank in range(ranks):
            own = dict(environment)
            if ranks > 1:
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            self.pids.append(self._fork(work, rank, folder, own))
        part = folder / "pids.part"
        part.write_text(json.dumps(self.pids))
        part.replace(folder / "pids.json")

    def _fork(self, work, rank: int, folder: Path, environment: dict[str, str]) -> int:
        pipes = {name: os.pipe() for name in ("printed", "journal")}
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _become(folder, environment, pipes["printed"][1])
            _exit(work, rank, pipes["journal"][1])
        for name, (read, write) in pipes.items():
            os.close(write)
            os.set_blocking(read, False)
            self.selector.register(read, selectors.EVENT_READ, self.texts[rank][name])
        return pid

    def wait(self, seconds: float, launcher: bool = False, pause: float = 0.5) -> Ended:
        """Wait for all of them; those that are stopped go on after a pause.

        Args:
            seconds: until they are ended.
            launcher: end the others when one has ended badly, as torchrun does.
            pause: seconds.
        """
        begun, codes, wake, told, hung = time.monotonic(), {}, {}, None, False
        try:
            while len(codes) < len(self.pids):
                self._read(0.01)
                now = time.monotonic()

                for pid in [pid for pid in self.pids if pid not in codes]:
                    ended, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
                    if ended and os.WIFSTOPPED(status):
                        wake[pid] = now + pause
                    elif ended:
                        codes[pid] = os.waitstatus_to_exitcode(status)

                for pid in [pid for pid, when in wake.items() if when <= now]:
                    del wake[pid]
                    os.kill(pid, signal.SIGCONT)

                # torchrun looks at its ranks from time to time, so it does not learn of a bad end at once
                if launcher and told is None and any(codes.values()):
                    told = now + _TORCHRUN_LOOKS
                if launcher and told is not None and now >= told:
                    launcher = False
                    self._send(signal.SIGTERM, codes)

                if not hung and now - begun > seconds:
                    hung = True
                    self._send(signal.SIGUSR2, codes)  # they print where they are
                    self._read(1.0)
                    self._send(signal.SIGKILL, codes)
            left = self._left()
        finally:
            self._end()

        journals = [_lines(text["journal"]) for text in self.texts]
        printed = [text["printed"].decode(errors="replace") for text in self.texts]
        took = time.monotonic() - begun
        return Ended([codes[pid] for pid in self.pids], printed, journals, hung, left, took)

    def _send(self, number: int, codes: dict[int, int]) -> None:
        for pid in self.pids:
            if pid not in codes:
                os.kill(pid, number)

    def _read(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            with suppress(BlockingIOError):
                found = os.read(key.fd, 1 << 16)
                key.data.extend(found)
                if not found:
                    self.selector.unregister(key.fd)
                    os.close(key.fd)

    def _left(self) -> list[str]:
        """What is still there of the ranks' sessions, once helpers had time to find out that they are alone."""
        until = time.monotonic() + _GRACE
        while (left := in_sessions(self.pids)) and time.monotonic() < until:
            self._read(0.1)
        return left

    def _end(self) -> None:
        for pid in self.pids:
            for process in in_sessions([pid]):
                with suppress(ProcessLookupError):
                    os.kill(int(process.split()[0]), signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._read(0.0)
        for key in list(self.selector.get_map().values()):
            self._read(0.0)
            with suppress(KeyError, OSError):
                self.selector.unregister(key.fd)
                os.close(key.fd)
        self.selector.close()


def in_sessions(sessions: list[int]) -> list[str]:
    """Processes of these sessions that have not ended: their numbers and names."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            number, _, rest = path.read_text().partition(" (")
            name, _, fields = rest.rpartition(") ")
            state, _, _, session = fields.split()[:4]
            if int(session) in sessions and state not in "ZX":
                found.append(f"{number} {name}")
    return found


def _become(folder: Path, environment: dict[str, str], printed: int) -> None:
    os.setsid()
    with suppress(AttributeError):  # on Linux it does not outlive this process, whatever ends that
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    null = os.open(os.devnull, os.O_RDONLY)
    for standard, file in enumerate((null, printed, printed)):
        os.dup2(file, standard)
    faulthandler.register(signal.SIGUSR2)  # where it hangs
    os.environ.update(environment)
    os.chdir(folder)


def _exit(work, rank: int, journal: int) -> None:
    """Run it, and end this process in the way in which Python ends one, from wherever it was forked."""
    code = 0
    try:
        work(rank, journal)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    ctypes.pythonapi.Py_Exit(code)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _lines(text: bytearray) -> list[dict]:
    """Whole lines; a rank that was killed may leave half of one."""
    return [json.loads(line) for line in bytes(text).split(b"\n")[:-1]]
