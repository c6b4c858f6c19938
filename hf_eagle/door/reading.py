"""Read weights, configs, tokenizers and other files of strangers: whatever these raise becomes one sentence."""

import json
import os
import pickle
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .json_files import is_special, read_json
from .memory import ran_out_of_memory
from .sentences import first_line, is_sentence


# the JSON files of a model's folder, each of which must hold an object
_OBJECTS = (
    *("config.json", "adapter_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json"),
)
# what transformers asks of these files without saying so
_NEEDED = {"model.safetensors.index.json": ("metadata", "weight_map"), "tokenizer.json": ("added_tokens", "model")}
_HEADER_LIMIT = 100_000_000  # bytes, the limit of safetensors itself
# errors that say nothing about the files: a broken device, ranks that lost each other; and see `ran_out_of_memory`
_OF_THE_MACHINE = {"AcceleratorError", "DistBackendError", "DistNetworkError"}


@contextmanager
def reading(argument: str, path: str | os.PathLike, file: str | None = None) -> Iterator[None]:
    """Turn whatever is raised in here, while something foreign is read, into one sentence.

    Sentences of ours pass as they are, and so do errors that are not about the files (no memory, Ctrl-C).

    Args:
        argument: that named what is read.
        path: folder, file or Hub id.
        file: in the folder, if a single one is read.

    Raises:
        OSError: for what was an `OSError`: it does not exist, or cannot be reached.
        ValueError: for anything else.

    Example:
        >>> with reading("target", "my/model"):
        ...     AutoConfig.from_pretrained("my/model")
        ValueError: `target` my/model cannot be read: config.json must hold an object, but holds a list: restore it, or
        write it anew.
    """
    check_ordinary(argument, path)
    try:
        yield
    except Exception as problem:
        if is_sentence(problem) or type(problem).__name__ in _OF_THE_MACHINE or ran_out_of_memory(problem):
            raise

        kind = OSError if isinstance(problem, OSError) else ValueError
        raise kind(f"`{argument}` {path} {_why(path, problem, file)}.") from problem


def check_ordinary(argument: str, path: str | os.PathLike) -> None:
    """Raise `ValueError` for a pipe or a device, or a folder that directly holds one: a read may never end."""
    if is_special(path):
        raise ValueError(f"`{argument}` {path} is no ordinary file: name another.")
    if not os.path.isdir(path):
        return

    try:
        names = sorted(os.listdir(path))
    except OSError:  # told by whoever reads the folder
        return
    special = next((name for name in names if is_special(os.path.join(path, name))), None)
    if special is not None:
        raise ValueError(f"`{argument}` {path} holds {special}, which is no ordinary file: replace it with one.")


@contextmanager
def locating(argument: str, path: str | os.PathLike, part: str) -> Iterator[None]:
    """Add the place to a sentence of ours about a field or a tensor that is raised in here, unless it names the path.

    Args:
        argument: that named the path.
        path: folder or Hub id.
        part: the file in it, or its weights.
    """
    try:
        yield
    except (OSError, ValueError) as problem:
        if not is_sentence(problem) or str(path) in str(problem):
            raise
        raise ValueError(f"`{argument}` {path} cannot be read: in {part}, {problem}") from problem


def _why(path: str | os.PathLike, problem: Exception, file: str | None) -> str:
    """What is wrong, as the rest of a sentence. The files are looked at only now, after something failed."""
    folder = local_folder(path)
    found = folder and broken_file(folder)
    if found:
        return f"cannot be read: {found}"

    missing = _missing(path, problem) or (folder and _key_of(folder, problem))
    if missing:
        return missing

    if isinstance(problem, pickle.UnpicklingError):
        return (
            "cannot be read: its pickled weights hold more than tensors, or are damaged, and are not run: save them as "
            "safetensors, if you trust their source"
        )
    if "trust_remote_code" in str(problem):
        return "comes with code of its own, which is not run: set `trust_remote_code` if you trust its source"

    if type(problem).__name__.startswith("StrictDataclass"):  # transformers uses these for configs only
        file = "config.json"
    text = f"{type(problem).__name__}: {first_line(problem)}"
    named = f": {file} is not accepted ({text})" if file else f" ({text})"
    return f"cannot be read{named}: correct it, or name another"


def _missing(path: str | os.PathLike, problem: Exception) -> str | None:
    """What does not exist, as the rest of a sentence; `None` if something else is wrong."""
    if os.path.isdir(path):
        there = any((Path(path) / name).is_file() for name in _OBJECTS)
        return None if there else "holds no config.json: name the folder of a model"

    if not isinstance(problem, OSError):
        return None
    if os.path.exists(path):
        return "is a file: name the folder that it lies in, or a Hub id"
    if looks_like_a_path(path):
        return "does not exist: correct the path, or name a Hub id"
    return (
        f"is no folder here, and the Hub does not give it ({first_line(problem)}): correct it, or check the connection"
    )


def _key_of(folder: str | os.PathLike, problem: Exception) -> str | None:
    """Which field a `KeyError` is about, as the rest of a sentence: one that a file lacks, or an unknown name in it."""
    if not isinstance(problem, KeyError) or not problem.args:
        return None

    key = problem.args[0]
    for name in _OBJECTS:
        if not os.path.isfile(Path(folder) / name):
            continue
        held = read_json(Path(folder) / name, {})
        if key in _NEEDED.get(name, ()) and key not in held:
            return f"cannot be read: its {name} has no `{key}`: restore the file"
        for field, value in held.items():
            if isinstance(value, str) and value == key:
                return f"cannot be read: `{field}` in its {name} is {key!r}, which is not known: correct it"

    return None


def looks_like_a_path(path: str | os.PathLike) -> bool:
    """Return whether a text cannot be a Hub id, which has at most one slash and begins with no dot."""
    text = str(path)
    owner_and_name, _, revision = text.partition("@")
    if revision and owner_and_name.count("/") == 1:  # a revision of a data set may hold slashes, as `refs/pr/1`
        text = owner_and_name

    return text.startswith(("/", ".", "~")) or text.count("/") > 1 or not isinstance(path, str)


def read_part(
    argument: str, path: str | os.PathLike, file: str | os.PathLike, fields: Mapping[str, Any] | None = None
) -> Any:
    """`read_json(file, fields)` for a model's folder or Hub id; its errors name the argument too."""
    try:
        return read_json(file, fields)
    except ValueError as problem:
        raise ValueError(f"`{argument}` {path} cannot be read: {problem}") from problem


def local_folder(path: str | os.PathLike, revision: str = "main") -> Path | None:
    """The folder on this machine that a folder or Hub id stands for; `None` if it is not downloaded yet."""
    # not `Path`, which raises an error for a name that is too long
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path) or looks_like_a_path(path):
        return None
    # imported late: whatever comes from the Hub has loaded it already
    from transformers.utils import cached_file

    quiet = (f"_raise_exceptions_for_{what}" for what in ("missing_entries", "connection_errors", "gated_repo"))
    try:
        found = cached_file(
            str(path), "config.json", revision=revision, local_files_only=True, **dict.fromkeys(quiet, False)
        )
    except (OSError, ValueError):  # a name that the Hub does not allow
        return None

    return None if found is None else Path(found).parent


# ---- which file is broken ----


def broken_file(folder: str | os.PathLike) -> str | None:
    """The first file of a model's folder that is not what its name says, and why; `None` if all look sound.

    JSON files are parsed and templates decoded; of weights, only the header is read.
    """
    folder = Path(folder)

    for name in _OBJECTS:
        if (folder / name).is_file():
            try:
                read_json(folder / name, {})
            except ValueError as problem:
                return str(problem).removeprefix(f"{folder}{os.sep}").removesuffix(".")

    for file in sorted(folder.glob("*.jinja")):
        try:
            file.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as problem:
            return f"{file.name} is no text ({first_line(problem)}): write it anew"

    for file in sorted(folder.glob("*.safetensors")):
        try:
            read_header(file)
        except ValueError as problem:
            return f"{file.name} {problem}: download or write it anew"

    return None


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by name; only its header is read.

    Raises:
        ValueError: for a file that is broken or cut off, with the rest of a sentence.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as weights:
            length = struct.unpack("<Q", weights.read(8))[0] if size >= 8 else None
            if length is None:
                raise ValueError(f"is cut, it has {size} bytes")
            if length > min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"is cut or no safetensors: its header would take {length:,} bytes of {size:,}")
            text = weights.read(length)
    except OSError as problem:
        raise ValueError(f"cannot be read ({problem.strerror or problem})") from problem

    try:
        header = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
        needed = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as problem:
        raise ValueError("has a header that cannot be read") from problem

    if size != needed:
        raise ValueError(f"{'is cut' if size < needed else 'is damaged'}: it has {size:,} bytes of {needed:,}")
    return shapes
