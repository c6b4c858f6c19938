"""A DFlash draft's config.json that leaves fields out is read as its readers' own config classes read it."""

import pytest
import torch
from foreign_folders import BLOCK, HEADS, HIDDEN, INNER, KV_HEADS, MASK, block_config, random_blocks, write, zlab_blocks
from transformers import AutoConfig, AutoModel, LlamaConfig, Qwen3Config

from hf_eagle.door.config_readings import head_width, kv_heads
from hf_eagle.foreign.convert import from_foreign
from hf_eagle.serving.draft_folder import DraftFolder
from hf_eagle.serving.kinds import dflash_fields


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
READ = (*SIZES, "head_dim", "rms_norm_eps", "block_size", "mask_token_id", "target_layer_ids")


# ---- transformers' form ----


@pytest.fixture(scope="module")
def deep_target(tmp_path_factory):
    """The config of a target that transformers' defaults fit, except for its hidden size."""
    folder = tmp_path_factory.mktemp("deep")
    LlamaConfig(
        vocab_size=201819,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=52,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-3,
    ).save_pretrained(folder)
    return folder


def second(**changes):
    """A config of transformers' form, all of whose fields differ from the defaults; `...` leaves one out."""
    config = {
        "model_type": "muse_glimmer_assistant",
        "architectures": ["MuseGlimmerAssistantModel"],
        **dict(zip(SIZES, (HIDDEN, INNER, 2, HEADS, KV_HEADS), strict=True)),
        "head_dim": 12,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 30000.0},
        "layer_types": ["full_attention"] * 2,
        "block_size": BLOCK,
        "mask_token_id": MASK,
        "target_layer_ids": [1, 3, 6],
    }
    config = {name: value for name, value in {**config, **changes}.items() if value is not ...}
    if "num_hidden_layers" not in config and "layer_types" in config:
        config["layer_types"] = ["full_attention"] * 5
    return config


def written_and_read(config, folder):
    """The folder with the tensors that transformers' model has for it, and the config that transformers reads."""
    write(folder, config, {})
    read = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModel.from_config(read).state_dict().items()}
    return write(folder, config, {name: torch.ones(shape) for name, shape in shapes.items()}), read


ROPES = [
    {"rope_parameters": ...},
    {"rope_parameters": None},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": ..., "rope_theta": 20000.0},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 20000.0},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
]


@pytest.mark.parametrize(
    "changes",
    [*({name: ...} for name in READ if name != "hidden_size"), *ROPES, {"target_layer_ids": None}],
    ids=str,
)
def test_what_a_config_leaves_out_is_what_transformers_fills_in(changes, deep_target, tmp_path):
    pytest.importorskip("transformers.models.muse_glimmer_assistant")
    folder, read = written_and_read(second(**changes), tmp_path)
    own = from_foreign(folder, deep_target).config
    assert {name: getattr(own, name) for name in READ} == {name: getattr(read, name) for name in READ}
    assert dict(own.rope_parameters) == dict(read.rope_parameters)


@pytest.mark.parametrize(("name", "value"), [("hidden_size", ...), ("layer_types", ...), ("layer_types", None)])
def test_a_default_that_our_drafts_cannot_have_is_refused_by_name(name, value, deep_target, tmp_path):
    """6656 is not the target's width, and all layers slide."""
    config = second(**{name: value})
    write(tmp_path, config, random_blocks(2, 12))
    with pytest.raises(ValueError, match=f"`{name}` of this draft"):
        from_foreign(tmp_path, deep_target, form="transformers")


# ---- sizes of heads ----

CLASSES = {"qwen3": Qwen3Config, "llama": LlamaConfig}


def tensors_of(heads, keys, width):
    """One layer with these heads."""
    shapes = {"q_proj": (heads * width, HIDDEN), "k_proj": (keys * width, HIDDEN), "v_proj": (keys * width, HIDDEN)}
    shapes |= {"o_proj": (HIDDEN, heads * width), "q_norm": (width,), "k_norm": (width,)}
    return random_blocks() | {f"layers.0.self_attn.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("nested", [False, True], ids=["zlab", "speculators"])
@pytest.mark.parametrize("absent", [("head_dim",), ("num_key_value_heads",), ("head_dim", "num_key_value_heads")])
def test_sizes_of_heads_are_those_of_the_named_class(model_type, nested, absent, target_folder, embedding, tmp_path):
    heads = 64 if model_type == "qwen3" else HEADS
    config = block_config(len(embedding), num_attention_heads=heads) | {"model_type": model_type}
    config = {name: value for name, value in config.items() if name not in absent}
    read = CLASSES[model_type](**config)
    sizes = read.num_key_value_heads, read.head_dim
    assert (kv_heads(config), head_width(config)) == sizes

    block = {"block_size": BLOCK, "mask_token_id": MASK}
    if nested:
        own = {"model_type": "speculator_model", "aux_hidden_state_layer_ids": [2, 4, 7], **block}
        del config["block_size"], config["architectures"]
        config = {"speculators_model_type": "dflash", "transformer_layer_config": config, **own}
    else:
        config["dflash_config"] = {"mask_token_id": MASK, "target_layer_ids": [1, 3, 6]}
    imported = from_foreign(write(tmp_path, config, tensors_of(heads, *sizes)), target_folder).config
    assert (imported.num_key_value_heads, imported.head_dim) == sizes


# ---- drafts of the other kind ----

SIGNS = {
    "a class": ({"architectures": ["Qwen3DSparkModel"]}, ()),
    "a rank": ({"markov_rank": 0}, ()),
    "a head": ({}, ("markov_head.markov_w1.weight",)),
    "a head of a whole model": ({}, ("model.markov_head.markov_w1.weight",)),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_import_and_check_tell_the_same_drafts_for_dspark(sign, target_folder, embedding, tmp_path):
    changes, names = SIGNS[sign]
    config, tensors = zlab_blocks(embedding)
    write(tmp_path, config | changes, tensors | {name: torch.ones(len(embedding), 1) for name in names})
    with pytest.raises(ValueError, match="DSpark"):
        from_foreign(tmp_path, target_folder)
    (found,) = dflash_fields.other_kind(DraftFolder.read(tmp_path))
    assert "DSpark" in found.text
