"""Acceptance behind prompts that show images and videos: by `measure_acceptance`, the script, and while training."""

import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_vision_decoding import LONGEST, PROMPTS, prompts, teach
from test_vision_training import make_trainer
from tiny_vision import chat, image, text, vision_tokenizer, write_records

from hf_eagle.decoding import speculative_generate
from hf_eagle.evaluation.acceptance import measure_acceptance
from hf_eagle.evaluation.prompt_batches import PromptBatch
from hf_eagle.evaluation.prompts import Prompt, load_prompts
from hf_eagle.hub.card_facts import FACTS, CardFacts
from hf_eagle.training.acceptance import AcceptanceLengthCallback


SHAPES = ({}, {"method": "tree", "depth": 3, "top_k": 2, "total_tokens": 8})


@pytest.fixture(scope="module")
def trained():
    return teach("qwen3-vl", "mrope")


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    """Prompts in a file, with the media in files beside it."""
    folder = tmp_path_factory.mktemp("prompts")
    lines = [json.dumps(record) for record in write_records(folder, PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder / "prompts.jsonl"


def sums(target, draft, inputs, **shape):
    """Drafts and accepted tokens of prompts that are decoded each by itself."""
    ends = {"max_new_tokens": LONGEST, "eos_token_ids": [vision_tokenizer().eos_token_id]}
    out = [speculative_generate(target, draft, **one, **ends, **shape) for one in inputs]
    return sum(o.drafts[0] for o in out), sum(sum(o.accepted_per_position[0]) for o in out)


@pytest.mark.parametrize("shape", SHAPES, ids=("chain", "tree"))
def test_counts_are_those_of_the_processors_own_batches(trained, prompt_file, shape):
    target, processor, draft = trained
    for size in (1, 2):
        found = measure_acceptance(
            target, draft, processor, load_prompts(prompt_file), max_new_tokens=LONGEST, batch_size=size,
            progress=False, **shape,
        )  # fmt: skip
        assert found["identical_to_target"] is True and found["num_prompts"] == len(PROMPTS)
        wanted = sums(target, draft, [prompts(processor, [messages]) for messages in PROMPTS], **shape)
        assert (found["drafts"], found["accepted_tokens"]) == wanted and wanted[1] > 0


def test_a_batch_is_what_the_processor_makes(prompt_file, trained):
    processor, loaded = trained[1], load_prompts(prompt_file)
    batch, wanted = PromptBatch.of(loaded, processor), prompts(processor, PROMPTS)
    assert set(batch.inputs) == set(wanted)
    assert all(torch.equal(batch.inputs[name], torch.as_tensor(wanted[name])) for name in wanted)
    for row, ids in enumerate(batch.token_ids):
        assert ids == wanted["input_ids"][row][wanted["attention_mask"][row] == 1].tolist()
    assert set(PromptBatch.of(loaded[1:2], processor).inputs) == {"input_ids", "attention_mask"}  # text as ever


def test_follow_ups_stand_behind_a_picture(trained):
    """The second turn is asked behind the answer to the first, and sees the same picture."""
    target, processor, draft = trained
    prompt = Prompt(chat([image(1), text("hello")]), None, 0, ("and two?",))
    found = measure_acceptance(target, draft, processor, [prompt], max_new_tokens=6, turns=2, progress=False)
    assert found["identical_to_target"] is True and list(found["acceptance_length_by_turn"]) == ["1", "2"]


def test_what_is_refused(trained, tmp_path):
    target, processor, draft = trained
    shown = Prompt(PROMPTS[0], None, "p")
    with pytest.raises(ValueError, match="Prompt 'p' holds images or videos, but the target takes text only"):
        measure_acceptance(target, draft, processor.tokenizer, [shown], progress=False)
    missing = Prompt(chat([{"type": "image", "image": str(tmp_path / "nowhere.png")}]), None, 3)
    with pytest.raises(ValueError, match="A medium of prompt 3 cannot be loaded"):
        PromptBatch.of([missing], processor)
    with pytest.raises(ValueError, match="The processor refuses the media of the prompts 4"):
        PromptBatch.of([Prompt(chat([image(1), text("<|image_pad|>")]), None, 4)], processor)


def test_the_script(trained, tmp_path, monkeypatch, capsys, caplog):
    """From folders and files; without torchvision the processor takes images only."""
    target, processor, draft = trained
    target.model.save_pretrained(tmp_path / "target")
    processor.tokenizer.save_pretrained(tmp_path / "target")
    processor.image_processor.save_pretrained(tmp_path / "target")
    draft.save_pretrained(tmp_path / "draft")
    shown = [PROMPTS[0], PROMPTS[1], chat([image(4, 8, 24), text("and")])]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, write_records(tmp_path, shown))))
    options = ["--target", "target", "--draft", "draft", "--prompts", "prompts.jsonl", "--output_json", "found.json"]
    script = str(Path(__file__).resolve().parents[2] / "scripts" / "evaluate_draft.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *options, "--max_new_tokens", str(LONGEST), "--device=cpu"])
    runpy.run_path(script, run_name="__main__")
    found = json.loads(Path("found.json").read_text())
    assert found["identical_to_target"] is True and found["num_prompts"] == 3
    inputs = [prompts(processor, [messages]) for messages in shown]
    assert (found["drafts"], found["accepted_tokens"]) == sums(target, draft, inputs)
    assert "output identical to the target's" in capsys.readouterr().out
    assert "media are shown otherwise" not in caplog.text

    # with other limits than the draft was trained with, which its folder knows
    write_facts(tmp_path / "draft", {"max_pixels": 512, "fps": 2.0})
    asked = ["--max_pixels", "256", "--fps", "2", "--max_new_tokens", "2", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", [script, *options[:-1], "limited.json", *asked])
    runpy.run_path(script, run_name="__main__")
    found = json.loads(Path("limited.json").read_text())
    assert (found["max_pixels"], found["fps"]) == (256, 2.0) and "min_pixels" not in found
    assert "`max_pixels` is 256 here and was 512 in the draft's training" in caplog.text
    assert "`fps`" not in caplog.text


def write_facts(folder, limits):
    facts = CardFacts("d", "t", kind="eagle3", hyperparameters=limits)
    (folder / FACTS).write_text(json.dumps(asdict(facts)))


def test_while_training(tmp_path, prompt_file):
    """The number that a trainer logs is that of the draft as it is then."""
    trainer, processor, _ = make_trainer(tmp_path, max_steps=2, learning_rate=1e-3)
    loaded = load_prompts(prompt_file)
    trainer.add_callback(AcceptanceLengthCallback(trainer, processor, loaded, every_steps=2, max_new_tokens=LONGEST))
    trainer.train()
    logged = [x["acceptance_length"] for x in trainer.state.log_history if "acceptance_length" in x]
    drafts, accepted = sums(
        trainer.target, trainer.model.eval(), [prompts(processor, [messages]) for messages in PROMPTS]
    )
    assert logged == [round(1 + accepted / drafts, 4)]
