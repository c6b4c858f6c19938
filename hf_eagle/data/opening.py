"""Open files and addresses as bytes, and decompress them if they are compressed."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..door.json_files import is_special


COMPRESSED = (".gz", ".zst")
_PASSED = 2**20  # bytes that are skipped at a time


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file's bytes, decompressed for `.gz` and `.zst`; raise a `ValueError` with its path if it is unreadable.

    Args:
        path: path of the file, or an address that `fsspec` reads, such as `hf://datasets/...`.
    """
    if is_special(path):
        raise ValueError(f"{path} is no ordinary file: name one that is.")

    try:
        with _opened(str(path)) as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"The file {path} does not exist.") from None
    except (OSError, EOFError, zlib.error) as problem:
        raise ValueError(f"{path} cannot be read: {problem}.") from None


def _opened(path: str):
    ending = Path(path).suffix.lower()
    if ending == ".zst":
        return io.BufferedReader(_Zstd(path))
    if "://" in path:
        return _address(path, "gzip" if ending == ".gz" else None)
    return gzip.open(path) if ending == ".gz" else open(path, "rb")


def _address(path: str, compression: str | None = None):
    import fsspec  # late: only streams of the Hub need it

    return fsspec.open(path, "rb", compression=compression)


class _Zstd(io.RawIOBase):
    """The content of a `.zst` file or address, read with Arrow, which every installation has; it can start over."""

    def __init__(self, path: str):
        self._path, self._source, self._held = path, None, None
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        content = self._held.read(len(buffer))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def tell(self) -> int:
        return self._place

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        import pyarrow as pa  # late: few files are compressed this way

        self._end()
        self._source = _address(self._path).open() if "://" in self._path else open(self._path, "rb")
        self._held, self._place = pa.CompressedInputStream(pa.PythonFile(self._source), "zstd"), 0

        while self._place < place and (passed := len(self._held.read(min(_PASSED, place - self._place)))):
            self._place += passed
        return self._place

    def close(self) -> None:
        self._end()
        super().close()

    def _end(self) -> None:
        if self._source is not None:
            self._source.close()
