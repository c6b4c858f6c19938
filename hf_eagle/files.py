"""Files that are whole or not there."""

import os
from pathlib import Path


def write_atomically(path: Path, lines) -> None:
    """Writes text lines so that `path` is either what it was or whole."""
    part = path.with_name(f".{path.name}-part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
