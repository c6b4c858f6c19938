"""How many tokens a target reads, as its config says it."""

import pytest
from transformers import BloomConfig, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen2Config

from hf_eagle.targets.architectures import longest_context


def scaled(kind=Qwen2Config, positions=1000, **rope):
    return kind(max_position_embeddings=positions, rope_parameters={"rope_theta": 1e4, **rope})


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (LlamaConfig(max_position_embeddings=256), 256),
        (GPT2Config(n_positions=64), 64),
        (BloomConfig(), None),  # nothing says so
        (scaled(rope_type="linear", factor=4.0), 4000),
        (scaled(rope_type="dynamic", factor=2.0), 2000),
        # the config counts the scaling in, or it does not
        (scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=1000), 4000),
        (scaled(positions=4000, rope_type="yarn", factor=4.0, original_max_position_embeddings=1000), 4000),
        (
            scaled(LlamaConfig, 131072, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192),
            131072,
        ),
        (
            Gemma3TextConfig(
                max_position_embeddings=1000,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
            8000,
        ),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_a_scaled_target_reads_what_its_scaling_adds(config, tokens):
    assert longest_context(config) == tokens
