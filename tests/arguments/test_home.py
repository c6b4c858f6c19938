"""`~` is expanded once, where arguments are read: on command lines and in files, where no shell does it."""

from dataclasses import dataclass, field

import pytest

from hf_eagle.arguments.parser import EagleArgumentParser, argument


@dataclass
class Arguments:
    target: str | None = argument(None, "A folder.")
    data: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    "words",
    [
        ["--target", "~/t", "--data", "~/a", "b"],
        ["--target=~/t", "--data", "~/a", "b"],
        ["~/t", "--data", "~/a", "b"],
        ["--config", "~/recipe.yaml"],
        ["--config=~/recipe.yaml"],
    ],
)
def test_everywhere_a_path_may_be(tmp_path, monkeypatch, words):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("target: ~/t\ndata: [~/a, b]\n")
    (args,) = EagleArgumentParser(Arguments).parse_args_and_config(words, first="target")
    assert (args.target, args.data) == (f"{tmp_path}/t", [f"{tmp_path}/a", "b"])


@pytest.mark.parametrize("value", ["a~/b", "~", "~b", "x=~/y", "org/t", ""])
def test_nothing_else_is_touched(monkeypatch, value):
    monkeypatch.setenv("HOME", "/home/me")
    for words in (["--target", value], [f"--target={value}"]):
        (args,) = EagleArgumentParser(Arguments).parse_args_and_config(words)
        assert args.target == value
