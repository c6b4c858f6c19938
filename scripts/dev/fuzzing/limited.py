"""Run a script with a limit of time and of the size of files: `limited.py SECONDS BYTES SCRIPT ARGUMENTS`.

A size below 0 is no limit. A script whose time is over prints where each of its threads is, and ends with status 1.
"""

import faulthandler
import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path


def unlimited(number: int) -> None:
    """What this process prints there passes through another process, whose files may be of any size."""
    passing = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=number)
    os.dup2(passing.stdin.fileno(), number)


if __name__ == "__main__":
    seconds, size = int(sys.argv[1]), int(sys.argv[2])
    sys.argv = sys.argv[3:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    faulthandler.dump_traceback_later(seconds, exit=True)
    if size >= 0:
        for number in (1, 2):
            unlimited(number)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails, as on a full disk, and nothing is killed
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    runpy.run_path(sys.argv[0], run_name="__main__")
