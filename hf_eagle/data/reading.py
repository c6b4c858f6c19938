"""Read JSON and JSONL record by record; the error of an unreadable record names its file and line.

Nothing infers a type here: a record is what its text says. Deeply nested text, which crashes the process in some
parsers, is refused by counting its brackets; Python's own parser, which reads lists, counts its levels.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .opening import opened


MAX_NESTING = 100  # no chat needs that many, and Python's own limit is higher
_CHUNK = 2**20  # bytes of a list that are read at a time
_STRINGS_AND_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_BLANK = re.compile(r"[^ \t\r\n]")
_BYTE_ORDER_MARK = codecs.BOM_UTF8
_UTF_8 = codecs.getincrementaldecoder("utf-8")

Bad = Callable[[ValueError], None]


class _GivenTwice(ValueError):
    """The error's text is a key that one object has twice."""


def _object_of(pairs: list[tuple[str, Any]]) -> dict:
    """Python's parser calls this for each object; by itself it would silently take the last value of a key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _GivenTwice(_twice(pairs))
    return found


def _twice(pairs: list[tuple[str, Any]]) -> str:
    keys = [key for key, _ in pairs]
    return next(key for place, key in enumerate(keys) if key in keys[:place])


_PARSER = json.JSONDecoder(object_pairs_hook=_object_of)


def read_json_records(path: str | Path, bad: Bad | None = None) -> Iterator[tuple[int, dict]]:
    """The records of a `.json` or `.jsonl` file: one object a line, a list of objects, or one object.

    A file of any size, even a list, takes no more memory than its longest record.

    Args:
        path: of the file, which may be compressed (`.gz`, `.zst`); its form is recognised from its first bytes, not
            from its name.
        bad: called with the error of a record that cannot be read, which is then left out; by default the error is
            raised. A list ends where it is not JSON.

    Yields:
        The number of the record and the record. Numbers start at 0, skip blank lines, and include records left out.

    Raises:
        ValueError: naming file and line (for a list: file and record), for text that is not UTF-8 (with its byte), is
            not JSON or not an object, gives a key twice, is nested in more than 100 levels, or holds a lone surrogate.
    """
    for number, _, record in read_json_texts(path, bad):
        yield number, record


def read_json_texts(path: str | Path, bad: Bad | None = None) -> Iterator[tuple[int, str, dict]]:
    """`read_json_records`, with each record's own text between its number and the record."""
    with opened(path) as file:
        start = _first_bytes(file)
        if start.startswith(b"["):
            yield from _List(file, str(path)).records(bad)
        elif start.splitlines()[:1] == [b"{"]:  # one object, spread over lines
            yield from _checked(iter([(0, f"{path}, record 0", file.read())]), bad)
        else:
            yield from _checked(_lines(file, path), bad)


def read_json(path: str | Path) -> Any:
    """The one JSON value of a file, with the guards of `read_json_records`."""
    with opened(path) as file:
        return parse_json(file.read().removeprefix(_BYTE_ORDER_MARK), str(path))


def parse_json(content: bytes | str, where: str, holds_surrogates: bool = False) -> Any:
    """A JSON value from its text.

    Args:
        content: the text, or its bytes.
        where: how errors begin.
        holds_surrogates: whether the caller looks for lone surrogates itself.

    Raises:
        ValueError: for text that is not UTF-8, is not JSON, gives a key twice, is nested in more than 100 levels, or
            holds a lone surrogate.
    """
    text = decoded(content, where) if isinstance(content, bytes) else content
    check_nesting(text, where)

    try:
        value = _PARSER.decode(text)
    except json.JSONDecodeError as problem:
        raise ValueError(f"{where} is not JSON: {problem}.") from None
    except _GivenTwice as key:
        raise _refused(where, str(key)) from None
    except ValueError as problem:  # an integer with more digits than Python takes
        raise ValueError(f"{where} cannot be read: {problem}.") from None

    if not holds_surrogates and _SURROGATE_ESCAPE.search(text):
        check_surrogates(value, where)
    return value


def decoded(content: bytes, where: str) -> str:
    """Decode UTF-8; an error names the byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        place = f"byte 0x{content[problem.start]:02x} at place {problem.start + 1}"
        raise ValueError(f"{where} is not UTF-8: {place}; save the file as UTF-8.") from None


def _refused(where: str, key: str) -> ValueError:
    return ValueError(f"{where} gives the key {key!r} twice in one object; keep the one that is meant.")


def check_nesting(text: str, where: str) -> None:
    """`ValueError` if a JSON text is nested in more than 100 levels; found without a parser."""
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return

    depth = 0
    for found in _STRINGS_AND_BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > MAX_NESTING:
            raise ValueError(f"{where} is nested in more than {MAX_NESTING} levels; leave it out, or write it flat.")


def check_surrogates(value: Any, where: str) -> None:
    """`ValueError` if a text or key in a JSON value holds half a character, which no tokenizer takes."""
    found = _SURROGATE.search(json.dumps(value, ensure_ascii=False, default=str))
    if found:
        raise ValueError(
            f"{where} holds the lone surrogate \\u{ord(found[0]):04x}, half a character that is no text: remove it, or "
            "write the whole character."
        )


def _first_bytes(file: BinaryIO) -> bytes:
    """Peek at the first bytes that are not white space; the file's position is before them, or at its end."""
    place = len(_BYTE_ORDER_MARK) if file.read(3) == _BYTE_ORDER_MARK else 0
    file.seek(place)

    while (found := file.read(4096)) and not found.strip():
        place += len(found)

    file.seek(place)
    return found.lstrip()


def _lines(file: BinaryIO, path: str | Path) -> Iterator[tuple[int, str, bytes]]:
    number = 0
    for line, content in enumerate(file, start=1):
        if content.strip():
            yield number, f"Line {line} of {path}", content.rstrip(b"\r\n")
            number += 1


def _checked(texts: Iterator[tuple[int, str, bytes]], bad: Bad | None) -> Iterator[tuple[int, str, dict]]:
    for number, where, content in texts:
        try:
            text = decoded(content, where)
            value = parse_json(text, where, holds_surrogates=True)
            if _SURROGATE_ESCAPE.search(text):
                check_surrogates(value, f"{where}, record {number},")
            record = _object(value, where)
        except ValueError as problem:
            _tell(problem, bad)
        else:
            yield number, text, record


def _object(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(f"{where} must be an object with the fields of a record, got {kind}.")
    return value


class _List:
    """Yields the elements of a list, each as soon as its end is read.

    Args:
        file: positioned at the bracket that begins the list.
        name: of the file, for errors.
    """

    def __init__(self, file: BinaryIO, name: str):
        self.file, self.name = file, name
        self._parser, self._decoder = json.JSONDecoder(object_pairs_hook=self._object_of), _UTF_8()
        self._twice: str | None = None  # a key that the element gives twice, reported once the element's end is known
        self._text, self._place, self._line, self._number, self._at_end = "", 0, 1, 0, False

    def records(self, bad: Bad | None) -> Iterator[tuple[int, str, dict]]:
        """Number, text and value of each element; errors as for `read_json_records`."""
        try:
            self._expect("[")
            while self._next() != "]":
                if self._number:
                    self._expect(",")
                text, value = self._element()
                where = f"{self.name}, record {self._number},"
                self._number += 1
                try:
                    if self._twice is not None:
                        raise _refused(where, self._twice)
                    check_nesting(text, where)
                    check_surrogates(value, where) if _SURROGATE_ESCAPE.search(text) else None
                    record = _object(value, where)
                except ValueError as problem:
                    _tell(problem, bad)
                else:
                    yield self._number - 1, text, record

            self._expect("]")
            if self._next():
                raise self._broken("Extra data", self._place)
        except ValueError as problem:
            _tell(problem, bad)

    def _element(self) -> tuple[str, Any]:
        start = self._place
        while True:
            self._twice = None
            try:
                value, end = self._parser.raw_decode(self._text, start)
                self._place = end
                return self._text[start:end], value
            except json.JSONDecodeError as problem:
                # the place of the error shows whether the text is broken or only cut off by the chunk
                goes_on = problem.msg.startswith("Unterminated") or problem.pos > len(self._text) - 16
                if self._at_end or not goes_on:
                    raise self._broken(problem.msg, problem.pos) from None
            except RecursionError:
                where = f"{self.name}, record {self._number},"
                raise ValueError(f"{where} is nested in more than {MAX_NESTING} levels; write it flat.") from None

            start = self._read_on()

    def _object_of(self, pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs) and self._twice is None:
            self._twice = _twice(pairs)
        return found

    def _next(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            found = _NOT_BLANK.search(self._text, self._place)
            if found or self._at_end:
                self._place = found.start() if found else len(self._text)
                return found[0] if found else ""
            self._place = len(self._text)
            self._read_on()

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise self._broken(f"Expecting {character!r}", self._place)
        self._place += 1
        self._next()

    def _read_on(self) -> int:
        """Drop what was read, and read as much again as is left, but at least a chunk; the place in the new text."""
        self._line += self._text.count("\n", 0, self._place)
        self._text, self._place = self._text[self._place :], 0

        content = self.file.read(max(_CHUNK, len(self._text)))
        self._at_end = not content
        try:
            self._text += self._decoder.decode(content, final=self._at_end)
        except UnicodeDecodeError as problem:
            before = self._text + problem.object[: problem.start].decode("utf-8")
            line, byte = self._line + before.count("\n"), problem.object[problem.start]
            raise ValueError(
                f"{self.name} is not UTF-8: byte 0x{byte:02x} in line {line}; save the file as UTF-8."
            ) from None

        return 0

    def _broken(self, said: str, place: int) -> ValueError:
        line = self._line + self._text.count("\n", 0, place)
        return ValueError(f"{self.name} is not JSON: {said} (record {self._number}, line {line}).")


def _tell(problem: ValueError, bad: Bad | None) -> None:
    if bad is None:
        raise problem
    bad(problem)
