"""A script that runs in the server's environment, which has vLLM, and answers lines of JSON with lines of JSON."""

import json
import subprocess
from pathlib import Path


_LONGEST_LINE = 64 * 2**20  # characters; an answer is token ids of a batch


class FarEnd:
    """Such a script in a process of its own; `with` waits until it is ready and ends it.

    Args:
        python: interpreter that has vLLM.
        script: takes its settings as JSON and prints a line when it is ready.
        settings: what it is given.
        log: file for what it and vLLM print.

    Raises a `RuntimeError` with the end of the log when it ends by itself, or answers with something else than JSON.
    """

    def __init__(self, python: str | Path, script: Path, settings: dict, log: Path):
        self.log, self.script = log, script
        command = [str(python), str(script), json.dumps(settings)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True
            )

    def __enter__(self):
        self._answer()
        return self

    def __exit__(self, *_) -> None:
        try:
            self.process.communicate(timeout=120)  # its input ends, and so does it
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def ask(self, request):
        """What it answers to a line."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and reading says so
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline(_LONGEST_LINE)
        if not line:
            self.process.wait()
            raise RuntimeError(f"vLLM ended; its last words:\n{self._last_words()}")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise RuntimeError(
                f"{self.script} printed {line[:100]!r}, which is no line of JSON; its last words:\n{self._last_words()}"
            ) from None

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]
