"""`--min_pixels`, `--max_pixels`, `--fps`, `--max_frames` of a run: in the processor of its target, or refused."""

import pytest
from tiny_vision import tiny_vision_model, write_processor
from transformers import LlamaConfig

from hf_eagle.arguments.groups import DataArguments, TargetArguments
from hf_eagle.training.target_of_run import processor_of


LIMITS = {"min_pixels": 128, "max_pixels": 512}


def test_the_processor_of_a_run_has_the_data_s_limits(tmp_path):
    tiny_vision_model("qwen3-vl").config.save_pretrained(tmp_path)
    write_processor(tmp_path)
    target, data = TargetArguments(target=str(tmp_path)), [DataArguments(train_data=["x"], **x) for x in ({}, LIMITS)]
    own, limited = (processor_of(target, given).image_processor.size for given in data)
    assert (limited["shortest_edge"], limited["longest_edge"]) == (128, 512)
    assert own["longest_edge"] not in (None, 512)


@pytest.mark.parametrize(("name", "value"), [*LIMITS.items(), ("fps", 2.0), ("max_frames", 4)])
def test_a_target_of_text_has_none(name, value, tmp_path):
    LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1).save_pretrained(tmp_path)
    target = TargetArguments(target=str(tmp_path))
    assert processor_of(target, DataArguments(train_data=["x"])) is None
    with pytest.raises(ValueError, match=f"`{name}` is for a target that takes images, which .* does not"):
        processor_of(target, DataArguments(train_data=["x"], **{name: value}))
