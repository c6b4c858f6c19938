"""Decoding behind images in other forms than Qwen-VL's: the model's own greedy answers, alone and in batches."""

import pytest
import torch
from oracle_draft import OracleDraft
from tiny_pictures import NAMES, PROMPTS, any_processor, pictured, tiny_pictures_model

from hf_eagle.decoding import speculative_generate
from hf_eagle.decoding.generate import target_generate
from hf_eagle.decoding.target_run import why_alone
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle3.configuration import draft_config
from hf_eagle.targets.target import FrozenTarget


TAPS, NEW = [2, 4, 5], 10


def prompts(processor, conversations):
    return pictured(processor, conversations, "left", add_generation_prompt=True)


def greedy(target, inputs) -> list[int]:
    """What the model's own `generate` answers."""
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    return target.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_the_models_own(name):
    """By drafts that are right and wrong in turn, and by a fresh EAGLE-3 draft that reads the images' taps."""
    target, processor = FrozenTarget(tiny_pictures_model(name), TAPS), any_processor(name)
    torch.manual_seed(1)
    fresh = new_draft(draft_config(target.config, tap_ids=TAPS), target.embedding_weight())
    wanted, whole = [], []

    for messages in PROMPTS:
        inputs = prompts(processor, [messages])
        wanted.append(greedy(target, inputs))
        whole.append(inputs["input_ids"][0].tolist() + wanted[-1])
        for draft in (OracleDraft(target, whole[-1:]), fresh.eval()):
            out = speculative_generate(target, draft, **inputs, max_new_tokens=NEW, num_speculative_tokens=3)
            assert out.answers == wanted[-1:]
        assert target_generate(target, **inputs, max_new_tokens=NEW) == wanted[-1:]

    if why_alone(target) is None:
        inputs = prompts(processor, PROMPTS)
        assert (inputs["attention_mask"] == 0).any()
        out = speculative_generate(
            target, OracleDraft(target, whole), **inputs, max_new_tokens=NEW, num_speculative_tokens=3
        )
        assert out.answers == wanted


def test_only_chunks_of_attention_are_decoded_alone():
    alone = [name for name in NAMES if why_alone(FrozenTarget(tiny_pictures_model(name), TAPS)) is not None]
    assert alone == ["llama4"]


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_images_matter_and_types_fit_the_prompt(name):
    target, processor = FrozenTarget(tiny_pictures_model(name), TAPS), any_processor(name)
    inputs = prompts(processor, PROMPTS[:1])
    answers = target_generate(target, **inputs, max_new_tokens=NEW)
    other = inputs | {"pixel_values": 3 * inputs["pixel_values"].flip(0)}
    assert target_generate(target, **other, max_new_tokens=NEW) != answers

    with pytest.raises(ValueError, match="`token_type_ids` (has shape|, which the forward of Mistral3)"):
        target_generate(target, **inputs | {"token_type_ids": torch.zeros(1, 2)}, max_new_tokens=2)
