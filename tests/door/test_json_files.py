"""JSON of ours: what it holds is given back, and what it lacks is said in one sentence with file and field."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eagle.door.json_files import check_fields, read_json


VALUES = {
    int: (7, 0, -1),
    float: (0.5, 3),
    str: ("", "text"),
    bool: (True, False),
    int | None: (None, 4),
    float | str: (1, "x"),
    list: ([], [None]),
    dict: ({}, {"a": 1}),
    object: (None, 1, "x", [], {}),
    list[int]: ([], [1, 2]),
    dict[str, float]: ({}, {"a": 1, "b": 0.5}),
    list[str] | None: (None, ["a"]),
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
ANY_JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


@pytest.mark.parametrize("form", VALUES, ids=str)
def test_values_of_a_form_are_taken_and_others_named(form, tmp_path):
    path = tmp_path / "x.json"
    for value in VALUES[form]:
        path.write_text(json.dumps({"field": value, "more": 1}))
        assert read_json(path, {"field": form}) == {"field": value, "more": 1}
    wrong = [True, 1.5, "x", None, [], {}, ["x", 1], {"a": "x"}]
    told = []
    for value in wrong:
        try:
            check_fields({"field": value}, {"field": form}, "x.json")
        except ValueError as problem:
            told.append(str(problem))
    assert all("x.json must hold " in one and "`field" in one and one.count(".") < 5 for one in told)
    assert bool(told) == (form is not object)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_not_read(kind, tmp_path):
    path = tmp_path / "x.json"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="x.json is no ordinary file: restore it, or write it anew."):
        read_json(path)


@pytest.mark.parametrize(
    "found, sentence",
    [
        ([], "x.json must hold an object, but holds a list: make it anew."),
        (None, "x.json must hold an object, but holds null: make it anew."),
        ({}, "x.json lacks `steps`, `rate`: make it anew."),
        ({"rate": "x"}, "x.json lacks `steps`: make it anew."),
        ({"rate": 1, "steps": 3}, "x.json must hold a list as `steps`, but holds a whole number: make it anew."),
        ({"rate": 1, "steps": [{}]}, "x.json lacks `steps[0].loss`: make it anew."),
        (
            {"rate": 1, "steps": [{"loss": 1}, {"loss": "low"}]},
            "x.json must hold a number or null as `steps[1].loss`, but holds text: make it anew.",
        ),
        (
            {"rate": 1, "steps": [{"loss": True}]},
            "x.json must hold a number or null as `steps[0].loss`, but holds true or false: make it anew.",
        ),
        (
            {"rate": 1, "steps": [], "sets": {"a b": {"n": 1.5}}},
            "x.json must hold a whole number as `sets['a b'].n`, but holds a number: make it anew.",
        ),
    ],
)
def test_one_sentence_names_the_place(tmp_path, found, sentence):
    path, fields = tmp_path / "x.json", {"steps": [{"loss": float | None}], "rate": int, "sets?": {str: {"n": int}}}
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError) as problem:
        read_json(path, fields, mend="make it anew")
    assert str(problem.value) == f"{tmp_path}/{sentence}"


@pytest.mark.parametrize(
    "content, word",
    [
        (b"{oops", "cannot be read as JSON (Expecting property name"),
        (b"", "cannot be read as JSON (Expecting value"),
        (b"[" * 100_000, "cannot be read as JSON (nested too deeply)"),
        ('{"a": "é"}'.encode("latin-1"), "is not UTF-8 (byte 7 is 0xe9)"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b"9" * 5000, "cannot be read as JSON (Exceeds the limit"),
    ],
)
def test_what_cannot_be_read_names_the_file(tmp_path, content, word):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError) as problem:
        read_json(tmp_path / "x.json")
    assert str(problem.value).startswith(f"{tmp_path}/x.json ") and word in str(problem.value)
    assert str(problem.value).endswith(": restore it, or write it anew.") and "\n" not in str(problem.value)


def test_a_file_that_is_none(tmp_path):
    for path, word in ((tmp_path, "Is a directory"), (tmp_path / "none.json", "No such file or directory")):
        with pytest.raises(ValueError, match=f"{path} cannot be read \\({word}\\)"):
            read_json(path)


@given(ANY_JSON)
def test_any_json_is_given_back_or_refused_in_a_sentence(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())  # as some editors begin a file
    assert read_json(path) == value
    fields = {"a": {"b": [int]}, "c?": {str: str | None}}
    try:
        check_fields(value, fields, path)
    except ValueError as problem:
        assert str(problem).startswith(f"{path} ")
    else:
        assert all(type(number) is int for number in value["a"]["b"])
