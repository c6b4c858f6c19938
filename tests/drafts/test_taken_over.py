"""What a draft takes over from its target's config: of every config that transformers knows, or a sentence."""

import re

import pytest
from tiny_families import SMALL
from transformers import (
    AutoConfig,
    Cohere2MoeConfig,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from hf_eagle import EagleConfig
from hf_eagle.drafts.eagle1.configuration import Eagle1Config
from hf_eagle.drafts.eagle3.configuration import draft_config
from hf_eagle.drafts.rope import draft_rope
from hf_eagle.targets.config_fields import has_field, read_field


MAKERS = {"eagle3": lambda config: draft_config(config, tap_ids=[0, 1]), "eagle1": Eagle1Config.from_target}


def config_of(model_type):
    """A config as it is by default; `None` where the type has none, or none of texts alone."""
    try:
        config = AutoConfig.for_model(model_type)
        config.get_text_config()
        return config
    except Exception:  # transformers' own complaints of its defaults are of many types
        return None


@pytest.mark.parametrize("method", MAKERS)
def test_every_config_gives_a_draft_or_a_sentence(method):
    made, refused = 0, {}
    for model_type in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}):
        config = config_of(model_type)
        if config is None:
            continue
        try:
            MAKERS[method](config)
            made += 1
        except ValueError as problem:
            refused[model_type] = str(problem)
    assert made > 150
    for model_type, said in refused.items():
        assert "\n" not in said and re.search("`[a-z_]+`", said), (model_type, said)


@pytest.mark.parametrize("method", MAKERS)
def test_layers_that_differ_are_named(method):
    """Gemma 4's heads are wider where attention is global."""
    sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = Gemma4TextConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=r"is a gemma4_text, whose layers differ in `head_dim` \(8, 512\): .*another"):
        MAKERS[method](config)
    assert has_field(config, "head_dim") and not has_field(config, "kv_lora_rank")


def test_layers_that_agree_are_one():
    """Gemma 3n names a width for each layer."""
    widths = [48] * 4
    config = Gemma3nTextConfig(hidden_size=32, num_hidden_layers=4, num_kv_shared_layers=0, intermediate_size=widths)
    assert EagleConfig.from_target(config, tap_ids=[1]).intermediate_size == 48
    config.intermediate_size = [48, 48, 64, 64]
    with pytest.raises(ValueError, match=r"layers differ in `intermediate_size` \(48, 64\)"):
        EagleConfig.from_target(config, tap_ids=[1])


class RemoteConfig(PreTrainedConfig):
    """As code of the Hub writes them: no field has a type or a default."""

    model_type = "remote"


def test_what_is_null_has_a_default_or_is_named():
    assert EagleConfig.from_target(Cohere2MoeConfig(), tap_ids=[1]).rms_norm_eps == 1e-5
    nothing = dict.fromkeys(("rms_norm_eps", "initializer_range", "num_key_value_heads", "head_dim"))
    made = EagleConfig.from_target(RemoteConfig(**{**SMALL, **nothing}))
    assert (made.rms_norm_eps, made.initializer_range, made.num_key_value_heads, made.head_dim) == (1e-5, 0.02, 4, 8)
    assert EagleConfig.from_target(RemoteConfig(**{**SMALL, "rms_norm_eps": 1e-6})).rms_norm_eps == 1e-6
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings"):
        for lacking in ({**SMALL, name: None}, {field: SMALL[field] for field in SMALL if field != name}):
            with pytest.raises(ValueError, match=f"is a remote, whose config names no `{name}`"):
                EagleConfig.from_target(RemoteConfig(**lacking))


def test_a_field_is_read_as_it_is():
    config = LlamaConfig(**SMALL)
    assert read_field(config, "hidden_size") == 32 and read_field(config, "nobodys", default=7) == 7
    config.nobodys = 0
    assert read_field(config, "nobodys", default=7) == 0  # a zero is said, `null` is not
    config.nobodys = []
    assert read_field(config, "nobodys", default=7) == 7


@pytest.mark.parametrize(
    ("rope", "base"),
    [
        ({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}, 1e6),
        ({"full_attention": None, "sliding_attention": {"rope_theta": 3e4}}, 3e4),
        ({"main": {"rope_theta": 2e4}, "compress": {"rope_theta": 1e5}}, 2e4),
        ({"rope_theta": 5e5, "rope_type": "default"}, 5e5),
        (None, 1e4),
    ],
)
def test_rope_by_the_type_of_layer_gives_one(rope, base):
    config = LlamaConfig(**SMALL)
    config.rope_parameters = rope
    assert draft_rope(config) == {"rope_type": "default", "rope_theta": base}
