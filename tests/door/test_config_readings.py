"""What a config.json says of a target without saying it."""

import pytest
from transformers import LlamaConfig

from hf_eagle.door.config_readings import scales_embeddings


@pytest.mark.parametrize(
    ("model_type", "factors", "told"),
    [
        ("gemma2", {}, True),
        ("granite", {"embedding_multiplier": 12.0}, True),
        ("granite", {"embedding_multiplier": 1.0}, False),
        ("minicpm", {"scale_emb": 12}, True),
        ("llama", {}, False),
    ],
)
def test_targets_that_scale_their_embeddings(model_type, factors, told):
    config = LlamaConfig()
    vars(config).update(factors)
    config.model_type = model_type
    assert scales_embeddings(config) == told
