"""What is made wrong in a trial: an argument, a file, a field deep inside a file, where an output goes, or the disk.

Each fault takes the trial, changes its world or its command, and returns a line that says what was done.
"""

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .world import Verb


LONG = "long" * 5000
TEXTS = [
    "",
    " ",
    "text",
    "no",
    "null",
    "None",
    "true",
    "[1, 2",
    "{",
    "{}",
    "[]",
    "é\u202e\u0000x".replace("\0", ""),
    LONG,
]
NUMBERS = ["0", "-1", "-0.5", "nan", "inf", "-inf", "1e30", "1e-30", "3.7", "9" * 30, "0x10", "1,2", "1..3"]
# outside of the world nothing can be made: a verb may do what such a path asks for
PATHS = [
    "/proc/no/such/place",
    "no_such_name",
    "target",
    "chats.jsonl",
    "other",
    "run",
    "run/config.json",
    "/dev/null/x",
]
PATHS += [
    "target/model.safetensors",
    "out/../target",
    ".",
    "..",
    "/proc/sys",
    "~no/such",
    "me/no-such-model",
    "a" * 300,
]
VALUES = TEXTS + NUMBERS + PATHS
JSON_VALUES: list[Any] = [None, True, 0, -1, 10**30, 1.5, float("nan"), "", "text", [], {}, [None], {"a": []}, [[]]]
JSON_VALUES += ["\ud800", [1] * 50, {"role": {}}, 10**6]
ENDINGS = {".json", ".jsonl", ".yaml", ".safetensors", ".jinja", ".pt", ".bin", ".txt"}


@dataclass
class Trial:
    """One run of a verb, in a world of its own.

    Attributes:
        verb: what is run.
        world: its folder, which is the working directory.
        command: the arguments, changed by faults.
        random: draws everything.
        size_limit: bytes that a file may have, as on a full disk; `None` for any number.
        server: the name of the chat server's fault.
    """

    verb: Verb
    world: Path
    command: list[str]
    random: random.Random
    size_limit: int | None = None
    server: str = "none"


def another_value(trial: Trial) -> str:
    """An argument of the command gets another value."""
    places = [n for n, word in enumerate(trial.command) if n and trial.command[n - 1].startswith("--")]
    places = [n for n in places if not trial.command[n].startswith("--")] or [0]
    place = trial.random.choice(places)
    trial.command[place] = trial.random.choice(VALUES)
    return f"{trial.command[place - 1]} is {trial.command[place][:40]!r}"


def another_argument(trial: Trial) -> str:
    """An argument that the command does not name gets a value."""
    name = trial.random.choice(_names_of_arguments(trial.verb.script))
    value = trial.random.choice(VALUES)
    trial.command += [f"--{name}={value}"] if trial.random.random() < 0.7 else [f"--{name}", value]
    return f"--{name} {value[:40]!r} is added"


def missing_value(trial: Trial) -> str:
    """A word of the command is left out, or stands twice."""
    place = trial.random.randrange(len(trial.command))
    if trial.random.random() < 0.3:
        trial.command.insert(place, trial.command[place])
        return f"{trial.command[place][:40]!r} stands twice"
    return f"{trial.command.pop(place)[:40]!r} is left out"


def spoiled_file(trial: Trial) -> str:
    """A file is cut, emptied, filled with other bytes, or has some of its bytes changed."""
    path = _some_file(trial)
    content = bytearray(path.read_bytes())
    how = trial.random.choice(["cut", "empty", "other", "changed", "doubled"])
    if how == "cut":
        content = content[: trial.random.randrange(len(content) + 1)]
    elif how == "empty":
        content = bytearray()
    elif how == "other":
        content = bytearray(trial.random.randbytes(trial.random.choice([1, 100, 10_000])))
    elif how == "doubled":
        content = content * 2
    else:
        for _ in range(min(len(content), trial.random.choice([1, 5, 50]))):
            content[trial.random.randrange(len(content))] = trial.random.randrange(256)
    path.write_bytes(content)
    return f"{path.relative_to(trial.world)} is {how}"


def replaced_file(trial: Trial) -> str:
    """A file or folder is gone, or something else stands in its place."""
    path = _some_file(trial)
    if trial.random.random() < 0.2:
        path = path.parent if path.parent != trial.world else path
    name = path.relative_to(trial.world)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    how = trial.random.choice(["gone", "a folder", "a link to itself", "a link to nothing", "a link to other"])
    if how == "a folder":
        path.mkdir()
    elif how != "gone":
        to = {"a link to itself": path.name, "a link to nothing": "nothing"}.get(how, str(trial.world / "other"))
        path.symlink_to(to)
    return f"{name} is {how}"


def other_field(trial: Trial) -> str:
    """Somewhere inside a JSON, JSONL or YAML file a value is another one, or a field is gone or new."""
    path = _some_file(trial, {".json", ".jsonl", ".yaml"})
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    place = trial.random.randrange(len(lines))
    read = yaml.safe_load if path.suffix == ".yaml" else json.loads
    content = [read(lines[place])]
    told = change_somewhere(content, trial.random)
    if path.suffix == ".yaml":
        lines[place] = yaml.safe_dump(content[0])
    else:
        lines[place] = json.dumps(content[0])
    path.write_text("\n".join(lines) + "\n")
    return f"{path.relative_to(trial.world)}, line {place + 1}: {told}"


def output_over_input(trial: Trial) -> str:
    """An output is named like something that is there, by its own name or by a link."""
    places = [n for n, word in enumerate(trial.command) if word in trial.verb.outputs]
    if not places:
        return another_argument(trial)
    place = trial.random.choice(places)
    onto = trial.random.choice(
        ["chats.jsonl", "prompts.jsonl", "target", "run", "run/config.json", "other", "ids.json"]
    )
    if trial.random.random() < 0.4:
        (trial.world / "link").symlink_to(trial.world / onto)
        trial.command[place] = "link"
        return f"{trial.command[place - 1]} is a link to {onto}"
    trial.command[place] = onto
    return f"{trial.command[place - 1]} is {onto}"


def full_disk(trial: Trial) -> str:
    """No file may be larger than so many bytes."""
    trial.size_limit = trial.random.choice([0, 100, 1_000, 5_000, 20_000])
    return f"files may have {trial.size_limit} bytes"


def hostile_server(trial: Trial) -> str:
    """The chat server answers with a fault."""
    if "{url}" not in trial.command:
        return another_value(trial)
    from .server import FAULTS

    trial.server = trial.random.choice(sorted(FAULTS))
    return f"the server answers with the fault {trial.server}"


FAULTS: list[Callable[[Trial], str]] = [
    *(another_value, another_argument, missing_value, spoiled_file, replaced_file),
    *(other_field, output_over_input, full_disk, hostile_server),
]


def _some_file(trial: Trial, endings: set[str] = ENDINGS) -> Path:
    """A file of the world, rather one that the command names, itself or by its folder."""
    files = sorted(path for path in trial.world.rglob("*") if path.suffix in endings and path.is_file())
    named = {word.split("/")[0] for word in trial.command}
    near = [path for path in files if path.relative_to(trial.world).parts[0] in named]
    return trial.random.choice(near if near and trial.random.random() < 0.9 else files)


def change_somewhere(content: list, draw: random.Random) -> str:
    """Change a value at a random depth of a list that holds what a file holds."""
    places = list(_places(content))
    holder, key, name = draw.choice(places)
    if isinstance(holder, dict) and draw.random() < 0.25:
        del holder[key]
        return f"{name} is gone"
    holder[key] = draw.choice(JSON_VALUES)
    return f"{name} is {str(holder[key])[:40]!r}"


def _places(content: Any, name: str = ""):
    """Every value in nested lists and objects: what holds it, its key, and its name."""
    inside = list(content.items()) if isinstance(content, dict) else list(enumerate(content))
    for key, value in inside[:40]:  # a tokenizer's vocabulary is long, and its entries are alike
        yield content, key, f"{name}[{key!r}]"
        if isinstance(value, (dict, list)):
            yield from _places(value, f"{name}[{key!r}]")


@cache
def _names_of_arguments(script: str) -> list[str]:
    """The arguments of a script, from the help that it prints."""
    option = "--help_all" if script in ("train_eagle.py", "cache_features.py") else "--help"
    command = [sys.executable, Path(__file__).resolve().parents[2] / script, option]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted(set(re.findall(r"^ +--([a-z_0-9]+)", printed, re.MULTILINE)) - {"help", "help_all"})
