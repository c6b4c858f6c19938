"""What every verb knows that loads a target or renders chats: which groups, by one name each, and read alike."""

import json
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from hf_eagle.arguments.groups import DataArguments, TargetArguments
from hf_eagle.arguments.sources import TargetSourceArguments, TemplateArguments
from hf_eagle.cli import VERBS


ROOT = Path(__file__).resolve().parents[2]
SOURCE, TEMPLATE = TargetSourceArguments, TemplateArguments
# verb -> the groups that it knows
GROUPS = {
    "train": {SOURCE, TEMPLATE},
    "preview": {SOURCE, TEMPLATE},
    "cache": {SOURCE, TEMPLATE},
    "evaluate": {SOURCE, TEMPLATE},
    "regenerate": {SOURCE, TEMPLATE},
    "write-prompts": {SOURCE, TEMPLATE},
    "benchmark-serving": {SOURCE, TEMPLATE},
    "diagnose": {SOURCE, TEMPLATE},
    "serve-features": {SOURCE, TEMPLATE},
    "prune": {SOURCE, TEMPLATE},
    "check": set(),  # these read a draft, and of a target its config at most
    "import": set(),
    "publish": set(),
    "compare": set(),
    "ablate": set(),  # hands a recipe to train and evaluate
    "benchmark": set(),  # times a step
    "targets": set(),  # lists families, or reads a config
}
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


def options_of(verb, monkeypatch, capsys) -> set[str]:
    """Names of the arguments that `--help` lists."""
    script = str(ROOT / "scripts" / VERBS[verb])
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    runpy.run_path(script, run_name="__main__")  # returns: only what went wrong ends the process
    return set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))


def names(group) -> set[str]:
    return {known.name for known in fields(group)}


def test_every_verb_is_in_the_table():
    assert set(GROUPS) == set(VERBS)


@pytest.mark.parametrize("verb", GROUPS)
def test_which_verb_knows_which_group(verb, monkeypatch, capsys):
    known = options_of(verb, monkeypatch, capsys)
    for group in GROUPS[verb]:
        assert names(group) <= known
    if TEMPLATE not in GROUPS[verb]:
        assert not names(TEMPLATE) & known


def test_groups_of_training_are_these():
    """One declaration each: what is said of an argument in one verb is said in all."""
    assert issubclass(TargetArguments, TargetSourceArguments) and issubclass(DataArguments, TemplateArguments)
    for group, base in ((TargetArguments, TargetSourceArguments), (DataArguments, TemplateArguments)):
        assert not names(base) & set(vars(group).get("__annotations__", {}))


def test_a_source_is_what_loading_takes():
    assert TargetSourceArguments().source == {"revision": "main", "trust_remote_code": False}
    given = TargetArguments(target="t", target_revision="v2", gguf_file="x.gguf", trust_remote_code=True)
    assert given.source == {"revision": "v2", "trust_remote_code": True, "gguf_file": "x.gguf"}


def test_template_options_of_both_groups(tmp_path):
    """Tools are read with the options, in the envelope that templates take."""
    path = tmp_path / "tools.json"
    envelope = {"type": "function", "function": TOOL}
    for written in ([TOOL], [envelope], json.dumps([TOOL]), [json.dumps(TOOL)]):
        path.write_text(json.dumps(written))
        for group in (TemplateArguments(tools=str(path)), DataArguments(train_data=["x"], tools=str(path))):
            assert group.template_kwargs == {"tools": [envelope]}
    both = TemplateArguments(chat_template_kwargs='{"enable_thinking": false}', tools=str(path))
    assert both.template_kwargs == {"enable_thinking": False, "tools": [envelope]}
    assert TemplateArguments().template_kwargs == {}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ("{thinking: no}", "`chat_template_kwargs` is not JSON"),
        ("[1]", r"`chat_template_kwargs` must be a JSON object, got \[1\]"),
        ("[" * 100_000, "`chat_template_kwargs` is nested more than"),
        ('{"tokenize": true}', "`chat_template_kwargs` holds 'tokenize', which no chat template sees"),
        ('{"add_generation_prompt": false}', "`chat_template_kwargs` holds 'add_generation_prompt'"),
    ],
)
def test_options_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message) as told:
        TemplateArguments(chat_template_kwargs=kwargs)
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "`tools` cannot be read: .*tools.json"),
        ("[{", "`tools` cannot be read: .*tools.json is not JSON"),
        ("[" * 100_000, "`tools` cannot be read: .*tools.json is nested more than"),
        ("[]", "`tools` names .*tools.json, which holds no tool"),
        ("[7]", "`tools` .*tools.json cannot be read: `tools` must be a list of objects"),
        ("7", "`tools` .*tools.json cannot be read"),
    ],
)
def test_tools_that_cannot_be_read_are_refused(tmp_path, content, message):
    path = tmp_path / "tools.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as told:
        TemplateArguments(tools=str(path))
    assert "tools.json" in str(told.value) and "\n" not in str(told.value)
