"""Outputs that are whole or not there, and one sentence with the argument where the file system refuses one."""

import errno
import os

import pytest
from faulty import as_anybody, full_disk
from safetensors.torch import save_file

from hf_eagle.door.writing import (
    is_write_error,
    output,
    output_folder,
    replaced,
    write_atomically,
    write_output,
    writing,
)


LONG = "x" * 100_000


def write_weights(path):
    import torch

    save_file({"x": torch.zeros(100_000)}, path)


def write_pickle(path):
    import torch

    torch.save({"x": torch.zeros(100_000)}, path)


def write_arrow(path):
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink:
        sink.write(b"x" * 100_000)


def write_text(path):
    path.write_text(LONG)


@pytest.mark.parametrize("write", [write_text, write_weights, write_pickle, write_arrow])
def test_a_full_disk_names_the_argument_and_leaves_the_earlier_file(write, tmp_path):
    (tmp_path / "a.bin").write_text("earlier")
    with full_disk(1000), pytest.raises(OSError) as problem:
        with output("output_json", tmp_path / "a.bin") as part:
            write(part)
    assert str(problem.value).startswith(f"`output_json` {tmp_path / 'a.bin'} cannot be written (")
    assert str(problem.value).endswith("): make room, or choose another path.")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_text() == "earlier"


@pytest.mark.parametrize("write", [write_text, write_weights, write_pickle])
def test_a_full_disk_leaves_the_earlier_model(write, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_text("earlier")
    with full_disk(1000), pytest.raises(OSError, match="`output_dir` .*model cannot be written"):
        with output_folder("output_dir", model) as part:
            (part / "config.json").write_text("{}")
            write(part / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.read_text() for path in model.iterdir()] == ["earlier"]


def test_a_model_takes_the_place_of_the_weights_and_of_nothing_else(tmp_path):
    model = tmp_path / "a" / "model"
    for _ in range(2):
        with output_folder("output_dir", model) as part:
            (part / "model.safetensors").write_text("new")
            assert not (model / "more.safetensors").exists() or part.parent == model.parent
        assert {path.name for path in model.iterdir()} - {"notes"} == {"model.safetensors"}
        for name in ("more.safetensors", "model.safetensors.index.json", "notes"):
            (model / name).write_text("earlier")
    assert (model / "notes").read_text() == "earlier" and [path.name for path in model.parent.iterdir()] == ["model"]


def test_what_goes_wrong_leaves_the_earlier_file(tmp_path):
    (tmp_path / "a.json").write_text("earlier")
    with pytest.raises(KeyboardInterrupt), replaced(tmp_path / "a.json") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.json").read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1


def test_where_nothing_was_written_nothing_changes(tmp_path):
    """A picture of nothing, for instance."""
    with replaced(tmp_path / "a.png"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_link_stays_one(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "a.json").symlink_to(tmp_path / "far" / "b.json")
    for text in ("one", "two"):
        write_output("output_json", tmp_path / "a.json", text)
        assert (tmp_path / "a.json").is_symlink() and (tmp_path / "far" / "b.json").read_text() == text + "\n"


def test_a_folder_is_made_and_text_is_whole(tmp_path):
    write_output("output_json", tmp_path / "new" / "a.json", "{}")
    assert (tmp_path / "new" / "a.json").read_text() == "{}\n"


def test_lines_that_cannot_be_written_name_their_file(tmp_path):
    with full_disk(1000), pytest.raises(OSError, match="a.txt cannot be written .File too large.: make room"):
        write_atomically(tmp_path / "a.txt", [LONG])
    (tmp_path / "locked").mkdir(mode=0o500)
    with as_anybody(), pytest.raises(OSError, match="b.txt cannot be written .Permission denied."):
        write_atomically(tmp_path / "locked" / "b.txt", ["b"])
    assert not list(tmp_path.glob("**/*.txt"))


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), True),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), False),
        (ConnectionError("the Hub refused the connection"), False),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), False),
        (OSError(-2, "Name or service not known"), False),  # of a name server
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("no"), False),
    ],
)
def test_what_is_not_the_file_systems_is_left_as_it_is(problem, told):
    assert is_write_error(problem) == told
    with pytest.raises(OSError if told else type(problem)) as found, writing("output_dir", "out"):
        raise problem
    assert ("`output_dir` out cannot be written" in str(found.value)) == told
