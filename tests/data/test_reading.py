"""Files of JSON: every form, and one sentence with file and line for whatever is none."""

import gzip
import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import OBJECTS, TEXTS

from hf_eagle.data import reading
from hf_eagle.data.reading import MAX_NESTING, parse_json, read_json, read_json_records


DEEP = "[" * 100_000
LAYOUTS = {
    "lines": lambda records: "".join(json.dumps(r) + "\n" for r in records),
    "lines without a last end": lambda records: "\n".join(json.dumps(r, ensure_ascii=False) for r in records),
    "blank lines": lambda records: "\n \n" + "\r\n\n".join(json.dumps(r) for r in records) + "\n\n",
    "list": lambda records: json.dumps(records),
    "list over lines": lambda records: "\n" + json.dumps(records, indent=2, ensure_ascii=False) + "\n ",
    "byte order mark": lambda records: "\ufeff" + "".join(json.dumps(r) + "\n" for r in records),
}


@pytest.mark.parametrize("ending", [".json", ".json.gz", ".json.zst"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_not_read(kind, ending, tmp_path):
    path = tmp_path / f"tools{ending}"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    for read in (read_json, lambda path: list(read_json_records(path))):
        with pytest.raises(ValueError, match=f"{path} is no ordinary file: name one that is."):
            read(path)


@pytest.mark.parametrize("chunk", [1, 2**20])
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(records=st.lists(OBJECTS, min_size=1, max_size=4))
def test_records_are_what_the_file_says(layout, chunk, records, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(LAYOUTS[layout](records), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_CHUNK", chunk)
        found = list(read_json_records(path))
    assert found == list(enumerate(records))
    assert [list(record) for _, record in found] == [list(record) for record in records]  # keys in their order


def test_one_object_written_for_people_and_a_compressed_file(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"prompt": "q"}, indent=1))
    assert list(read_json_records(tmp_path / "one.json")) == [(0, {"prompt": "q"})]
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt") as file:
        file.write('{"a": 1}\n{"a": 2}\n')
    assert list(read_json_records(tmp_path / "lines.jsonl.gz")) == [(0, {"a": 1}), (1, {"a": 2})]
    assert read_json(tmp_path / "one.json") == {"prompt": "q"}


BROKEN = {
    "null": ("null\n", "Line 1 of {path} must be an object with the fields of a record, got null"),
    "number": ('{"a": 1}\n\n7\n', "Line 3 of {path} must be an object .* got int"),
    "deep line": (f'{{"a": 1}}\n{{"a": {DEEP}\n', "Line 2 of {path} is nested more than 100 levels"),
    "deep list": (DEEP, "{path}, record 0, is nested more than 100 levels"),
    "deep element": (
        f'[{{"a": 1}}, {{"a": {"[" * 101}{"]" * 101}}}]',
        "{path}, record 1, is nested more than 100 levels",
    ),
    "latin 1": (b'{"a": 1}\n{"a": "caf\xe9"}\n', "Line 2 of {path} is not UTF-8: byte 0xe9 at position 11"),
    "latin 1 in a list": (b'[{"a": 1},\n{"a": "caf\xe9"}]', "{path} is not UTF-8: byte 0xe9 in line 2"),
    "utf-16": ('{"a": 1}\n'.encode("utf-16"), "Line 1 of {path} is not UTF-8: byte 0xff at position 1"),
    "surrogate": ('{"a": "x"}\n{"a": "\\ud800"}\n', r"Line 2 of {path}, record 1, holds the lone surrogate \\ud800"),
    "surrogate key": ('[{"\\udc00": 1}]', r"{path}, record 0, holds the lone surrogate \\udc00"),
    "text": ('{"a": 1}\nhello\n', "Line 2 of {path} is not JSON: Expecting value"),
    "list of numbers": ("[1, 2]", "{path}, record 0, must be an object .* got int"),
    "list that is cut": ('[{"a": 1},\n {"a": 2', r"{path} is not JSON: .*\(record 1, line 2\)"),
    "list without a comma": ('[{"a": 1} {"a": 2}]', r"{path} is not JSON: Expecting ',' \(record 1, line 1\)"),
    "more behind the list": ('[{"a": 1}]\n{}', r"{path} is not JSON: Extra data \(record 1, line 2\)"),
    "key twice": ('{"a": 1}\n\n{"a": 1, "b": 2, "a": 1}', "Line 3 of {path} has the key 'a' twice in one"),
    "key twice inside": ('{"m": [{"content": "x", "content": "y"}]}', "Line 1 of {path} has the key 'content' twice"),
    "key twice, as an escape": ('{"a": 1, "\\u0061": 2}', "Line 1 of {path} has the key 'a' twice"),
    "key twice over lines": ('{\n"a": [],\n"a" : {}\n}', "{path}, record 0 has the key 'a' twice"),
    "key twice in a list": ('[{"a": 1}, {"a": {"b": 1, "b": 2}}]', "{path}, record 1, has the key 'b' twice"),
    "long number": ('{"a": ' + "1" * 5000 + "}", "Line 1 of {path} cannot be read: Exceeds the limit"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_named(case, tmp_path):
    content, message = BROKEN[case]
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message.format(path=path)) as caught:
        list(read_json_records(path))
    assert "\n" not in str(caught.value)


KEYS = st.text(st.characters(codec="utf-8"), max_size=3)
# objects as pairs, so that a key may come twice
PAIRS = st.recursive(
    st.one_of(st.integers(), TEXTS, st.just(":")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(st.tuples(KEYS, inner), max_size=4).map(tuple)),
    max_leaves=8,
)


def written(value, colon=":") -> str:
    if isinstance(value, tuple):
        return "{" + ",".join(json.dumps(key) + colon + written(inner, colon) for key, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(written(inner, colon) for inner in value) + "]"
    return json.dumps(value)


def twice(value) -> bool:
    inside = [inner for _, inner in value] if isinstance(value, tuple) else value if isinstance(value, list) else []
    keys = [key for key, _ in value] if isinstance(value, tuple) else []
    return len(set(keys)) < len(keys) or any(map(twice, inside))


@settings(max_examples=60, deadline=None)
@given(values=st.lists(PAIRS, min_size=1, max_size=4), colon=st.sampled_from([":", " :", " :\t"]), chunk=st.booleans())
def test_no_object_gives_a_key_twice(values, colon, chunk, tmp_path_factory):
    """However deep it lies; the records around it are kept, in lines and in lists, whatever is read at a time."""
    path = tmp_path_factory.getbasetemp() / "twice.json"
    wanted = [n for n, value in enumerate(values) if not twice(value)]
    records = [written((("a", value),), colon) for value in values]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_CHUNK", 1 if chunk else 2**20)
        for text in ("\n".join(records), f"[{', '.join(records)}]"):
            path.write_text(text, encoding="utf-8")
            bad = []
            assert [number for number, _ in read_json_records(path, bad.append)] == wanted
            assert len(bad) == len(values) - len(wanted)
            assert all(re.search(r"(Line|record) \d+.* has the key .* twice", str(problem)) for problem in bad)


def test_bad_records_can_be_left_out(tmp_path):
    path, bad = tmp_path / "some.jsonl", []
    path.write_text('{"a": 0}\nnull\n{"a": 2}\nhello\n{"a": 4}\n')
    assert list(read_json_records(path, bad.append)) == [(0, {"a": 0}), (2, {"a": 2}), (4, {"a": 4})]
    assert [str(problem)[:6] for problem in bad] == ["Line 2", "Line 4"]
    path.write_text('[{"a": 0}, null, {"a": 2}, {"a": ')
    assert list(read_json_records(path, bad.append)) == [(0, {"a": 0}), (2, {"a": 2})]
    assert len(bad) == 4 and "(record 3, line 1)" in str(bad[3])


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="missing.json does not exist"):
        list(read_json_records(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="cannot be read: "):
        read_json(tmp_path)
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b'{"a": 1}')[:-9])
    with pytest.raises(ValueError, match="cut.json.gz cannot be read: "):
        list(read_json_records(tmp_path / "cut.json.gz"))


def test_brackets_inside_of_texts_are_no_nesting():
    assert parse_json(json.dumps({"a": DEEP + '"' + DEEP}), "it") == {"a": DEEP + '"' + DEEP}
    nested = "[" * MAX_NESTING + "]" * MAX_NESTING
    assert parse_json(nested, "it") == json.loads(nested)
    with pytest.raises(ValueError, match="it is nested"):
        parse_json(f"[{nested}]", "it")
