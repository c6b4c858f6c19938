"""A template that takes no record is told with the record, before a model is loaded."""

import importlib
import json
import sys

import pytest
from tiny_files import write_chats, write_tiny_target
from tiny_tokenizer import CHATML, assistant, tiny_tokenizer, user
from warm_python import ROOT

from hf_eagle.data.records import load_records
from hf_eagle.data.template_check import check_template


sys.path.insert(0, str(ROOT / "scripts"))

CHAT = {"messages": [user("Name a tree."), assistant("oak")]}
REFUSING = {
    "raises": ("{{ raise_exception('no chats here') }}", "no chats here"),
    "empty prompt": ("{{ '' }}", "it makes an empty prompt of the conversation"),
    "no template": ("", "has no chat template"),
    "broken": ("{% bad %}", "Encountered unknown tag 'bad'"),
    "fails": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", REFUSING)
def test_the_first_record_is_named(name, tmp_path):
    template, said = REFUSING[name]
    with pytest.raises(ValueError, match=r"^Record 0 cannot be rendered by the chat template of `target`: ") as problem:
        check_template(tiny_tokenizer(template), [CHAT, CHAT])
    assert said in str(problem.value) and str(problem.value).endswith(".")

    (tmp_path / "chats.jsonl").write_text(json.dumps(CHAT) + "\n")
    with pytest.raises(ValueError, match="cannot be rendered") as problem:
        check_template(tiny_tokenizer(template), load_records([str(tmp_path / "chats.jsonl")]))
    assert str(problem.value).startswith((str(tmp_path / "chats.jsonl"), "Record 0"))


def test_one_record_that_is_taken_is_enough():
    """Others that are refused are counted later."""
    picky = "{% if messages[0].content == 'Name a tree.' %}{{ raise_exception('no trees') }}{% endif %}" + CHATML
    check_template(tiny_tokenizer(picky), [CHAT, {"messages": [user("Name a bird."), assistant("wren")]}])
    with pytest.raises(ValueError, match="Record 0 .*no trees"):
        check_template(tiny_tokenizer(picky), [CHAT] * 30)


def test_what_is_no_chat_of_texts_is_left_to_who_renders_it():
    refusing = tiny_tokenizer(REFUSING["raises"][0])
    check_template(refusing, [{"text": "A document."}])
    check_template(refusing, [])


@pytest.mark.parametrize("name", ["raises", "empty prompt", "no template"])
def test_verbs_name_argument_and_record(name, tmp_path, monkeypatch):
    write_tiny_target(tmp_path / "target")
    write_chats(tmp_path / "chats.jsonl")
    (tmp_path / "target" / "chat_template.jinja").write_text(REFUSING[name][0])
    words = ["--target", "target", "--data", "chats.jsonl", "--output", "out.jsonl"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["regenerate_answers", *words])
    with pytest.raises(ValueError, match=rf"^`data`.*cannot be rendered.*{REFUSING[name][1]}"):
        importlib.import_module("regenerate_answers").main()
    assert not list(tmp_path.glob("out*"))
