"""Measured acceptance renders as training does: what template options change is in the prompts that are decoded."""

import json
from pathlib import Path

import pytest
from chain_models import VOCAB, make_draft, make_target
from datasets import Dataset
from tiny import random_chats, tiny_pair
from tiny_tokenizer import word_tokenizer
from warm_python import warm_python

from hf_eagle import EagleTrainer, EagleTrainingArguments
from hf_eagle.evaluation.acceptance import DecodingSettings, decode_prompts, measure_acceptance
from hf_eagle.evaluation.prompts import Prompt
from hf_eagle.training.acceptance import AcceptanceLengthCallback


SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_draft.py"
EOS = 9
TEMPLATE = (
    "{% if mood %}w{{ mood }} {% endif %}{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.content }} w1 {% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "w40"}}]
OPTIONS = {"mood": 33, "tools": TOOLS}
PROMPTS = [Prompt([{"role": "user", "content": f"w{10 + i} w{20 + i}"}], None, i, ("w50",)) for i in range(3)]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = word_tokenizer(VOCAB, EOS)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    return target, make_draft(target, tap_ids=[0, 2, 3], steps=20)


def test_decoded_prompts_have_the_options(pair, tokenizer):
    """Follow-up turns too; and the numbers are those of the same words without options."""
    settings = DecodingSettings(max_new_tokens=8, turns=2, batch_size=2)
    runs = decode_prompts(*pair, tokenizer, PROMPTS, settings, progress=False, template_kwargs=OPTIONS).runs
    first = {run.prompt.id: run.prompt_token_ids for run in runs if run.turn == 0}
    assert first == {i: [33, 40, 10 + i, 20 + i, 1] for i in range(3)}
    assert all(run.prompt_token_ids[:2] == [33, 40] for run in runs) and len(runs) == 6

    spelled = [Prompt([{"role": "user", "content": f"w33 w40 w{10 + i} w{20 + i}"}], None, i) for i in range(3)]
    how = {"max_new_tokens": 8, "progress": False}
    found = measure_acceptance(*pair, tokenizer, PROMPTS, template_kwargs=OPTIONS, **how)
    expected = measure_acceptance(*pair, tokenizer, spelled, **how)
    assert found["accepted_per_position"] == expected["accepted_per_position"]


def test_acceptance_while_training_has_them(tmp_path, tokenizer):
    target, draft = tiny_pair(40)
    args = EagleTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    data = Dataset.from_list(random_chats(4))
    trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=data)
    how = {"every_steps": 1, "max_new_tokens": 8}
    found = AcceptanceLengthCallback(trainer, tokenizer, PROMPTS, template_kwargs=OPTIONS, **how).measure()
    expected = measure_acceptance(
        target, draft.eval(), tokenizer, PROMPTS, max_new_tokens=8, progress=False, template_kwargs=OPTIONS
    )
    assert found == expected["acceptance_length"]
    with pytest.raises(ValueError, match="`template_kwargs` holds 'tokenize'"):  # before anything is trained
        AcceptanceLengthCallback(trainer, tokenizer, PROMPTS, template_kwargs={"tokenize": True}, **how)


def test_the_script_has_them(tmp_path, pair, tokenizer):
    target, draft = pair
    target.model.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    draft.save_pretrained(tmp_path / "draft")
    records = [{"messages": prompt.messages, "id": prompt.id} for prompt in PROMPTS]
    records.append({"prompt": "w5", "tools": [{"name": "w41"}], "id": 3})  # has tools of its own
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    options = ["--target=target", "--draft=draft", "--prompts=prompts.jsonl", "--output_json=found.json"]
    options += ["--output_tokens=tokens.json", "--max_new_tokens=4", "--device=cpu"]
    options += ['--chat_template_kwargs={"mood": 33}', "--tools=tools.json", "--sweep_tokens=1"]
    done = warm_python().run(SCRIPT, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    decoded = {entry["id"]: entry["prompt_token_ids"] for entry in json.loads((tmp_path / "tokens.json").read_text())}
    assert decoded == {i: [33, 40, 10 + i, 20 + i, 1] for i in range(3)} | {3: [33, 41, 5, 1]}
    assert json.loads((tmp_path / "found.json").read_text())["template_kwargs"] == OPTIONS
