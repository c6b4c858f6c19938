"""YAML: words as they were written, and files that stand for too much are refused before anything is made of them."""

import json
import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_eagle.arguments.groups import DataArguments, DraftArguments, TargetArguments
from hf_eagle.arguments.parser import EagleArgumentParser
from hf_eagle.arguments.yaml_files import read_yaml


NEEDED = "target: t\ntrain_data: [d]\n"


@pytest.fixture
def parse(tmp_path):
    from hf_eagle import EagleTrainingArguments

    groups = (TargetArguments, DraftArguments, DataArguments, EagleTrainingArguments)

    def parse(text: str) -> dict:
        kept = [line for line in NEEDED.splitlines() if line.split(":")[0] != text.split(":")[0]]
        (tmp_path / "run.yaml").write_text("\n".join([*kept, text]), encoding="utf-8")
        found = EagleArgumentParser(groups).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])
        return {name: value for group in found for name, value in vars(group).items()}

    return parse


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("save_strategy: no", "save_strategy", "no"),
        ("save_strategy: 'no'", "save_strategy", "no"),
        ("logging_strategy: NO", None, "invalid choice: 'NO'"),
        ("target_revision: on", "target_revision", "on"),
        ("target_revision: 1.10", "target_revision", "1.10"),
        ("target_revision: 0123", "target_revision", "0123"),
        ("target_revision: 2024-05-06", "target_revision", "2024-05-06"),
        ("run_name: yes", "run_name", "yes"),
        ("train_data: [no, 1.10, a]", "train_data", ["no", "1.10", "a"]),
        ("bf16: off", "bf16", False),
        ("bf16: on", "bf16", True),
        ("packing: yes", "packing", True),
        ("train_on_thoughts: no", "train_on_thoughts", False),
        ("max_length: 0x40", "max_length", 64),
        ("max_length: 1_000", "max_length", 1000),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("tap_ids: [1, 2]", "tap_ids", [1, 2]),
        ("chat_template_kwargs: {a: no, b: 1.10}", "chat_template_kwargs", '{"a": false, "b": 1.1}'),
        ("base: &b {max_length: 8}", None, "unknown argument --base"),
        ("draft_vocab_size: null", "draft_vocab_size", None),
        ("max_length: .nan", None, "invalid int value"),
        ("learning_rate: .inf", None, "`learning_rate` must be a finite number, got inf"),
        ("train_data: [a, null]", None, "a value of `train_data` must be one text or number"),
        ("train_data: [[a]]", None, "a value of `train_data` must be one text or number"),
        ("run_name: [a, b]", None, "gives `run_name` a list, but it takes one value"),
        ("chat_template_kwargs: {a: 2024-05-06}", None, "gives `chat_template_kwargs` values that JSON does not have"),
        ("max_length: 2024-99-99", None, "cannot be read as YAML"),
        ("1: 2", None, "must map names of arguments to values, but 1 is not a name"),
        ("run_name: !!python/name:os.system ''", "run_name", ""),
        ("learning_rate: !!python/name:os.system ''", None, "cannot be read as YAML"),
        ("config: other.yaml", None, "`config` belongs on the command line"),
    ],
)
def test_values_are_what_was_written(parse, capsys, line, name, value):
    if line.startswith("train_data"):
        line = line + "\n"
    if name is not None:
        assert parse(line)[name] == value
        return
    with pytest.raises(SystemExit):
        parse(line)
    printed = capsys.readouterr().err
    assert value in printed and len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize(("argument", "line"), [("target", "target: null"), ("train_data", "train_data: null")])
def test_null_is_no_value_of_what_is_required(tmp_path, capsys, argument, line):
    kept = NEEDED.splitlines()[1 if argument == "target" else 0]
    (tmp_path / "run.yaml").write_text(f"{kept}\n{line}\n")
    with pytest.raises(SystemExit):
        EagleArgumentParser((TargetArguments, DataArguments)).parse_args_and_config(
            ["--config", str(tmp_path / "run.yaml")]
        )
    assert f"required: --{argument}" in capsys.readouterr().err


def bomb(levels: int, width: int) -> str:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(9, 10), "more than 20,000 values"),
        (bomb(40, 2), "more than 20,000 values"),
        (bomb(30, 1).replace("[x, x]", "[" + "x, " * 1000 + "x]"), "more than 20,000 values"),
        ("a: &a {b: 1}\n" + "\n".join(f"k{n}: {{<<: *a, c: *a}}" for n in range(4000)), "more than 20,000 values"),
        ("a: &a [*a]", "an alias of what it is part of"),
        ("a: &a {b: *a}", "an alias of what it is part of"),
        ("a: " + "[" * 60 + "]" * 60, "more than 50 levels"),
        ("a: " + "[" * 5000, "more than 50 levels|as YAML"),
        ("a: x\n" * 60_000, "bytes, more than any recipe"),
        ("a: [1", "as YAML"),
        ("a: \x00", "as YAML"),
        ("[1, 2]", "must hold `argument: value` lines, got list"),
        ("text", "must hold `argument: value` lines, got text"),
        ("", "must hold `argument: value` lines, got nothing"),
    ],
)
def test_what_stands_for_too_much_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as told:
        read_yaml(path, "recipe")
    assert str(told.value).startswith(f"`recipe` {path}") and "\n" not in str(told.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"\x1f\x8b\x08"])
def test_a_file_that_is_no_text_is_one_sentence(tmp_path, content):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="^`recipe` .* cannot be read"):
        read_yaml(path, "recipe")


NAMES = st.text("abcdef", min_size=1, max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("xyz", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_everything_else_is_read_as_yaml_reads_it(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_text(yaml.safe_dump(values) + "\n# " + json.dumps(sorted(values)))
    assert read_yaml(path, "recipe") == values


def test_merged_keys_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: &a {b: 1, c: 2}\nd: {<<: *a, c: 3}\n")
    assert read_yaml(path, "recipe") == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}


@pytest.mark.parametrize(
    ("text", "name", "lines"),
    [
        ("target: a\nbf16: true\ntarget: b\n", "target", "1 and 3"),
        ("target: a\n'target': a\n", "target", "1 and 2"),
        ("{target: a, target: b}", "target", "1 and 1"),
        ("lr_scheduler_kwargs:\n  power: 1\n  power: 2\n", "power", "2 and 3"),
        ("variants:\n- target: a\n  ttt_steps: 3\n  target: b\n", "target", "2 and 4"),
        ("? [{a: 1, a: 2}]\n: 3\n", "a", "1 and 1"),
    ],
)
def test_a_name_that_stands_twice_is_refused_with_its_lines(tmp_path, text, name, lines):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"`--config` .*a.yaml gives `{name}` twice, in lines {lines}: leave one out"):
        read_yaml(tmp_path / "a.yaml", "--config")


@pytest.mark.parametrize("name", ["config", "help"])
def test_what_only_the_command_line_takes_is_told_so(parse, capsys, name):
    with pytest.raises(SystemExit):
        parse(f"{name}: other.yaml")
    assert f"`{name}` belongs on the command line, not in a file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_not_read(kind, tmp_path):
    path = tmp_path / "run.yaml"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="^`recipe` .*run.yaml cannot be read: it is no ordinary file; name another."):
        read_yaml(path, "recipe")


@pytest.mark.parametrize("words", [["--config", ""], ["--config="], ["--config", " "]])
def test_an_empty_config_is_told_so(capsys, words):
    with pytest.raises(SystemExit):
        EagleArgumentParser(TargetArguments).parse_args_and_config(words)
    assert "`--config` is empty: name a YAML file or a recipe" in capsys.readouterr().err
