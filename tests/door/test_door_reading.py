"""Files of strangers: whatever a library raises over them is one sentence with argument, path and file."""

import json
import pickle
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from hf_eagle.door.reading import broken_file, local_folder, read_header, read_part, reading
from hf_eagle.door.sentences import is_sentence


def told(error, argument="target", path="you/model", file=None):
    with pytest.raises((OSError, ValueError)) as problem, reading(argument, path, file):
        raise error
    text = str(problem.value)
    assert is_sentence(problem.value) and text.startswith(f"`{argument}` {path} ") and text.endswith(".")
    assert "\n" not in text and type(problem.value) is (OSError if isinstance(error, OSError) else ValueError)
    return text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("model_type"), "cannot be read (KeyError: 'model_type'): correct it, or name another."),
        (TypeError("must be a mapping"), "cannot be read (TypeError: must be a mapping): correct it, or name another."),
        (SafetensorError("header too small"), "(SafetensorError: header too small)"),
        (RecursionError("too deep"), "(RecursionError: too deep)"),
        (RuntimeError("Errors:\n\tsize mismatch for x\n\tand more"), "(RuntimeError: Errors: size mismatch for x)"),
        (
            OSError("We cannot connect.\nCheck it."),
            "and the Hub does not give it (We cannot connect): correct it, or check",
        ),
        (ImportError("needs sentencepiece"), "(ImportError: needs sentencepiece)"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), "(UnicodeDecodeError: "),
        (pickle.UnpicklingError("Weights only load failed.\n" * 30), "its pickled weights hold more than tensors"),
        (ValueError("Please pass the argument `trust_remote_code=True`"), "comes with code of its own"),
    ],
)
def test_whatever_is_raised_becomes_one_sentence(error, text):
    assert text in told(error)
    for argument in ("draft", "init_from"):
        assert text in told(error, argument, "outputs/run")


def test_the_file_that_is_read_is_named():
    assert told(KeyError("a"), file="config.json") == (
        "`target` you/model cannot be read: config.json is not accepted (KeyError: 'a'): correct it, or name another."
    )


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


def ours():
    raise ValueError("`target` is told already: name another.")


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), SystemExit(3), OutOfMemoryError("of CUDA")])
def test_what_says_nothing_of_the_files_is_left_alone(error):
    with pytest.raises(type(error)) as problem, reading("target", "you/model"):
        raise error
    assert problem.value is error


def test_a_sentence_of_ours_is_left_alone(tmp_path):
    """Raised in the package, which this file is no part of."""
    with pytest.raises(ValueError) as problem, reading("draft", "you/model"):
        read_part("target", tmp_path, tmp_path / "config.json")
    assert str(problem.value).startswith(
        f"`target` {tmp_path} cannot be read: {tmp_path}/config.json cannot be read (No"
    )
    with pytest.raises(ValueError, match="`draft` you/model cannot be read .ValueError: `target` is told already"):
        with reading("draft", "you/model"):
            ours()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/no/such/model", "does not exist: correct the path"),
        ("./model", "does not exist: correct the path"),
        ("a/b/c", "does not exist: correct the path"),
        ("~/model", "does not exist: correct the path"),
        ("you/model", "is no folder here, and the Hub does not give it (gone)"),
        ("model", "is no folder here, and the Hub does not give it (gone)"),
    ],
)
def test_what_is_not_there(path, text):
    assert text in told(OSError("gone"), path=path)


def test_a_file_and_a_folder_of_something_else(tmp_path):
    assert "holds no config.json: name the folder of a model" in told(OSError("gone"), path=str(tmp_path))
    (tmp_path / "file").write_text("a file")
    assert "is a file: name the folder that it lies in" in told(OSError("gone"), path=str(tmp_path / "file"))
    (tmp_path / "config.json").write_text("{}")
    assert "cannot be read (OSError: gone)" in told(OSError("gone"), path=str(tmp_path))


# ---- which file it is ----


@pytest.fixture
def folder(tmp_path):
    """A model of which everything looks sound."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ 'é' }}")
    save_file({"weight": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    return tmp_path


JSON_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
JSON_FILES += ["adapter_config.json", "preprocessor_config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[]", "must hold an object, but holds a list"),
        (b"null", "must hold an object, but holds null"),
        (b"{oops", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b'{"a": ' + b"[" * 100_000, "cannot be read as JSON (nested too deeply)"),
        (b'{"\xe9": 1}', "is not UTF-8 (byte 2 is 0xe9)"),
    ],
)
def test_a_broken_json_file_is_named(folder, name, content, text):
    assert broken_file(folder) is None
    (folder / name).write_bytes(content)
    found = told(AttributeError("'list' object has no attribute 'get'"), path=str(folder))
    assert f"{folder} cannot be read: {name} {text}" in found and "AttributeError" not in found


def test_a_broken_template_is_named(folder):
    (folder / "chat_template.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    assert "cannot be read: chat_template.jinja is no text" in told(ValueError("x"), path=str(folder))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: b"", "is cut, it has 0 bytes"),
        (lambda x: x[:5], "is cut, it has 5 bytes"),
        (lambda x: x[: len(x) // 2], "is cut"),
        (lambda x: x[:-1], "is cut: it has"),
        (lambda x: x + b"more", "is damaged: it has"),
        (lambda x: b"version https://git-lfs.github.com/spec/v1", "is cut or no safetensors"),
        (lambda x: x.replace(b"shape", b"shapy"), "has a header that cannot be read"),
        (lambda x: x[:8] + b"[" + x[9:], "has a header that cannot be read"),
        (lambda x: (2).to_bytes(8, "little") + b"[]", "has a header that cannot be read"),
    ],
)
def test_broken_weights_are_named(folder, change, text):
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(SafetensorError):
        safe_open(file, "pt")  # so that nothing sound is refused
    found = told(SafetensorError("header too small"), path=str(folder))
    assert f"cannot be read: model.safetensors {text}" in found and found.endswith(": download or write it anew.")


SHAPES = st.dictionaries(st.text("ab.", min_size=1, max_size=5), st.lists(st.integers(0, 4), max_size=3), max_size=4)


@given(SHAPES, st.integers(0, 10**6))
def test_headers_are_read_as_safetensors_reads_them(tmp_path_factory, shapes, cut):
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    whole = save({name: torch.zeros(shape) for name, shape in shapes.items()}, {"format": "pt"})
    file.write_bytes(whole)
    assert read_header(file) == {name: tuple(shape) for name, shape in shapes.items()}
    file.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(ValueError):
        read_header(file)


def test_the_folder_of_a_hub_id_is_the_downloaded_one(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--you--model" / "snapshots" / "abc"
    for name in ("refs", "blobs"):
        (snapshot.parents[1] / name).mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert local_folder("you/model") == local_folder("you/model", "abc") == snapshot
    assert local_folder(tmp_path) == tmp_path
    for path in ("you/other", "you/model/part", "/no/such", "not a name!", str(snapshot / "config.json")):
        assert local_folder(path) is None
    (snapshot / "config.json").write_text("[]")
    assert "you/model cannot be read: config.json must hold an object" in told(TypeError("a list"))
    shutil.rmtree(snapshot)
    assert local_folder("you/model") is None


def test_a_part_names_argument_and_file(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": "eight"}))
    with pytest.raises(ValueError) as problem:
        read_part("target", tmp_path, tmp_path / "adapter_config.json", {"r?": int | None})
    assert str(problem.value) == (
        f"`target` {tmp_path} cannot be read: {tmp_path}/adapter_config.json must hold a whole number or null as `r`, "
        "but holds text: restore it, or write it anew."
    )


@pytest.mark.parametrize(
    ("file", "held", "key", "told"),
    [
        ("model.safetensors.index.json", {"weight_map": {}}, "metadata", "its model.safetensors.index.json has no `m"),
        ("tokenizer.json", {"model": {}}, "added_tokens", "its tokenizer.json has no `added_tokens`: restore the file"),
        ("config.json", {"hidden_act": "swigloo"}, "swigloo", "`hidden_act` in its config.json is 'swigloo', which is"),
    ],
)
def test_a_key_error_says_which_field_it_is_about(file, held, key, told, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(held))
    with pytest.raises(ValueError, match=f"`target` {tmp_path} cannot be read: {told}"), reading("target", tmp_path):
        raise KeyError(key)
