"""The folder of an EAGLE-1 draft: what the servers read, exact names and shapes, and refusal of anything else."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint_folder import damage
from test_configuration import ROPES, target_config
from tiny import tiny_eagle1_pair, tiny_llama, tiny_pair
from transformers import AutoConfig

from hf_eagle import Eagle1Config, FrozenTarget, LlamaForCausalLMEagle, LlamaForCausalLMEagle3, load_draft


# contract section 5, written out for hidden 32, 4 heads of 8, 2 KV heads, MLP 48
NAMES = {
    "fc.weight": [32, 64],
    "fc.bias": [32],
    "layers.0.self_attn.q_proj.weight": [32, 32],
    "layers.0.self_attn.k_proj.weight": [16, 32],
    "layers.0.self_attn.v_proj.weight": [16, 32],
    "layers.0.self_attn.o_proj.weight": [32, 32],
    "layers.0.post_attention_layernorm.weight": [32],
    "layers.0.mlp.gate_proj.weight": [48, 32],
    "layers.0.mlp.up_proj.weight": [48, 32],
    "layers.0.mlp.down_proj.weight": [32, 48],
}


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_exactly_the_contracts(tied, tmp_path):
    _, draft = tiny_eagle1_pair(tiny_llama(tied=tied))
    draft.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == NAMES
    assert not tensors["fc.bias"].any()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    draft.save_pretrained(tmp_path)  # transformers puts the name of the class it saves into the config
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle", "EagleLlamaForCausalLM"]
    assert config["dtype"] == "float32" and "use_cache" not in config


@pytest.mark.parametrize("tied", [False, True])
def test_reading_back_is_bit_equal_and_shares_the_targets_memory(tied, tmp_path):
    target, draft = tiny_eagle1_pair(tiny_llama(tied=tied))
    draft.save_pretrained(tmp_path)
    again = load_draft(tmp_path, target)
    assert type(again) is LlamaForCausalLMEagle
    wanted = draft.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert again.embed_tokens.weight.data_ptr() == target.embedding_weight().data_ptr()
    assert again.lm_head.weight.data_ptr() == target.head_weight().data_ptr()
    assert {name for name, p in again.named_parameters() if p.requires_grad} == NAMES.keys() - {"fc.bias"}


def test_a_tied_target_of_another_dtype_is_copied_once(tmp_path):
    target, draft = tiny_eagle1_pair(tiny_llama(tied=True))
    draft.save_pretrained(tmp_path)
    target = FrozenTarget(target.model.to(torch.bfloat16))
    again = load_draft(tmp_path, target, dtype=torch.float32)
    assert again.lm_head.weight.dtype == torch.float32
    assert again.lm_head.weight.data_ptr() == again.embed_tokens.weight.data_ptr()


def test_the_config_is_what_both_servers_read(tmp_path):
    config = Eagle1Config.from_target(target_config())
    config.use_cache = False  # the trainer does this
    config.save_pretrained(tmp_path / "a")
    found = json.loads((tmp_path / "a" / "config.json").read_text())
    assert found.pop("transformers_version")
    assert found == {
        "architectures": ["LlamaForCausalLMEagle", "EagleLlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 1000,
        "draft_vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "num_hidden_layers": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "rope_parameters": ROPES["default"],
        "dtype": "float32",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    again = Eagle1Config.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    assert again.tap_ids == [] and again.draft_vocab_size == 1000
    assert AutoConfig.from_pretrained(tmp_path / "a").rope_parameters == ROPES["default"]  # a reader without EAGLE


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"logit_scale": 0.25}, {"logit_scale": 0.25}),
        ({"logits_scaling": 4.0}, {"logit_scale": 0.25}),
        ({"final_logit_softcapping": 30.0}, {"final_logit_softcapping": 30.0}),
        ({}, {}),
    ],
)
def test_a_logit_transform_is_written_under_the_servers_names(fields, wanted, tmp_path):
    Eagle1Config.from_target(target_config(**fields)).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    assert {name: found[name] for name in names if name in found} == wanted  # never null: vLLM multiplies by it
    assert Eagle1Config.from_pretrained(tmp_path).logit_scale == wanted.get("logit_scale")


def test_a_shallow_target_needs_no_taps():
    assert Eagle1Config.from_target(target_config(num_hidden_layers=2)).num_taps == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draft_vocab_size": 100}, "`draft_vocab_size` of an EAGLE-1 draft must be 1000, got 100"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 15, 27]}, "`eagle_aux_hidden_state_layer_ids` of an EAGLE-1 draft"),
        ({"fc_norm": True}, "`fc_norm` of an EAGLE-1 draft must be False"),
        ({"num_hidden_layers": 2}, "`num_hidden_layers` of an EAGLE-1 draft must be 1"),
        ({"target_hidden_size": 32}, "`target_hidden_size` of an EAGLE-1 draft must be 64, got 32"),
    ],
)
def test_fields_of_eagle3_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Eagle1Config.from_target(target_config(), **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.bias"), "missing: fc.bias"),
        (lambda t: t.pop("layers.0.mlp.up_proj.weight"), "missing: layers.0.mlp.up_proj.weight"),
        (lambda t: t.update({"norm.weight": torch.ones(32)}), "unexpected: norm.weight"),
        (lambda t: t.update({"layers.0.input_layernorm.weight": torch.ones(32)}), "unexpected: layers.0.input_layern"),
        (lambda t: t.update({"lm_head.weight": torch.ones(96, 32)}), "holds `lm_head.weight`, but"),
        (lambda t: t.update({"t2d": torch.ones(96, dtype=torch.bool)}), "unexpected: t2d"),
        (lambda t: t.update({"fc.weight": torch.zeros(32, 32)}), "of another shape: .*fc.weight"),
        (lambda t: t["fc.bias"].add_(1), "`fc.bias` of this draft is not zero: vLLM drops it"),
    ],
)
def test_a_folder_that_is_not_exactly_a_draft_is_refused(change, message, tmp_path):
    _, draft = tiny_eagle1_pair()
    draft.save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_draft(tmp_path)


def test_the_kind_is_read_from_the_folder(tmp_path):
    tiny_pair(40)[1].save_pretrained(tmp_path)
    assert type(load_draft(tmp_path)) is LlamaForCausalLMEagle3


def test_another_targets_head_is_refused():
    _, draft = tiny_eagle1_pair()
    with pytest.raises(ValueError, match=r"head is \(50, 32\) but this draft was made for \(96, 32\)"):
        draft.set_target_head(torch.zeros(50, 32))
