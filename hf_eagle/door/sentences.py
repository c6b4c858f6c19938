"""Whose words an error has: a sentence of ours, which is shown as it is, or whatever a library raised."""

import os
import re
import traceback
from pathlib import Path


PACKAGE = Path(__file__).resolve().parents[1]
# names of environment variables that hold secrets
_SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
_USER_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+@")
_LENGTH = 300  # characters of a library's text
# file and line of code in a traceback as text
_FRAME = re.compile(r'^  File "(.+)", line \d+, in .+(?:\n    (.+))?', re.MULTILINE)
_OF_LOADER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback")


def is_sentence(problem: BaseException) -> bool:
    """Whether our own code raised this error to say something: its text names an argument or a file."""
    return sentence_of(problem) is not None


def sentence_of(problem: BaseException) -> str | None:
    """What our own code says with an error, in one line; `None` for an error that somebody else raised.

    What Python itself raises in a line of ours is no sentence, such as the `OSError` of `open`, whose number tells it.
    Errors of worker processes are told by their tracebacks, which come as text.
    """
    if not isinstance(problem, (ArithmeticError, ImportError, OSError, RuntimeError, ValueError)):
        return None
    if getattr(problem, "errno", None) is not None or isinstance(problem, (UnicodeError, ZeroDivisionError)):
        return None
    file, code, text = _raised_at(problem)
    ours = file is not None and is_ours(file) and (not code or code.startswith("raise"))
    return " ".join(text.split()) if ours else None


def is_ours(file: str) -> bool:
    """Whether a source file is one of this package, or one of its scripts."""
    path = Path(file).resolve()
    return path.is_relative_to(PACKAGE) or path.is_relative_to(PACKAGE.parent / "scripts")


def place_of(problem: BaseException) -> str:
    """`file.py:line` of the last line of ours that an error came through, or where it was raised if there is none."""
    frames = traceback.extract_tb(problem.__traceback__)
    ours = [frame for frame in frames if is_ours(frame.filename)]
    found = (ours or frames or [None])[-1]
    return "an unknown place" if found is None else f"{Path(found.filename).name}:{found.lineno}"


def first_line(problem: BaseException) -> str:
    """The beginning of an error's text, in one line and without its full stop; "..." stands for what is left out."""
    lines = [line for line in str(problem).splitlines() if line.strip()] or [""]
    text = " ".join(lines[0].split())
    if text.endswith(":") and len(lines) > 1:  # which announces what follows
        text = " ".join(f"{text} {lines[1]}".split())
    text = text.rstrip(".:")
    return text[:_LENGTH] + "..." if len(text) > _LENGTH else text


def without_secrets(text: str) -> str:
    """A text in which neither a key from the environment nor a password in an address can be read."""
    secrets = {value.strip() for name, value in os.environ.items() if _SECRET.search(name)}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= 6:  # shorter ones are words of any text
            text = text.replace(secret, "***")
    return _USER_IN_ADDRESS.sub("***@", text)


def _raised_at(problem: BaseException) -> tuple[str | None, str, str]:
    """File and line of code that an error comes from, and its text."""
    text = str(problem)
    in_pool = getattr(problem.__cause__, "tb", None)  # of `multiprocessing` and its kin
    if isinstance(in_pool, str):
        return *_last_frame(in_pool), text
    if _OF_LOADER.match(text):
        frames, _, said = text.rstrip().rpartition(f"\n{type(problem).__name__}: ")
        return *_last_frame(frames), said

    frames = traceback.extract_tb(problem.__traceback__)
    return (frames[-1].filename, frames[-1].line or "", text) if frames else (None, "", text)


def _last_frame(printed: str) -> tuple[str | None, str]:
    frames = _FRAME.findall(printed)
    return frames[-1] if frames else (None, "")
