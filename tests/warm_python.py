"""Scripts in processes of their own which need not import torch and transformers first: a warm process forks them.

A script sees what `python SCRIPT ARGUMENTS` gives it: its `sys.argv`, working directory, environment, standard output
and error, exit code and signals. Only what is read while libraries are imported (as `HF_ENDPOINT` is) has been read.

No clock ends a script but the test's own: when the test's time is over, so is the script.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# what the scripts import, and at what they arrive while they run
LIBRARIES = (
    "hf_eagle.training.run_arguments",
    "hf_eagle.training.parts",
    "hf_eagle.training.trainer",
    "peft",
)
LIBRARIES += ("transformers.models.llama.modeling_llama", "matplotlib.figure", "matplotlib.backends.backend_agg")

_PARENT_DEATH_SIGNAL = 1  # of prctl(2)


class WarmPython:
    """A `python` that has imported some modules."""

    def __init__(self, python: str = sys.executable, modules: tuple[str, ...] = LIBRARIES, **environment: str):
        self._environment = {**os.environ, **environment}
        self._command = [python, __file__, *modules]
        self._server = None
        atexit.register(self._end)

    def run(self, *command, cwd=ROOT, ranks: int = 1, **environment) -> subprocess.CompletedProcess:
        """`python SCRIPT ARGUMENTS` or `python -m MODULE ARGUMENTS`, as so many ranks, which share what they print.

        The first exit code that is not 0 counts.
        """
        command = [str(part) for part in command]
        asked = {"command": command, "cwd": str(cwd), "environment": self._environment | environment}
        asked["ranks"] = [{}] * ranks
        if ranks > 1:
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
            world |= {"LOCAL_WORLD_SIZE": str(ranks)}
            asked["ranks"] = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]

        with tempfile.TemporaryDirectory() as folder:
            printed = [Path(folder) / name for name in ("out", "err")]
            try:
                codes = self._codes(asked | {"printed": list(map(str, printed))})
            except BaseException:  # the test's time is over, or somebody has interrupted it
                self._end()
                sys.stderr.write("".join(path.read_text() for path in printed if path.exists()))
                raise
            texts = [path.read_text() for path in printed]
        return subprocess.CompletedProcess(command, next((code for code in codes if code), 0), *texts)

    def _codes(self, asked: dict) -> list[int]:
        if self._server is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
            self._server = subprocess.Popen(self._command, env=self._environment, **pipes)
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise ChildProcessError("the warm process has ended: what it printed says why")
        return json.loads(answer)

    def _end(self) -> None:
        """Ends the process, and the scripts that it runs."""
        if self._server is not None:
            with suppress(BrokenPipeError):
                self._server.stdin.close()
            self._server.wait()
            self._server.stdout.close()
            self._server = None


@cache
def warm_python() -> WarmPython:
    """One for all tests of this process."""
    return WarmPython(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _serve() -> bool:
    """Forks for every line of standard input; `True` in a child, which is to run `sys.argv`, `False` in the end."""
    for line in sys.stdin:
        asked = json.loads(line)
        ranks = []
        for environment in asked["ranks"]:
            ranks.append(os.fork())
            if ranks[-1] == 0:
                _become(asked, environment)
                return True
        codes = [_exit_code(pid) for pid in ranks]
        with suppress(BrokenPipeError):  # whoever asked has been killed
            os.write(sys.stdout.fileno(), (json.dumps(codes) + "\n").encode())
    return False


def _exit_code(pid: int) -> int:
    """Of a child, once it has ended; one that nobody waits for any longer is ended, with all that it has started."""
    asking = select.poll()
    asking.register(sys.stdin.fileno(), 0)  # a hang-up is always told
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if asking.poll(0):
            with suppress(ProcessLookupError):  # its group is about to be there
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)


def _become(asked: dict, environment: dict) -> None:
    # a group of its own: a signal that it sends to its group, as servers do when they end, is not for the tests
    os.setpgid(0, 0)
    with suppress(AttributeError):  # on Linux it does not outlive this process either, whatever ends that one
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    files = [os.open(os.devnull, os.O_RDONLY)]
    files += [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in asked["printed"]]
    for standard, file in enumerate(files):
        os.dup2(file, standard)
    os.environ.clear()
    os.environ.update(asked["environment"] | environment)
    os.chdir(asked["cwd"])
    sys.argv = asked["command"]


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()  # what is imported is nothing that children should look through
    if _serve():
        if sys.argv[0] == "-m":
            del sys.argv[0]
            sys.path[0] = os.getcwd()
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
