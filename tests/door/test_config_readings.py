"""What a config.json leaves out is what transformers' own config classes fill in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen3Config

from hf_eagle.door.config_readings import (
    FULL,
    SECOND_DEFAULTS,
    SECOND_THETA,
    head_width,
    kv_heads,
    named,
    scales_embeddings,
    shown_dspark,
    slides_by_default,
)


CLASSES = {"qwen3": Qwen3Config, "llama": LlamaConfig}


def test_the_defaults_of_transformers_own_form_are_its_config_classs():
    pytest.importorskip("transformers.models.muse_glimmer_assistant")
    from transformers import MuseGlimmerAssistantConfig

    read = MuseGlimmerAssistantConfig()
    found = {name: getattr(read, name) for name in SECOND_DEFAULTS}
    assert found == SECOND_DEFAULTS | {"layer_types": SECOND_DEFAULTS["layer_types"] * read.num_hidden_layers}
    assert read.rope_parameters["rope_theta"] == SECOND_THETA
    own = {"model_type": read.model_type, "hidden_size": 64, "num_attention_heads": 4}
    assert (kv_heads(own), head_width(own)) == (read.num_key_value_heads, read.head_dim)


@given(
    model_type=st.sampled_from(sorted(CLASSES)),
    written=st.fixed_dictionaries(
        {"num_attention_heads": st.sampled_from([2, 4, 64]), "hidden_size": st.sampled_from([64, 128])},
        optional={"head_dim": st.sampled_from([8, 12]), "num_key_value_heads": st.sampled_from([None, 1, 2])},
    ),
)
def test_sizes_of_heads_are_those_of_the_named_class(model_type, written):
    read = CLASSES[model_type](**written)
    config = written | {"model_type": model_type}
    assert (kv_heads(config), head_width(config)) == (read.num_key_value_heads, read.head_dim)


@given(
    layers=st.integers(1, 3),
    written=st.fixed_dictionaries(
        {},
        optional={
            "use_sliding_window": st.booleans(),
            "sliding_window": st.sampled_from([None, 16]),
            "max_window_layers": st.integers(0, 3),
            "layer_types": st.none(),
        },
    ),
)
def test_windows_of_the_class_are_told(layers, written):
    read = Qwen3Config(num_hidden_layers=layers, **written)
    assert slides_by_default(written, layers) == (read.layer_types != [FULL] * layers)


def test_fields_in_both_places():
    assert named({"block_size": 4, "dflash_config": {"block_size": 8}}, "block_size") == 8
    assert named({"block_size": 4, "dflash_config": {}}, "block_size") == 4
    assert named({"block_size": 4, "dflash_config": None}, "block_size") == 4
    assert named({}, "block_size") is None


@pytest.mark.parametrize(
    ("config", "names", "sign"),
    [
        ({"architectures": ["A", "Qwen3DSparkModel"]}, [], "`architectures` ['Qwen3DSparkModel']"),
        ({"markov_rank": 0}, [], "`markov_rank`"),
        ({}, ["fc.weight", "markov_head.markov_w1.weight"], "`markov_head.markov_w1.weight`"),
        ({"architectures": ["DFlashDraftModel"]}, ["fc.weight"], None),
        ({"architectures": None}, [], None),
    ],
)
def test_dspark_is_told_by_its_sign(config, names, sign):
    said = shown_dspark(config, names)
    assert said is None if sign is None else said.startswith(f"{sign} shows a DSpark draft")


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
