"""Scripts in processes of their own which need not import torch and transformers first: a warm process forks them.

A script sees what `python SCRIPT ARGUMENTS` gives it: its `sys.argv`, working directory, environment, standard output
and error, exit code and signals. Only what is read while libraries are imported (as `HF_ENDPOINT` is) has been read.
"""

import atexit
import gc
import importlib
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# what the scripts import, and at what they arrive while they run
LIBRARIES = ("hf_eagle.recipe", "hf_eagle.run_parts", "hf_eagle.trainer", "hf_eagle.data.vision_collator", "peft")
LIBRARIES += ("transformers.models.llama.modeling_llama", "matplotlib.figure", "matplotlib.backends.backend_agg")


class WarmPython:
    """A `python` that has imported some modules."""

    def __init__(self, python: str = sys.executable, modules: tuple[str, ...] = LIBRARIES, **environment: str):
        self._environment = {**os.environ, **environment}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        self._server = subprocess.Popen([python, __file__, *modules], env=self._environment, **pipes)
        self._numbers = itertools.count()
        atexit.register(self._close)

    def run(self, *command, cwd=ROOT, ranks: int = 1, timeout: int = 240, **environment) -> subprocess.CompletedProcess:
        """`python SCRIPT ARGUMENTS` or `python -m MODULE ARGUMENTS`, as so many ranks, which share what they print.

        The first exit code that is not 0 counts; what takes more than `timeout` seconds ends with -14.
        """
        command = [str(part) for part in command]
        asked = {"number": next(self._numbers), "command": command, "cwd": str(cwd), "timeout": timeout}
        asked |= {"environment": self._environment | environment, "ranks": [{}] * ranks}
        if ranks > 1:
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
            world |= {"LOCAL_WORLD_SIZE": str(ranks)}
            asked["ranks"] = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        with tempfile.TemporaryDirectory() as folder:
            printed = [Path(folder) / name for name in ("out", "err")]
            self._server.stdin.write(json.dumps(asked | {"printed": list(map(str, printed))}) + "\n")
            self._server.stdin.flush()
            codes = self._codes(asked["number"])
            texts = [path.read_text() for path in printed]
        return subprocess.CompletedProcess(command, next((code for code in codes if code), 0), *texts)

    def _codes(self, number: int) -> list[int]:
        for line in self._server.stdout:
            answered, codes = json.loads(line)
            if answered == number:  # and not what a test asked whose time was over
                return codes
        raise ChildProcessError("the warm process has ended: what it printed says why")

    def _close(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=30)


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
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        print(json.dumps([asked["number"], codes]), flush=True)
    return False


def _become(asked: dict, environment: dict) -> None:
    signal.alarm(asked["timeout"])
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
