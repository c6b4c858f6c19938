"""Prompts with images for targets of other forms than Qwen-VL's: what a batch of them holds."""

import pytest
import torch
from tiny_pictures import NAMES, PROMPTS, any_processor, pictured

from hf_eagle.evaluation.prompt_batches import PromptBatch
from hf_eagle.evaluation.prompts import Prompt


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_the_processors(name):
    """Several prompts, of which one has no image, padded on the left, and each alone."""
    processor = any_processor(name)
    prompts = [Prompt(messages, None, number) for number, messages in enumerate(PROMPTS)]
    for asked in (prompts, prompts[:1]):
        found = PromptBatch.of(asked, processor)
        wanted = pictured(processor, PROMPTS[: len(asked)], "left", add_generation_prompt=True)
        assert set(found.inputs) == set(wanted)
        for key, x in wanted.items():
            assert torch.equal(found.inputs[key], torch.as_tensor(x)), key

        rows = zip(wanted["input_ids"], wanted["attention_mask"].bool(), strict=True)
        assert found.token_ids == [ids[seen].tolist() for ids, seen in rows]
