"""Write outputs to a temporary path, then move them: each path holds either the old output or a complete new one."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .memory import ran_out_of_memory
from .sentences import first_line, is_sentence


# how `torch.save` reports that a file cannot be written
_TORCH_SAYS = ("PytorchStreamWriter", "inline_container", "iostream error", "unexpected pos")
_MEND = "make room, or choose another path"


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Write text lines so that `path` is either the old file or complete; an `OSError` names the path if that fails."""
    try:
        with replaced(path) as part:
            _write(part, lines)
    except OSError as problem:
        if not is_write_error(problem):
            raise
        raise OSError(f"{path} cannot be written ({why_not_written(problem)}): {_MEND}.") from problem


def write_output(argument: str, path: str | os.PathLike, text: str) -> None:
    """Write the text of an output that an argument named, completely or not at all; its folder is made."""
    with output(argument, path) as part:
        _write(part, [text])


def _write(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def output(argument: str, path: str | os.PathLike) -> Iterator[Path]:
    """[`replaced`] for a file that an argument named: its folder is made, and errors name the argument."""
    with writing(argument, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as part:
            yield part


@contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path next to `path` to write to; at the end it replaces `path`, after an error it is deleted.

    If nothing was written, `path` stays as it is. If `path` is a link, the file it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    part = part_of(path)

    try:
        yield part
        if part.exists():
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def part_of(path: Path) -> Path:
    """Return the path that a file is written to before it is moved to `path`."""
    return path.with_name(f".{path.stem}-part{path.suffix}")  # libraries go by the suffix


def link_or_copy(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Hard-link a file, so that it survives when `source` is deleted or replaced; copy it if that fails."""
    try:
        os.link(source, path)
    except OSError:  # another disk, or a file system without links
        shutil.copy(source, path)


@contextmanager
def output_folder(argument: str, path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new folder next to `path` to write a model to; its files are moved to `path` once all are written.

    Other files in `path` stay, except weights, which would be mixed with the new ones.
    """
    path = Path(os.path.realpath(path))
    with writing(argument, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name[:200]}-", dir=path.parent))

        try:
            yield part
            _move_into(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _move_into(part: Path, path: Path) -> None:
    path.mkdir(exist_ok=True)
    new = {file.name for file in part.iterdir()}

    for old in [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]:
        if old.name not in new:
            old.unlink()

    for file in sorted(part.iterdir()):
        os.replace(file, path / file.name)


@contextmanager
def writing(argument: str, path: str | os.PathLike) -> Iterator[None]:
    """Turn any error that prevents writing a file in this block into one sentence with the output's argument.

    Raises:
        OSError: such as `output_json` out/a.json cannot be written (No space left on device).
    """
    try:
        yield
    except Exception as problem:
        if not is_write_error(problem):
            raise
        raise OSError(f"`{argument}` {path} cannot be written ({why_not_written(problem)}): {_MEND}.") from problem


def is_write_error(problem: BaseException) -> bool:
    """Return whether the file system refused a file, as Python, safetensors and torch report it."""
    if isinstance(problem, (ConnectionError, TimeoutError)) or is_sentence(problem) or ran_out_of_memory(problem):
        return False
    if isinstance(problem, OSError):
        return (problem.errno or 0) > 0  # errors of name lookup have negative ones
    if isinstance(problem, RuntimeError):
        return any(said in str(problem) for said in _TORCH_SAYS)
    return type(problem).__name__ == "SafetensorError"


def why_not_written(problem: Exception) -> str:
    """Return the reason, in a few words."""
    return getattr(problem, "strerror", None) or first_line(problem)
