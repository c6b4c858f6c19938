"""`hf-eagle diagnose`: what it tells can be measured again by the commands that it prints."""

import importlib
import json
import shlex
import sys

import pytest
from planted import reorder
from taught_drafts import target_and_tokenizer, taught, word_prompts
from warm_python import ROOT

from hf_eagle.diagnosis.causes import CAUSES


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A target, a draft whose taps are in another order, prompts, and chats."""
    folder = tmp_path_factory.mktemp("diagnosed")
    target, tokenizer = target_and_tokenizer()
    draft = taught(target, tokenizer, word_prompts())
    reorder("fc", (2, 0, 1))(draft)
    target.model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    draft.save_pretrained(folder / "draft")
    records = [{"messages": prompt.messages, "category": prompt.category} for prompt in word_prompts()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture()
def run(monkeypatch, capsys, files):
    """Run a verb in this process, with words as they are printed; returns what it prints."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(files)

    def call(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        capsys.readouterr()
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return call


GIVEN = ["draft", "--target", "target", "--prompts", "prompts.jsonl", "--max_new_tokens", "24"]


def test_what_is_told_can_be_measured_again(run, files, tmp_path):
    said = run("diagnose_draft", *GIVEN, "--output_json", tmp_path / "a.json")
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["causes"][0]["cause"] == "tap_order" and (tmp_path / "a.png").stat().st_size > 1000
    assert "| 1 | the taps are put together in another order (`tap_order`) |" in said

    commands = [shlex.split(line) for line in said.splitlines() if line.startswith("    hf-eagle")]
    evaluate, again = commands[:2]
    assert again[:2] == ["hf-eagle", "diagnose"] and again[-2:] == ["--only", "tap_order"]

    # acceptance as it is, by another verb
    place = evaluate.index("acceptance.json")
    run("evaluate_draft", *evaluate[2:place], tmp_path / "as_it_is.json")
    assert (
        json.loads((tmp_path / "as_it_is.json").read_text())["acceptance_length"]
        == told["acceptance"]["acceptance_length"]
    )

    # the cause alone, and the draft without it
    run("diagnose_draft", *again[2:], "--output_json", tmp_path / "b.json", "--repaired", tmp_path / "mended")
    alone = json.loads((tmp_path / "b.json").read_text())["causes"]
    assert alone[0] == told["causes"][0]
    evaluate[evaluate.index("--draft") + 1] = str(tmp_path / "mended")
    run("evaluate_draft", *evaluate[2:place], tmp_path / "mended.json")
    mended = json.loads((tmp_path / "mended.json").read_text())["acceptance_length"]
    assert mended == alone[0]["acceptance_length"] == alone[0]["decoded"]

    said = run("diagnose_draft", tmp_path / "mended", *GIVEN[1:], "--only", "tap_order", "--repaired", tmp_path / "no")
    assert "Nothing found" in said and "`repaired` is not written" in said and not (tmp_path / "no").exists()


def test_prompts_of_the_data(run, files, tmp_path):
    """Without prompts, those of the training data are taken."""
    chats = [{"messages": [*x.messages, {"role": "assistant", "content": "w20 w21 w22"}]} for x in word_prompts()]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chats))
    words = ["draft", "--target", "target", "--data", tmp_path / "chats.jsonl", "--max_new_tokens", "8"]
    said = run("diagnose_draft", *words, "--only", "answers", "--output_json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["acceptance"]["num_prompts"] == 6 and "`answers`" in said


def test_the_door(run, files):
    diagnose = importlib.import_module("diagnose_draft")
    with pytest.raises(ValueError, match="`prompts` is not set and there is no assets/prompts/mt_bench.jsonl"):
        diagnose.door(["draft", "--target", "target"])
    with pytest.raises(SystemExit):
        diagnose.door([*GIVEN, "--only", "taps"])


def test_every_cause_says_what_to_do():
    assert all(cause.title and cause.mend and not cause.title.endswith(".") for cause in CAUSES.values())
