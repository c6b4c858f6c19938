"""An append-only file of finished work: every completely written line survives a kill."""

import json
import os
from pathlib import Path

from .locks import is_free


class Journal:
    """Lines of JSON under a first line of settings; each is on the disk when `append` or `extend` returns.

    Args:
        path (`Path`):
            Created when missing; its folder too.
        settings (`dict`):
            The settings that the lines depend on. A journal that was begun with different settings
            is refused, unless it has no lines yet: then it starts over.

    `rows` holds the lines of earlier runs. A last line that a kill tore is cut off.

    Raises:
        `ValueError`: the file is not a journal, was begun with different settings, or is being written by another
            process.
    """

    def __init__(self, path: Path, settings: dict):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)  # unbuffered: closing it has nothing left to write

        try:
            if not is_free(self._file):  # two writers would double the rows
                raise ValueError(
                    f"{path} is being written by another process; wait until it ends, or choose another output path."
                )
            lines, complete = _complete_lines(path)
            if len(lines) == 1 and isinstance(lines[0], dict) and lines[0].keys() == settings.keys():
                lines, complete = [], 0  # nothing was finished with these settings, so there is nothing to lose
            if lines:
                _compare(path, lines[0], settings)
        except ValueError:
            self._file.close()
            raise

        self.rows = lines[1:]
        self._file.truncate(complete)

        if not lines:
            self.append(settings)
            self.rows = []

    def append(self, row) -> None:
        self.extend([row])

    def extend(self, rows: list) -> None:
        """Append several lines with a single `fsync`."""
        if not rows:
            return

        content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        try:
            while content:
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())
        except OSError as problem:
            why = problem.strerror or problem
            raise OSError(
                f"{self.path} cannot be written ({why}): make room, then the same command continues where it stopped."
            ) from problem

        self.rows += rows

    def remove(self) -> None:
        """Close and delete the journal, once the work that its lines recorded is written."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def journal_path(output_path: Path) -> Path:
    """Return the path of a file's journal: `<output_path>.journal`."""
    return output_path.with_name(output_path.name + ".journal")


def journal_beside(output_path: Path, settings: dict) -> Journal:
    """Open the journal of a file that is written only when all its work is done, see `journal_path`; both are kept.

    Raises `ValueError` as `Journal` does, and if the file exists without its journal: then something else wrote it.
    """
    path = journal_path(output_path)
    if output_path.exists() and not path.exists():
        raise ValueError(
            f"`output_path` {output_path} exists, but not its journal {path.name}, so something else wrote it; choose "
            "another."
        )

    return Journal(path, settings)


def _complete_lines(path: Path) -> tuple[list, int]:
    """Return the readable lines and their length in bytes."""
    if not path.exists():
        return [], 0

    content, lines, complete = path.read_bytes(), [], 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):  # torn by a kill; it can only be the last
            break
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise ValueError(
                f"Line {len(lines) + 1} of the journal {path} cannot be read; delete the file to start over."
            ) from None
        complete += len(line)

    return lines, complete


def _compare(path: Path, found, settings: dict) -> None:
    wanted = json.loads(json.dumps(settings))
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a journal of this program; choose another output path.")

    differing = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if differing:
        changes = ", ".join(f"`{key}` {found.get(key)!r} (now {wanted.get(key)!r})" for key in differing)
        raise ValueError(
            f"{path} was begun with {changes}; go on with the same, choose another output path, or delete the file to "
            "start over."
        )
