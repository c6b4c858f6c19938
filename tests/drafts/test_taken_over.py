"""What a draft takes over from its target's config: of every config that transformers knows, or a sentence."""

import re

import pytest
from tiny_blocks import options_of
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
from hf_eagle.arguments.groups import DraftArguments, TargetArguments
from hf_eagle.drafts.dflash.configuration import config_for
from hf_eagle.drafts.eagle1.configuration import Eagle1Config
from hf_eagle.drafts.eagle3.configuration import draft_config
from hf_eagle.drafts.rope import draft_rope
from hf_eagle.targets.config_fields import fields_of_most_layers, has_field, read_field
from hf_eagle.training.parts import config_of_draft


MAKERS = {
    "eagle3": lambda config: draft_config(config, tap_ids=[0, 1]),
    "eagle1": Eagle1Config.from_target,
    "dflash": lambda config: config_for(config, options_of(tap_ids=[1])),
}


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


# DFlash drafts are refused for targets that scale their embeddings, as Gemma does
@pytest.mark.parametrize("method", [name for name in MAKERS if name != "dflash"])
def test_heads_are_those_of_most_layers(method):
    """Gemma 4's heads are wider, and fewer, where attention is global; a draft learns its own."""
    sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    wide = {"global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    config = Gemma4TextConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8, **wide)
    made = MAKERS[method](config)
    assert (made.num_attention_heads, made.num_key_value_heads, made.head_dim) == (4, 2, 8)
    assert has_field(config, "head_dim") and not has_field(config, "kv_lora_rank")
    with pytest.raises(ValueError, match=r"is a gemma4_text, whose layers differ in `head_dim` \(8, 64\): .*another"):
        read_field(config, "head_dim")


@pytest.mark.parametrize(
    ("heads", "widths", "taken"),
    [
        ([4, 4, 8], [16, 16, 8], (4, 16)),
        ([4, 8], [16, 8], (4, 16)),  # the first of equally many
        ([0, 0, 0, 8], [None, None, None, 8], (8, 8)),  # layers without attention
        ([4, 8, 4, 8], 8, (4, 8)),
        ((8, 8, 4), 8, (8, 8)),
        (4, 8, (4, 8)),
        (None, 8, (None, 8)),
    ],
)
def test_values_of_most_layers_belong_together(heads, widths, taken):
    config = RemoteConfig(num_attention_heads=heads, head_dim=widths)
    assert fields_of_most_layers(config, "num_attention_heads", "head_dim") == taken


# (what a mixture's config says, besides a hidden size of 2048, and the width of its draft's MLP)
WIDTHS = {
    "qwen3_5_moe_text": ({}, 8 * 512 + 512),
    "qwen3_next": ({}, 5632),
    "qwen3_moe": ({}, 6144),
    "minimax_m2": ({"hidden_size": 3072}, 8 * 1536),  # names an expert's width as that of all
    "mixtral": ({"hidden_size": 4096}, 14336),
    "deepseek_v3": ({"hidden_size": 7168}, 18432),
    "llama4_text": ({"hidden_size": 5120}, 16384),
    "gpt_oss": ({"hidden_size": 2880}, 17280),
}
BARE = {"hidden_size": 2048, "intermediate_size": None}
REMOTE = [
    ({"num_experts_per_tok": 4, "moe_intermediate_size": 512}, 2048),
    ({"num_experts_per_tok": 4, "moe_intermediate_size": 512, "n_shared_experts": 2}, 3072),
    ({"top_k_experts": 2, "moe_intermediate_size": [512, 512, 512], "shared_expert_intermediate_size": 64}, 1088),
    ({"num_experts_per_tok": 6, "intermediate_size": 1024}, 6144),
    ({"num_experts_per_tok": 6, "intermediate_size": 2048}, 2048),  # not below the hidden size: taken for dense
    ({"intermediate_size": 512}, 512),  # no mixture
]


@pytest.mark.parametrize("method", MAKERS)
def test_a_mixture_gives_the_width_of_all_experts_that_a_token_goes_through(method):
    for model_type, (fields, width) in WIDTHS.items():
        config = AutoConfig.for_model(model_type, **fields)
        assert MAKERS[method](config).intermediate_size == width, model_type
    for fields, width in REMOTE:
        assert MAKERS[method](RemoteConfig(**{**SMALL, **BARE, **fields})).intermediate_size == width, fields


@pytest.mark.parametrize("method", MAKERS)
def test_a_width_that_nobody_names_is_asked_for_and_one_that_is_given_is_taken(method):
    with pytest.raises(ValueError, match="names no `intermediate_size`, .*: set `draft_intermediate_size`"):
        MAKERS[method](RemoteConfig(**{**SMALL, **BARE}))
    arguments = DraftArguments(method=method, draft_intermediate_size=96)
    for target in (RemoteConfig(**{**SMALL, **BARE}), LlamaConfig(**SMALL)):
        made = config_of_draft(target, TargetArguments(target="nobody", tap_ids=[1, 2]), arguments)
        assert made.intermediate_size == 96


def test_layers_that_agree_are_one():
    """Gemma 3n names a width for each layer."""
    widths = [48] * 4
    config = Gemma3nTextConfig(hidden_size=32, num_hidden_layers=4, num_kv_shared_layers=0, intermediate_size=widths)
    assert EagleConfig.from_target(config, tap_ids=[1]).intermediate_size == 48
    config.intermediate_size = [48, 48, 64, 64]
    with pytest.raises(ValueError, match=r"`intermediate_size` \(48, 64\): .* set `draft_intermediate_size`"):
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
