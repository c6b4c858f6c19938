"""Runs that can be killed: a process that has imported what they need forks a child for each, so twenty are cheap."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


class Forks:
    """Children of `python WORKER`, whose main calls `serve_forks`; one at a time."""

    def __init__(self, worker: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self._worker = subprocess.Popen([sys.executable, str(worker)], **pipes)

    def start(self, *arguments) -> int:
        """The pid of a child that runs with these arguments."""
        self._worker.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._worker.stdin.flush()
        return int(self._worker.stdout.readline())

    def wait(self) -> int:
        """The exit code of the child, negative where a signal ended it."""
        return int(self._worker.stdout.readline())

    def kill_when(self, journal: Path, lines: int, seconds: float, *arguments) -> int:
        """Starts a child and kills it so long after its journal has grown by so many lines; its exit code."""
        begun = _lines(journal)
        pid = self.start(*arguments)
        while _lines(journal) < begun + lines:
            os.kill(pid, 0)  # `ProcessLookupError` where the child has ended without so many lines
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        return self.wait()

    def close(self) -> None:
        self._worker.stdin.close()
        self._worker.wait(timeout=30)
        self._worker.stdout.close()


def serve_forks(run) -> None:
    """Calls `run(*arguments)` in a child for every line of standard input."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run(*json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0
