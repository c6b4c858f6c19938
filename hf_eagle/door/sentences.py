"""Who wrote an error: our own code, whose sentence is shown as it is, or a library."""

import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path


PACKAGE = Path(__file__).resolve().parents[1]
# names of environment variables that hold secrets
_SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
_AS_ARGUMENTS: set[str] = set()  # secrets that came as arguments
# what stands in a header `Authorization`, however a server or a library repeats it
_CREDENTIALS = re.compile(r"""\b(Bearer|Basic) +[^\s'",;)]+""")
_USER_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+@")
_LENGTH = 300  # characters of a library's text
# file and line of code in a traceback as text
_FRAME = re.compile(r'^  File "(.+)", line \d+, in .+(?:\n    (.+))?', re.MULTILINE)
_OF_LOADER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback")


def is_sentence(problem: BaseException) -> bool:
    """Return whether our own code raised this error in order to say something: its text names an argument or a file."""
    return sentence_of(problem) is not None


def sentence_of(problem: BaseException) -> str | None:
    """What our own code says with an error, in one line; `None` for an error that somebody else raised.

    What Python itself raises on a line of ours is no sentence, such as the `OSError` of `open`, which has an errno.
    Errors of worker processes arrive with their traceback as text.
    """
    if not isinstance(problem, (ArithmeticError, ImportError, OSError, RuntimeError, ValueError)):
        return None
    if getattr(problem, "errno", None) is not None or isinstance(problem, (UnicodeError, ZeroDivisionError)):
        return None

    file, code, text = _raised_at(problem)
    ours = file is not None and is_ours(file) and (not code or code.startswith("raise"))
    return " ".join(text.split()) if ours else None


def is_ours(file: str) -> bool:
    """Return whether a source file is one of this package, or one of its scripts."""
    try:
        path = Path(file).resolve()
    except OSError:  # `<frozen runpy>`, in a current folder that was deleted
        return False
    return path.is_relative_to(PACKAGE) or path.is_relative_to(PACKAGE.parent / "scripts")


def place_of(problem: BaseException) -> str:
    """`file.py:line` of the last line of ours that an error came through; without any, of where it was raised."""
    frames = traceback.extract_tb(problem.__traceback__)
    ours = [frame for frame in frames if is_ours(frame.filename)]
    found = (ours or frames or [None])[-1]
    return "an unknown place" if found is None else f"{Path(found.filename).name}:{found.lineno}"


def first_line(problem: BaseException) -> str:
    """The first line of an error's text, without its full stop; "..." stands for what is cut off.

    Secrets are left out here too: of one that is cut off, `without_secrets` would not know the rest.
    """
    lines = [line for line in without_secrets(str(problem)).splitlines() if line.strip()] or [""]
    text = " ".join(lines[0].split())

    if text.endswith(":") and len(lines) > 1:  # it announces the next line
        text = " ".join(f"{text} {lines[1]}".split())

    text = text.rstrip(".:")
    return text[:_LENGTH] + "..." if len(text) > _LENGTH else text


def keep_secret(key: str) -> None:
    """From now on, leave out of whatever is printed a key that came as an argument."""
    _AS_ARGUMENTS.add(key)


def without_secrets(text: str) -> str:
    """A text without keys and passwords.

    These are the keys of the environment, of arguments and of `hf auth login`, and whatever stands in a header or in an
    address.
    """
    secrets = {value.strip() for name, value in os.environ.items() if _SECRET.search(name)}
    secrets |= _AS_ARGUMENTS | _of_hub()
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= 6:  # shorter ones may be ordinary words
            text = text.replace(secret, "***")

    return _USER_IN_ADDRESS.sub("***@", _CREDENTIALS.sub(r"\1 ***", text))


def _of_hub() -> set[str]:
    """The token that the Hub's client has stored; none where no client is loaded, which then has sent none."""
    with suppress(AttributeError, ImportError, OSError, UnicodeError):
        return {sys.modules["huggingface_hub"].get_token() or ""} if "huggingface_hub" in sys.modules else set()
    return set()


def _raised_at(problem: BaseException) -> tuple[str | None, str, str]:
    """File and line of code that an error comes from, and its text."""
    text = str(problem)
    in_pool = getattr(problem.__cause__, "tb", None)  # `multiprocessing` and its kin keep it as text
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
