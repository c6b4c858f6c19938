"""Whose words an error has: ours are shown as they are, a library's never pass for a sentence."""

import json
import linecache
import traceback
from itertools import count
from pathlib import Path

import multiprocess
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_eagle.data.messages import read_tools
from hf_eagle.door import sentences
from hf_eagle.door.connection import read_key
from hf_eagle.door.json_files import check_fields, read_json
from hf_eagle.door.printer import told
from hf_eagle.door.sentences import (
    PACKAGE,
    first_line,
    is_ours,
    is_sentence,
    place_of,
    sentence_of,
    without_secrets,
)


NUMBERS = count()


def caught(work):
    """What `work()` raises."""
    try:
        work()
    except Exception as problem:
        return problem
    pytest.fail("nothing was raised")


def a_module_of_ours(line):
    """A function of a module of this package whose only line is this one."""
    file = str(PACKAGE / "data" / f"made_up_{next(NUMBERS)}.py")
    source = f"def work():\n    {line}\n"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space = {}
    exec(compile(source, file, "exec"), space)
    return space["work"]


def refuse(_=None):
    return read_tools({"tools": 3}, 0)


REFUSED = "Record 0: `tools` must be a list of JSON schemas, got int."


class Refusing(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, place):
        return refuse()


@pytest.mark.parametrize(
    "work",
    [
        refuse,
        lambda: check_fields([], {}, "x.json"),
        lambda: read_json("/no/such.json"),
        a_module_of_ours('raise OSError("`target` is gone: name another.")'),
        a_module_of_ours('raise FileExistsError("`output_dir` holds a draft: name another.")'),
        a_module_of_ours('raise FloatingPointError("The loss is nan: lower `learning_rate`.")'),
        a_module_of_ours('raise RuntimeError("`device` has no memory left: choose another.") from KeyError(3)'),
    ],
)
def test_what_our_code_says_is_a_sentence(work):
    problem = caught(work)
    assert is_sentence(problem) and told(problem) == sentence_of(problem) == str(problem)


@pytest.mark.parametrize(
    "work",
    [
        lambda: json.loads("{oops"),
        lambda: torch.load("/no/such/file"),
        lambda: np.zeros(3).reshape(2, 2),
        lambda: Path("/no/such/file").read_text(),
        a_module_of_ours('int("x")'),
        a_module_of_ours("int('x')  # which does raise"),
        a_module_of_ours('open("/no/such/file")'),
        a_module_of_ours("1 / 0"),
        a_module_of_ours('b"\\xff".decode()'),
        a_module_of_ours("{}['tools']"),
        a_module_of_ours('raise KeyError("tools")'),
        a_module_of_ours('raise TypeError("takes no text")'),
        a_module_of_ours("None.tools"),
        a_module_of_ours("assert 1 == 2"),
    ],
)
def test_what_others_raise_is_none(work):
    problem = caught(work)
    assert not is_sentence(problem) and sentence_of(problem) is None
    assert " failed in " in told(problem) and type(problem).__name__ in told(problem) and "\n" not in told(problem)


def test_the_sentence_of_a_worker_process_is_one_too():
    with multiprocess.Pool(1) as pool:
        assert sentence_of(caught(lambda: pool.map(refuse, [1]))) == REFUSED
        assert sentence_of(caught(lambda: pool.map(json.loads, ["{"]))) is None
    assert sentence_of(caught(lambda: list(DataLoader(Refusing(), num_workers=1)))) == REFUSED
    assert sentence_of(caught(lambda: list(DataLoader([1, "x"], batch_size=2, num_workers=1)))) is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("One sentence.", "One sentence"),
        ("\n  first  line \nsecond", "first line"),
        ("Errors in loading:\n\tsize mismatch for x\n\tfor y", "Errors in loading: size mismatch for x"),
        ("ends so:", "ends so"),
        ("x" * 400, "x" * 300 + "..."),
        ("x" * 299 + ". y", "x" * 299 + "...."),
        ("x" * 300 + ".", "x" * 300),
        ("", ""),
    ],
)
def test_the_first_line_is_what_begins_it(text, line):
    assert first_line(ValueError(text)) == line


def test_the_place_is_the_last_line_of_ours():
    problem = caught(a_module_of_ours('__import__("json").loads("{")'))
    assert place_of(problem).startswith("made_up_") and place_of(problem).endswith(".py:2")
    assert place_of(caught(lambda: json.loads("{"))).startswith("decoder.py:")
    assert place_of(ValueError("never raised")) == "an unknown place"
    assert is_ours(traceback.extract_tb(caught(refuse).__traceback__)[-1].filename) and not is_ours(json.__file__)


def test_no_secret_is_told(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "  sk-123456789 ")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    text = without_secrets("http://user:pw@host/x and https://host/a@b refused 'key sk-123456789'")
    assert text == "http://***@host/x and https://host/a@b refused 'key ***'"


@pytest.mark.parametrize("wrapped", ["{}", "{}\\n\\n", "{}\", 'x", "{}, {}"])
@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
def test_whatever_stands_in_a_header_is_a_secret(scheme, wrapped):
    said = f"b'{scheme} {wrapped.format('unknown+/=', 'unknown2')}' is illegal"
    assert "unknown+" not in without_secrets(said) and f"{scheme} ***" in without_secrets(said)


def test_a_secret_that_came_as_an_argument_is_not_told(monkeypatch):
    monkeypatch.setattr(sentences, "_AS_ARGUMENTS", set())
    assert without_secrets("s3cr3t was refused") == "s3cr3t was refused"
    assert read_key(" s3cr3t\n\n", "`token`") == "s3cr3t"
    assert without_secrets("s3cr3t was refused") == "*** was refused"


def test_the_stored_token_of_the_hub_is_not_told(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_stored1")
    assert without_secrets("hf_stored1 was refused") == "*** was refused"


@pytest.mark.parametrize("before", range(270, 301, 3))
def test_a_line_that_is_cut_off_shows_no_part_of_a_secret(monkeypatch, before):
    monkeypatch.setenv("MY_API_KEY", "sk-123456789abcdefghijk")
    assert "sk-" not in first_line(ValueError("x" * before + " sk-123456789abcdefghijk was refused"))


def test_a_current_folder_that_was_deleted_hides_no_error(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert is_ours("<frozen runpy>") is False
    assert is_ours(str(PACKAGE / "door" / "sentences.py")) is True
