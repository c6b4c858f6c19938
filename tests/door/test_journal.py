"""What a journal keeps, cuts off and refuses."""

import json

import pytest

from hf_eagle.door.journal import Journal
from hf_eagle.door.writing import write_atomically


SETTINGS = {"target": "t", "batch_size": 2}


def test_rows_survive(tmp_path):
    path = tmp_path / "new" / "journal"
    with Journal(path, SETTINGS) as journal:
        assert journal.rows == []
        journal.append({"a": "é\n"})
        journal.append([1, 2])
    with Journal(path, SETTINGS) as journal:
        assert journal.rows == [{"a": "é\n"}, [1, 2]]
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [SETTINGS, {"a": "é\n"}, [1, 2]]


def test_any_torn_end_is_cut_off(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, SETTINGS) as journal:
        journal.append({"a": 1})
        journal.append({"b": "é"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with Journal(path, SETTINGS) as journal:
            kept = journal.rows[:]
            journal.append("more")
        assert kept == [{"a": 1}, {"b": "é"}][: max(0, whole[:length].count(b"\n") - 1)]
        with Journal(path, SETTINGS) as journal:
            assert journal.rows == [*kept, "more"]


def test_two_writers_are_refused(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, SETTINGS) as journal:
        journal.extend([1, 2])
        journal.extend([])
        with pytest.raises(ValueError, match="journal is being written by another process; wait until it ends"):
            Journal(path, SETTINGS)
        journal.append(3)
    with Journal(path, SETTINGS) as journal:
        assert journal.rows == [1, 2, 3]


def test_one_that_is_removed_begins_anew(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, SETTINGS) as journal:
        journal.append(1)
        journal.remove()
        assert not path.exists()
    with Journal(path, {**SETTINGS, "batch_size": 3}) as journal:
        assert journal.rows == []


def test_refusals(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, SETTINGS) as journal:
        journal.append({"a": 1})
    with pytest.raises(ValueError, match=r"journal was begun with `batch_size` 2 \(now 3\); go on with the same"):
        Journal(path, {**SETTINGS, "batch_size": 3})
    path.write_text(path.read_text() + "torn\n{}\n")
    with pytest.raises(ValueError, match="Line 3 of the journal .* cannot be read"):
        Journal(path, SETTINGS)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="is not a journal of this program"):
        Journal(path, SETTINGS)
    assert path.read_text() == "[1]\n"


def test_one_without_rows_is_begun_anew(tmp_path):
    path, others = tmp_path / "journal", {**SETTINGS, "batch_size": 3}
    for text in ("", '{"b": '):  # also torn while the first row was written
        Journal(path, SETTINGS).__exit__()
        path.write_text(path.read_text() + text)
        with Journal(path, others) as journal:
            journal.append("row")
        with Journal(path, others) as journal:
            assert journal.rows == ["row"]
            journal.remove()

    path.write_text('{"of": "somebody else"}\n')
    with pytest.raises(ValueError, match="was begun with"):
        Journal(path, SETTINGS)
    assert path.read_text() == '{"of": "somebody else"}\n'


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "out"
    write_atomically(path, ["a", "b"])

    def lines():
        yield "c"
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, lines())
    assert path.read_text() == "a\nb\n"
