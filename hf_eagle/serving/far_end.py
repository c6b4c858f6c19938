"""A script that runs in the server's environment, which has vLLM, and answers lines of JSON with lines of JSON."""

import json
import os
import queue
import subprocess
import threading
from pathlib import Path


READY_WITHIN = 1800.0  # seconds; large weights take minutes
ANSWER_WITHIN = 6 * 3600.0  # one answer is all prompts of a round
_NAME_ONE = "name the python of an environment that has vLLM"
_LONGEST_LINE = 64 * 2**20  # characters; an answer is token ids of a batch


class FarEnd:
    """A script in a process of its own; `with` waits until it is ready, and ends it at the end of the block.

    Args:
        python: interpreter that has vLLM.
        script: takes its settings as JSON and prints a line when it is ready.
        settings: its settings.
        log: file for the output of the script and of vLLM.
        environment: variables that it gets in addition to those of this process.

    Raises `RuntimeError` that names `serving_python` if the script cannot be run, or ends without any output. Raises it
    with the end of the log if the script ends early, sends nothing for too long, or answers with anything but JSON.
    """

    def __init__(self, python: str | Path, script: Path, settings: dict, log: Path, environment=None):
        self.log, self.script = log, script
        command = [str(python), str(script), json.dumps(settings)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with log.open("w") as output:
            try:
                self.process = subprocess.Popen(
                    command, env=os.environ | (environment or {}), stderr=output, text=True, **pipes
                )
            except OSError as problem:
                raise RuntimeError(
                    f"`serving_python` {python} cannot be run ({problem.strerror or problem}): {_NAME_ONE}."
                ) from problem

    def __enter__(self):
        self._exchange("", READY_WITHIN)
        return self

    def __exit__(self, *_) -> None:
        try:
            self.process.communicate(timeout=120)  # its input ends, and so does it
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()  # not for its output, which children of its own may keep open

    def ask(self, request):
        """Send a line and return the script's answer."""
        return self._exchange(json.dumps(request) + "\n", ANSWER_WITHIN)

    def _exchange(self, asked: str, seconds: float):
        """Write a line, or none, and wait for one; in a thread, since reading a pipe has no timeout."""
        answers = queue.SimpleQueue()

        def exchange() -> None:
            try:
                self.process.stdin.write(asked)
                self.process.stdin.flush()
            except OSError:
                pass  # it has ended, and reading says so
            answers.put(self.process.stdout.readline(_LONGEST_LINE))

        threading.Thread(target=exchange, daemon=True).start()
        try:
            line = answers.get(timeout=seconds)
        except queue.Empty:
            self.process.kill()
            raise RuntimeError(
                f"vLLM sent nothing for {seconds:g} seconds and was ended; its last output:\n{self._last_words()}"
            ) from None
        if not line:
            self.process.wait()
            said = self._last_words()
            if not said.strip():
                raise RuntimeError(f"`serving_python` {self.process.args[0]} ended without any output: {_NAME_ONE}.")
            raise RuntimeError(f"vLLM ended; its last output:\n{said}")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise RuntimeError(
                f"{self.script} printed {line[:100]!r}, which is not JSON; its last output:\n{self._last_words()}"
            ) from None

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]
