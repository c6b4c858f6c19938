"""The quickstart's bookkeeping; its whole way is run by .ci/run, shortened."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hf_eagle.hub.card_facts import CardFacts
from hf_eagle.hub.model_card import render_model_card
from hf_eagle.training.run_arguments import RunArguments


SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import quickstart  # noqa: E402


def run_stage(folder: Path, name: str, settings: dict, product: str, fail: bool = False) -> bool:
    """One stage of a new process: writes its product when there is work to do; returns whether there was."""
    progress = quickstart.Progress(folder / "progress.json")
    with progress.stage(name, "heading", settings, folder / product) as to_do:
        if fail:
            raise KeyboardInterrupt
        if to_do:
            (folder / product).write_text(name)
    return to_do


def test_a_finished_stage_is_not_repeated(tmp_path):
    assert run_stage(tmp_path, "answers", {"n": 3}, "answers.jsonl")
    assert not run_stage(tmp_path, "answers", {"n": 3}, "answers.jsonl")


def test_an_interrupted_stage_is_taken_up_again_and_its_time_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, "answers", {"n": 3}, "answers.jsonl", fail=True)
    entry = json.loads((tmp_path / "progress.json").read_text())["answers"]
    assert not entry["done"] and entry["minutes"] > 0
    assert run_stage(tmp_path, "answers", {"n": 3}, "answers.jsonl")
    assert json.loads((tmp_path / "progress.json").read_text())["answers"]["minutes"] > entry["minutes"]


def test_the_time_of_a_killed_stage_is_unknown_and_not_told(tmp_path):
    code = f"""
import os, sys
from dataclasses import fields, replace
from pathlib import Path
sys.path.insert(0, {str(SCRIPTS)!r})
import quickstart
with quickstart.Progress(Path("progress.json")).stage("training", "heading", {{}}, Path("product")):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == -9
    assert run_stage(tmp_path, "training", {}, "product")
    entry = json.loads((tmp_path / "progress.json").read_text())["training"]
    assert entry["done"] and entry["minutes"] is None


def test_a_lost_product_is_made_again_with_all_that_was_built_on_it(tmp_path):
    for name in ("answers", "training", "acceptance"):
        run_stage(tmp_path, name, {}, name)
    (tmp_path / "training").unlink()
    assert not run_stage(tmp_path, "answers", {}, "answers")
    assert run_stage(tmp_path, "training", {}, "training")
    assert run_stage(tmp_path, "acceptance", {}, "acceptance")


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path):
    run_stage(tmp_path, "answers", {"n": 3}, "answers.jsonl")
    with pytest.raises(SystemExit, match="`n` is 4, but .*answers.jsonl was made with 3; delete .* or choose another"):
        run_stage(tmp_path, "answers", {"n": 4}, "answers.jsonl")
    assert not run_stage(tmp_path, "answers", {"n": 3}, "answers.jsonl")


def test_the_short_way_changes_only_what_exists():
    assert quickstart.SHORT.keys() <= {field.name for field in fields(quickstart.QuickstartArguments)}
    quickstart.QuickstartArguments(**quickstart.SHORT)
    with pytest.raises(ValueError, match="`eval_prompts` must be at least 1, got 0"):
        quickstart.QuickstartArguments(eval_prompts=0)


@pytest.mark.parametrize("script", ["quickstart.py", "fetch_assets.py", "train_eagle.py", "evaluate_draft.py"])
def test_help_is_instant(script):
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({str(SCRIPTS / script)!r}, run_name="__main__")
except SystemExit as stop:
    assert not stop.code and "torch" not in sys.modules, "torch was loaded for --help"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: {script}" in done.stdout and "(default:" in done.stdout


def test_the_recipes_options_are_ones_that_training_knows():
    options = [*quickstart.SHORT["train_options"].split(), "--bf16", "False", "--target_dtype", "float32"]
    config = SCRIPTS.parent / quickstart.QuickstartArguments().train_config
    run = RunArguments.parse(["--config", str(config), *options])
    assert (run.draft.draft_vocab_size, run.training.max_steps, run.training.bf16) == (256, 20, False)
    target = run.target
    assert target.target == "assets/smollm2-135m-instruct" and target.target_dtype == "float32"


def test_the_card_of_training_is_completed_and_not_overwritten(tmp_path):
    sources, statistics = tmp_path / "sources.json", tmp_path / "statistics.json"
    source = {"file": "chats.json", "from": "https://example.com/chats", "license": "MIT"}
    sources.write_text(json.dumps({"prompts/train.jsonl": {"from": {"chats": source}}}))
    held = {"conversations": 9, "tokens": 90, "supervised_share": 0.5, "duplicates": 0, "overlap": {}}
    held["overlap"]["mt_bench.jsonl"] = {"prompts": 80, "prompts_found": 0}
    statistics.write_text(json.dumps(held))

    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLMEagle3"]}))
    training = {"optimizer steps": 20, "processes": 1}
    facts = CardFacts("draft", "target", data=["`answers.jsonl`, 9 records"], training=training)
    render_model_card(draft, replace(facts, hyperparameters={"max_steps": 20}))
    measured = {"acceptance_length": 1.25, "num_speculative_tokens": 3, "drafts": 8, "num_prompts": 4}
    measured |= {"prompts": "mt_bench.jsonl", "accepted_per_position": [2, 0, 0]}
    (draft / "acceptance.json").write_text(json.dumps(measured))

    for _ in range(2):  # also when it is stopped and run again
        quickstart.complete_card(draft, statistics, sources)
    card = (draft / "README.md").read_text()
    for told in ("| optimizer steps | 20 |", "| `max_steps` | `20` |", "`answers.jsonl`, 9 records", "**1.250**"):
        assert told in card
    assert "Of the 80 prompts in mt_bench.jsonl, 0 occur in the data" in card
    assert card.count("prompts from [chats.json](https://example.com/chats), licence MIT") == 1

    (draft / "README.md").write_text("edited by a person")
    quickstart.complete_card(draft, statistics, sources)
    assert (draft / "README.md").read_text() == "edited by a person"


def test_the_command_of_training_is_one_that_training_takes():
    arguments = quickstart.QuickstartArguments(**quickstart.SHORT)
    config = str(SCRIPTS.parent / arguments.train_config)
    command = quickstart.train_command(replace(arguments, train_config=config), Path("target"), Path("answers.jsonl"))
    run = RunArguments.parse(command)
    assert run.target.base_model == quickstart.BASE_MODEL
    assert (run.draft.draft_vocab_size, run.training.max_steps) == (256, 20)  # the options, over the file
