"""The rule that every trial is held to: exit 0 and right, or one sentence; and what was there before is as it was."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from .faults import Trial


# the line for what nobody foresaw, see hf_eagle/door/printer.py
UNFORESEEN = re.compile(r"failed in \S+:\d+ with \w+")
# what a sentence names: a variable of the environment, an argument in backticks or as an option, or a file
NAMED = re.compile(
    r"\b[A-Z]+_[A-Z_]+\b|`[\w\-. ]+`|--\w+|\w\.(json|jsonl|yaml|safetensors|jinja|txt|py|bin|pt|png|html)\b|/\w+"
)
# a verb's own, not a library's "I/O error: ..." in the words of a run that it started
SENTENCE = re.compile(r"(?:[\w.-]+(?: [\w-]+)?: )?error: ")
STATUSES = (0, 1, 2)


def snapshot(world: Path) -> dict[str, str]:
    """What every file of the world holds, by its path; links are followed to files alone."""
    return {str(path.relative_to(world)): _held(path) for path in sorted(world.rglob("*"))}


def _held(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    return "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


def broken_rule(trial: Trial, status: int, printed: str, errors: str, before: dict[str, str]) -> str | None:
    """What is wrong with how a verb ended; `None` if nothing is.

    Args:
        trial: what was run.
        status: its exit status.
        printed, errors: what it wrote to standard output and error.
        before: the snapshot of the world that it began with.
    """
    if "Timeout (" in errors:
        return "hangs"
    if status not in STATUSES:
        return f"exit status {status}"
    if "Traceback (most recent call last)" in errors:
        return "traceback"
    changed = changed_files(trial, before)
    if changed:
        return f"changed {', '.join(changed[:3])}"
    if trial.verb.script == "check_draft.py" and status == 1 and ". Fix: " in printed:
        return None  # its findings are what was asked for
    return _of_success(trial, errors) if status == 0 else _of_sentence(errors)


def changed_files(trial: Trial, before: dict[str, str]) -> list[str]:
    """Files that were there before, are no outputs of the verb, and hold something else now."""
    now = snapshot(trial.world)
    kept = [name for name in before if Path(name).parts[0] not in trial.verb.outputs]
    return [name for name in kept if now.get(name) != before[name]]


def _of_sentence(errors: str) -> str | None:
    """What is wrong with the words of an error."""
    told = [line for line in errors.splitlines() if SENTENCE.match(line)]
    if not told:
        return "no sentence"
    if len(told) > 1:
        return "more than one sentence"
    if UNFORESEEN.search(told[0]):
        return "nobody foresaw it"
    if not NAMED.search(told[0].partition("error: ")[2]):
        return "names nothing"
    return None


def _of_success(trial: Trial, errors: str) -> str | None:
    """What is wrong with what a verb says it has done."""
    for name in trial.verb.outputs:
        path = trial.world / name
        if path.suffix == ".json" and path.is_file():
            try:
                content = json.loads(path.read_text())
            except ValueError:
                return f"exit 0, but {name} is no JSON"
            if not _is_finite(content):
                return f"exit 0, but {name} holds a number that is none"
    return None


def _is_finite(content: Any) -> bool:
    if isinstance(content, dict):
        return all(map(_is_finite, content.values()))
    if isinstance(content, list):
        return all(map(_is_finite, content))
    return not isinstance(content, float) or math.isfinite(content)
