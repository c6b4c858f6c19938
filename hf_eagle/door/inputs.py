"""Check inputs before anything is loaded, so that a wrong path costs no time and the error names its argument."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .reading import check_ordinary, looks_like_a_path
from .sentences import is_sentence


DATA_FILES = (".json", ".jsonl", ".parquet", ".csv", ".arrow")


def check_file(argument: str, path: str | os.PathLike) -> None:
    """Raise `ValueError` unless this is a readable file."""
    if os.path.isdir(path):
        raise ValueError(f"`{argument}` {path} is a folder: name a file.")

    _check_exists(argument, path, "correct the path")
    _check_readable(argument, path)


def check_folder(argument: str, path: str | os.PathLike, *files: str) -> None:
    """Raise `ValueError` unless this is a readable folder of this machine that holds one of these files."""
    _check_exists(argument, path, "correct the path")

    if not os.path.isdir(path):
        raise ValueError(f"`{argument}` {path} is a file: name a folder.")

    _check_inside(argument, path, files)


def check_model(argument: str, path: str, *files: str) -> None:
    """Raise `ValueError` unless this is a folder with one of these files, or may be a Hub id; the Hub is not asked."""
    if os.path.isdir(path):
        return _check_inside(argument, path, files)

    _check_named(argument, path)
    if os.path.exists(path):
        raise ValueError(f"`{argument}` {path} is a file: name a folder or a Hub id.")
    if looks_like_a_path(path):
        raise ValueError(f"`{argument}` {path} does not exist: correct the path, or name a Hub id.")


def check_target(argument: str, path: str, gguf_file: str | None = None) -> None:
    """[`check_model`] for a model, a PEFT adapter, or a folder with this GGUF file."""
    check_model(argument, path, *((gguf_file,) if gguf_file else ("config.json", "adapter_config.json")))


def check_draft(argument: str, path: str) -> None:
    """[`check_model`] for a draft."""
    check_model(argument, path, "config.json")


def check_data(argument: str, sources: list[str]) -> None:
    """Raise `ValueError` for a source of records that is neither a readable file or folder nor a possible Hub id."""
    for source in sources:
        _check_named(argument, source)
        if os.path.isdir(source):
            _check_inside(argument, source, ())
        elif os.path.exists(source):
            _check_readable(argument, source)
        elif looks_like_a_path(source) or source.endswith(DATA_FILES):
            raise ValueError(f"`{argument}` {source} does not exist: give a file, a folder or the id of a data set.")


@contextmanager
def naming(argument: str, path: str | os.PathLike | None = None) -> Iterator[None]:
    """Prefix the package's own errors in this block with the argument's name, unless they begin with one.

    Args:
        argument: the argument that named the file.
        path: the file. If given, only errors that mention it are changed.
    """
    try:
        yield
    except (OSError, ValueError) as problem:
        if not is_sentence(problem) or str(problem).startswith("`") or str(path or "") not in str(problem):
            raise

        kind = OSError if isinstance(problem, OSError) else ValueError
        raise kind(f"`{argument}`: {problem}") from problem


def _check_named(argument: str, path: str | os.PathLike) -> None:
    if not str(path).strip():  # as from an unset shell variable
        raise ValueError(f"`{argument}` is empty: name what to read, or leave it out.")


def _check_exists(argument: str, path: str | os.PathLike, mend: str) -> None:
    _check_named(argument, path)
    if not os.path.exists(path):
        broken = " is a link to nothing" if os.path.islink(path) else " does not exist"
        raise ValueError(f"`{argument}` {path}{broken}: {mend}.")


def _check_inside(argument: str, folder: str | os.PathLike, files: tuple[str, ...]) -> None:
    with _readable(argument, folder):
        os.listdir(folder)
    if files:  # a model, all of whose files may be read
        check_ordinary(argument, folder)

    there = [Path(folder) / name for name in files if os.path.isfile(Path(folder) / name)]
    if files and not there:
        raise ValueError(f"`{argument}` {folder} holds no {' and no '.join(files)}: name another folder.")

    for file in there:
        _check_readable(argument, file)


def _check_readable(argument: str, path: str | os.PathLike) -> None:
    if not os.path.isfile(path):  # a pipe would block until someone writes into it
        raise ValueError(f"`{argument}` {path} is neither a file nor a folder: name a file.")

    with _readable(argument, path), open(path, "rb") as file:
        file.read(1)


@contextmanager
def _readable(argument: str, path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        why = problem.strerror or str(problem)
        raise ValueError(f"`{argument}` {path} cannot be read ({why}): make it readable, or name another.") from problem
