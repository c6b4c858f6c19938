"""Check outputs before any work is done, so that no result is lost at the end and nothing is overwritten."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from .journal import journal_path
from .json_files import read_json
from .writing import part_of, why_not_written, writing


def check_output_file(
    argument: str,
    path: str | os.PathLike,
    reads: Mapping[str, object] | None = None,
    ours: Callable[[Path], bool] | None = None,
    levels: int | None = 1,
) -> None:
    """Check that this file can be written at the end without a loss. Its folder is made if the one above exists.

    Args:
        argument: the argument that named it.
        path: the file.
        reads: the verb's inputs, by argument: paths, Hub ids, lists of them, or `None`.
        ours: whether an existing file is an earlier output of this verb, which may be replaced. Without it, any
            existing file may be, unless the verb reads it.
        levels: how many missing folders above it are accepted, `None` for any number.

    Raises:
        ValueError: if it cannot be written, is an input, or was not written by this verb.
    """
    if os.path.isdir(path) or str(path).endswith(("/", os.sep)):
        raise ValueError(f"`{argument}` {path} is a folder: name a file.")

    _check_name(argument, path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"`{argument}` {path} is no ordinary file: choose another path.")

    path = Path(path)
    _check_folder_above(argument, path, levels)

    is_ours = ours is not None and os.path.exists(path) and ours(path)
    for other, read in _paths(reads):
        if _same(path, read):
            raise ValueError(f"`{argument}` {path} is also the input `{other}`: name another file.")
        if os.path.exists(path) and not is_ours and os.path.isdir(read) and _lies_in(path, read):
            raise ValueError(f"`{argument}` {path} is a file of the input `{other}` {read}: name a file outside of it.")

    if ours is not None and os.path.exists(path) and path.stat().st_size and not is_ours:
        raise ValueError(f"`{argument}` {path} exists and was not written by this verb: name another file.")

    _try_writing(argument, path, Path(os.path.realpath(path)).parent)


def check_output_folder(
    argument: str,
    path: str | os.PathLike,
    reads: Mapping[str, object] | None = None,
    overwrite: bool = False,
    ours: Callable[[Path], bool] | None = None,
) -> None:
    """Check that a model can be written into this folder at the end without a loss. The folder is not made yet.

    Args:
        argument: the argument that named it.
        path: the folder, existing or not.
        reads: as for [`check_output_file`].
        overwrite: whether an existing model of ours may be replaced.
        ours: whether the folder holds a model of ours; somebody else's is never replaced. Without it, none is.

    Raises:
        FileExistsError: if it holds a model that may not be replaced.
        ValueError: if it cannot be written, or is an input.
    """
    _check_name(argument, path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(f"`{argument}` {path} is a file: name a folder.")

    path = Path(path)
    _check_folder_above(argument, path, None)

    for other, read in _paths(reads):
        if _same(path, read):
            raise ValueError(f"`{argument}` {path} is also the input `{other}`: name another folder.")
        if _in_checkpoint_of(path, read):
            raise ValueError(
                f"`{argument}` {path} lies in a checkpoint of the input `{other}` {read}: name another folder."
            )

    with writing(argument, path):
        holds_model = os.path.isdir(path) and any(_is_of_model(name) for name in os.listdir(path))
    if holds_model:
        if ours is None or not ours(path):
            raise FileExistsError(f"`{argument}` {path} holds somebody else's model or config: name another folder.")
        if not overwrite:
            raise FileExistsError(
                f"`{argument}` {path} already holds a draft: name another folder, or replace it with `--overwrite`."
            )

    _try_writing(argument, path, Path(os.path.realpath(path)))


def check_new_folder(argument: str, path: str | os.PathLike, reads: Mapping[str, object] | None = None) -> None:
    """[`check_output_folder`] for a folder that must be new or empty."""
    check_output_folder(argument, path, reads, overwrite=True, ours=lambda folder: True)
    if os.path.isdir(path) and any(Path(path).iterdir()):
        raise FileExistsError(f"`{argument}` {path} is not empty: name a new or an empty folder.")


def check_journaled_file(argument: str, path: str | os.PathLike, reads: Mapping[str, object] | None = None) -> None:
    """[`check_output_file`] for a file with `<path>.journal` next to it: either both exist, or both are new."""
    check_output_file(argument, path, reads)
    check_journal(argument, path, reads)

    journal = journal_path(Path(path))
    if os.path.exists(path) and not os.path.exists(journal):
        raise ValueError(
            f"`{argument}` {path} exists, but not its journal {journal.name}, so something else wrote it: name another "
            "file."
        )


def check_journal(argument: str, path: str | os.PathLike, reads: Mapping[str, object] | None = None) -> None:
    """[`check_output_file`] for the journal of an output; somebody else's file of that name is left alone."""
    check_output_file(argument, journal_path(Path(path)), reads, begins_with(b"{"))


def check_pictures(
    argument: str, pictures: Iterable[Path], path: str, reads: Mapping[str, object] | None = None
) -> None:
    """[`check_output_file`] for PNG files that are drawn next to an output."""
    for picture in pictures:
        if os.path.realpath(picture) == os.path.realpath(path):
            raise ValueError(f"`{argument}` {path} is also the file of its plot: name a file with a different ending.")
        check_output_file(argument, picture, reads, is_png)


def check_apart(outputs: Mapping[str, str | None]) -> None:
    """Raise `ValueError` if two arguments name the same output."""
    seen: dict[str, str] = {}
    for argument, path in outputs.items():
        other = argument if path is None else seen.setdefault(os.path.realpath(path), argument)
        if other != argument:
            raise ValueError(f"`{argument}` {path} is also the output `{other}`: name another file.")


def holds_object_with(*fields: str) -> Callable[[Path], bool]:
    """Return a test of files: is it a JSON object with these fields, or a list of them, as the verb writes?"""

    def holds(path: Path) -> bool:
        try:
            found = read_json(path)
        except ValueError:
            return False

        objects = found if isinstance(found, list) else [found]
        return all(isinstance(one, dict) and all(field in one for field in fields) for one in objects)

    return holds


def begins_with(signature: bytes) -> Callable[[Path], bool]:
    """Return a test of files: does it begin with its format's signature?"""

    def begins(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return file.read(len(signature)) == signature
        except OSError:
            return False

    return begins


is_png = begins_with(b"\x89PNG")


def _is_of_model(name: str) -> bool:
    return name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".gguf"))


def _check_name(argument: str, path: str | os.PathLike) -> None:
    """Refuse a name that no file can have, whether the final one or the one used while writing."""
    if not str(path).strip():
        raise ValueError(f"`{argument}` is empty: name a path to write to.")

    if os.path.abspath(path) == os.path.dirname(os.path.abspath(path)):
        raise ValueError(f"`{argument}` {path} is the root of a file system: name a path in it.")

    for name in (Path(path), part_of(Path(path).absolute())):
        try:
            os.lstat(name)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # reported together with what is wrong above it
        except (OSError, ValueError) as problem:
            why = why_not_written(problem)
            raise ValueError(f"`{argument}` {path} cannot be written ({why}): choose another path.") from None


def _check_folder_above(argument: str, path: Path, levels: int | None) -> None:
    """Check that the nearest existing folder is one, and that at most `levels` folders have to be made."""
    missing = []
    above = Path(os.path.realpath(path)).parent
    while not os.path.lexists(above):
        missing.append(above)
        above = above.parent

    if not os.path.isdir(above):
        raise ValueError(f"`{argument}` {path} lies under {above}, which is not a folder: choose another path.")

    if levels is not None and len(missing) > levels:
        raise ValueError(f"`{argument}` {path}: there is no folder {missing[-1]}: make it first, or correct the path.")


def _try_writing(argument: str, path: Path, folder: Path) -> None:
    """Write and delete a file in the folder of an output, or in the nearest existing one above it."""
    while not os.path.exists(folder):
        folder = folder.parent

    with writing(argument, path):
        handle, name = tempfile.mkstemp(prefix=".hf_eagle-", dir=folder)
        try:
            os.write(handle, b"x")
        finally:
            os.close(handle)
            os.unlink(name)


def _paths(reads: Mapping[str, object] | None) -> Iterator[tuple[str, Path]]:
    for argument, value in (reads or {}).items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            # Hub ids too: a folder written under such a name would be taken for the repository from then on
            if isinstance(one, (str, os.PathLike)) and str(one) and "\0" not in str(one):
                yield argument, Path(one)


def _same(path: Path, other: Path) -> bool:
    """Return whether two paths lead to the same place, also through links."""
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    return os.path.realpath(path) == os.path.realpath(other)


def _in_checkpoint_of(path: Path, folder: Path) -> bool:
    """Return whether a run that is read would lose a checkpoint, or get one that it did not write."""
    path, folder = path.resolve(), folder.resolve()
    inside = path.relative_to(folder).parts if path.is_relative_to(folder) else ()
    return bool(inside) and inside[0].startswith("checkpoint-")


def _lies_in(path: Path, folder: Path) -> bool:
    folder = folder.resolve()
    return path.resolve().is_relative_to(folder) or path.absolute().parent.resolve().is_relative_to(folder)
