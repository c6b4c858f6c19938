"""Read JSON and JSONL record by record; errors name the file, and the line or record that cannot be read.

No type is inferred: values keep those that the JSON gives them. Deeply nested text can crash a parser, so brackets are
counted before a record is parsed. In a file that is one list they are counted after it: there Python's parser, which
limits its own depth, finds where a record ends.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .opening import opened


MAX_NESTING = 100  # levels; no chat needs so many, and Python's own limit is higher
_CHUNK = 2**20  # bytes that are read at a time from a file that is one list
_LONGEST_CUT = 16  # characters: more than any token that the end of a chunk can cut, such as two `\uXXXX`
# strings are matched so that brackets inside them do not count
_STRINGS_AND_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_BLANK = re.compile(r"[^ \t\r\n]")
_BYTE_ORDER_MARK = codecs.BOM_UTF8
_UTF_8 = codecs.getincrementaldecoder("utf-8")

Bad = Callable[[ValueError], None]


class _DuplicateKey(ValueError):
    """One object has a key twice; the error's text is the key."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    """Make an object for Python's parser, which by itself keeps the last value of a duplicate key silently."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _DuplicateKey(_first_duplicate(pairs))
    return value


def _first_duplicate(pairs: list[tuple[str, Any]]) -> str:
    keys = [key for key, _ in pairs]
    return next(key for index, key in enumerate(keys) if key in keys[:index])


_PARSER = json.JSONDecoder(object_pairs_hook=_without_duplicates)


def read_json_records(path: str | Path, bad: Bad | None = None) -> Iterator[tuple[int, dict]]:
    """Read the records of a `.json` or `.jsonl` file: one object per line, a list of objects, or one object.

    The memory that this takes depends on the longest record, not on the size of the file, also if it is a list.

    Args:
        path: path of the file, which may be compressed (`.gz`, `.zst`). Its first bytes tell its form, not its name.
        bad: called with the error of each unreadable record, which is then left out. If `None`, the error is raised.
            A syntax error in a list ends the file, since the next record cannot be found.

    Yields:
        The number of the record and the record. Numbers start at 0. Blank lines do not count; records left out do.

    Raises:
        ValueError: if a record is not UTF-8, not JSON or not an object, has a key twice, is nested more than 100 levels
            deep, or holds a lone surrogate. The message names the file and the line (in a list: the record).
    """
    for number, _, record in read_json_texts(path, bad):
        yield number, record


def read_json_texts(path: str | Path, bad: Bad | None = None) -> Iterator[tuple[int, str, dict]]:
    """Do as `read_json_records`, but yield `(number, text, record)`, with the record's text as it stands."""
    with opened(path) as file:
        start = _first_bytes(file)
        if start.startswith(b"["):
            yield from _ListParser(file, str(path)).records(bad)
        elif start.splitlines()[:1] == [b"{"]:  # one object over several lines, with its bracket alone in the first
            yield from _parse_each(iter([(0, f"{path}, record 0", file.read())]), bad)
        else:
            yield from _parse_each(_lines(file, path), bad)


def read_json(path: str | Path) -> Any:
    """Return the JSON value that a file holds, checked as by `read_json_records`; it need not be an object."""
    with opened(path) as file:
        return parse_json(file.read().removeprefix(_BYTE_ORDER_MARK), str(path))


def parse_json(content: bytes | str, where: str, holds_surrogates: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        content: the text, or its bytes.
        where: the source, with which errors begin.
        holds_surrogates: let lone surrogates pass, because the caller looks for them itself.

    Raises:
        ValueError: if the text is not UTF-8, not JSON, has a key twice in one object, is nested more than 100 levels
            deep, or holds a lone surrogate.
    """
    text = decoded(content, where) if isinstance(content, bytes) else content
    check_nesting(text, where)

    try:
        value = _PARSER.decode(text)
    except json.JSONDecodeError as problem:
        raise ValueError(f"{where} is not JSON: {problem}.") from None
    except _DuplicateKey as problem:
        raise _duplicate_key_error(where, str(problem)) from None
    except ValueError as problem:  # for instance, an integer with more digits than Python takes
        raise ValueError(f"{where} cannot be read: {problem}.") from None

    if not holds_surrogates and _SURROGATE_ESCAPE.search(text):
        check_surrogates(value, where)
    return value


def decoded(content: bytes, where: str) -> str:
    """Decode UTF-8; the error for anything else names the first wrong byte and its position, counted from 1."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        byte = f"byte 0x{content[problem.start]:02x} at position {problem.start + 1}"
        raise ValueError(f"{where} is not UTF-8: {byte}; save the file as UTF-8.") from None


def _duplicate_key_error(where: str, key: str) -> ValueError:
    return ValueError(f"{where} has the key {key!r} twice in one object; keep only one of them.")


def check_nesting(text: str, where: str) -> None:
    """Raise `ValueError` if a JSON text is nested more than 100 levels deep; this needs no parser."""
    # most texts have so few brackets that the slow scan is not needed
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return

    depth = 0
    for found in _STRINGS_AND_BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > MAX_NESTING:
            raise ValueError(f"{where} is nested more than {MAX_NESTING} levels deep; leave it out, or flatten it.")


def check_surrogates(value: Any, where: str) -> None:
    """Raise `ValueError` if a text or key holds a lone surrogate: UTF-8 cannot encode it, so no tokenizer takes it."""
    found = _SURROGATE.search(json.dumps(value, ensure_ascii=False, default=str))
    if found:
        raise ValueError(
            f"{where} holds the lone surrogate \\u{ord(found[0]):04x}, which is half a character: remove it, or write "
            "both halves."
        )


def _first_bytes(file: BinaryIO) -> bytes:
    """Return the first bytes that are not white space. The file is left before them, or at its end."""
    mark = file.read(len(_BYTE_ORDER_MARK))
    position = len(mark) if mark == _BYTE_ORDER_MARK else 0
    file.seek(position)

    while (block := file.read(4096)) and not block.strip():
        position += len(block)

    file.seek(position)
    return block.lstrip()


def _lines(file: BinaryIO, path: str | Path) -> Iterator[tuple[int, str, bytes]]:
    number = 0
    for line, content in enumerate(file, start=1):
        if content.strip():
            yield number, f"Line {line} of {path}", content.rstrip(b"\r\n")
            number += 1


def _parse_each(texts: Iterator[tuple[int, str, bytes]], bad: Bad | None) -> Iterator[tuple[int, str, dict]]:
    for number, where, content in texts:
        try:
            text = decoded(content, where)
            value = parse_json(text, where, holds_surrogates=True)
            if _SURROGATE_ESCAPE.search(text):
                check_surrogates(value, f"{where}, record {number},")
            record = _require_object(value, where)
        except ValueError as problem:
            _report(problem, bad)
        else:
            yield number, text, record


def _require_object(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(f"{where} must be an object with the fields of a record, got {kind}.")
    return value


class _ListParser:
    """Parse a JSON list piece by piece, and yield each element as soon as its end is read.

    Args:
        file: positioned at the bracket that begins the list.
        name: path of the file, for errors.
    """

    def __init__(self, file: BinaryIO, name: str):
        self.file, self.name = file, name
        self._parser, self._decoder = json.JSONDecoder(object_pairs_hook=self._noting_duplicates), _UTF_8()

        self._text, self._position = "", 0  # what is read and not dropped yet, and how far it is parsed
        self._line = 1  # at the beginning of the text
        self._number = 0  # of the next element
        self._at_end = False
        self._duplicate: str | None = None  # first duplicate key of this element, reported once its end is known

    def records(self, bad: Bad | None) -> Iterator[tuple[int, str, dict]]:
        """Yield number, text and value of each element; errors are those of `read_json_records`."""
        try:
            self._expect("[")
            while self._peek() != "]":
                if self._number:
                    self._expect(",")
                text, value = self._element()
                number, where = self._number, f"{self.name}, record {self._number},"
                self._number += 1

                # an element that is JSON, but no good record, does not end the list
                try:
                    if self._duplicate is not None:
                        raise _duplicate_key_error(where, self._duplicate)
                    check_nesting(text, where)
                    if _SURROGATE_ESCAPE.search(text):
                        check_surrogates(value, where)
                    record = _require_object(value, where)
                except ValueError as problem:
                    _report(problem, bad)
                else:
                    yield number, text, record

            self._expect("]")
            if self._peek():
                raise self._syntax_error("Extra data", self._position)
        except ValueError as problem:  # a syntax error ends it
            _report(problem, bad)

    def _element(self) -> tuple[str, Any]:
        """Parse the next element; one that a chunk cuts is parsed again with twice the text, so this stays linear."""
        while True:
            self._duplicate, start = None, self._position
            try:
                value, end = self._parser.raw_decode(self._text, start)
                self._position = end
                return self._text[start:end], value
            except json.JSONDecodeError as problem:
                # an error near the end of the text may only mean that the chunk cut a token
                near_end = problem.pos > len(self._text) - _LONGEST_CUT
                may_be_cut = problem.msg.startswith("Unterminated") or near_end
                if self._at_end or not may_be_cut:
                    raise self._syntax_error(problem.msg, problem.pos) from None
            except RecursionError:
                where = f"{self.name}, record {self._number},"
                raise ValueError(f"{where} is nested more than {MAX_NESTING} levels deep; flatten it.") from None

            self._read_more()

    def _noting_duplicates(self, pairs: list[tuple[str, Any]]) -> dict:
        value = dict(pairs)
        if len(value) < len(pairs) and self._duplicate is None:
            self._duplicate = _first_duplicate(pairs)
        return value

    def _peek(self) -> str:
        """Move to the next character that is not white space, and return it; `""` at the end."""
        while True:
            found = _NOT_BLANK.search(self._text, self._position)
            if found or self._at_end:
                self._position = found.start() if found else len(self._text)
                return found[0] if found else ""
            self._position = len(self._text)
            self._read_more()

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            raise self._syntax_error(f"Expecting {character!r}", self._position)
        self._position += 1
        self._peek()

    def _read_more(self) -> None:
        """Drop what is parsed, then read a chunk, or as much as is left if that is longer: so the text doubles."""
        self._line += self._text.count("\n", 0, self._position)
        self._text, self._position = self._text[self._position :], 0

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

    def _syntax_error(self, message: str, position: int) -> ValueError:
        line = self._line + self._text.count("\n", 0, position)
        return ValueError(f"{self.name} is not JSON: {message} (record {self._number}, line {line}).")


def _report(problem: ValueError, bad: Bad | None) -> None:
    """Pass an error to `bad`, or raise it if there is no `bad`."""
    if bad is None:
        raise problem
    bad(problem)
