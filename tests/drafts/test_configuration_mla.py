"""`config.json` of a draft with latent attention, and for every draft the RoPE that older readers make of it."""

import json

import pytest
import torch
from reference_mla import rotation_frequencies, temperature
from test_configuration import ROPES, target_config, written
from tiny_mla import SIZES, YARN
from transformers import AutoConfig, DeepseekV2Config, DeepseekV3Config, Qwen3Config

from hf_eagle import EagleConfig, EagleMLAConfig, load_draft
from hf_eagle.drafts.build import class_of
from hf_eagle.drafts.eagle1.configuration import Eagle1Config


ROPES = {**ROPES, "yarn": YARN}
KIMI_TEXT = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 30,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "rope_parameters": YARN,
    **SIZES,
}


def test_every_field_of_the_contract_is_written(tmp_path):
    config = EagleMLAConfig.from_target(DeepseekV3Config(**KIMI_TEXT), draft_vocab_size=100, fc_norm=True)
    found = written(config, tmp_path)
    wanted = {
        "architectures": ["Eagle3DeepseekV2ForCausalLM"],
        "model_type": "kimi_k2",
        "vocab_size": 1000,
        "draft_vocab_size": 100,
        "hidden_size": 64,
        "target_hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        **SIZES,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "num_hidden_layers": 1,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 262144,
        "rope_theta": 50000.0,
        "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"},
        "rope_parameters": YARN,
        "rope_interleave": True,
        "dtype": "float32",
        "torch_dtype": "float32",
        "num_aux_hidden_states": 3,
        "eagle_aux_hidden_state_layer_ids": [2, 15, 27],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 14, 26]},
        "fc_norm": True,
        "norm_output": False,
    }
    assert {name: found.get(name, "absent") for name in wanted} == wanted
    # of Llama, and of what SGLang's latent draft does not have
    assert not {"head_dim", "norm_before_residual", "norm_before_fc", "use_cache"} & set(found)


@pytest.mark.parametrize("q_lora_rank", [24, None])
@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_config_round_trips(rope, q_lora_rank, tmp_path):
    config = EagleMLAConfig.from_target(
        DeepseekV3Config(**{**KIMI_TEXT, "rope_parameters": ROPES[rope]}),
        q_lora_rank=q_lora_rank,
        draft_vocab_size=64,
        tap_ids=[2, 7, 20, 30],
        norm_output=True,
    )
    config.save_pretrained(tmp_path / "a")
    again = EagleMLAConfig.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    assert again.q_lora_rank == q_lora_rank and again.rope_parameters == ROPES[rope]
    # as vLLM reads this `model_type`
    theirs = DeepseekV3Config.from_pretrained(tmp_path / "a")
    assert {name: getattr(theirs, name) for name in SIZES} == {**SIZES, "q_lora_rank": q_lora_rank}
    assert theirs.rope_parameters == ROPES[rope] and theirs.head_dim == SIZES["qk_rope_head_dim"]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("config_class", [EagleConfig, EagleMLAConfig, Eagle1Config])
def test_an_older_reader_rotates_as_the_draft_does(rope, config_class, tmp_path):
    """`rope_theta` and `rope_scaling` alone, and a draft's own tables: the target's base for every type of RoPE.

    transformers 4 takes 10000 and no scaling where those fields are missing, whatever `rope_parameters` says.
    """
    fields = {
        EagleConfig: {"draft_vocab_size": 64},
        EagleMLAConfig: {"draft_vocab_size": 64, **SIZES},
        Eagle1Config: {},
    }
    target = target_config(rope_parameters=dict(ROPES[rope]), head_dim=16)
    config = config_class.from_target(target, **fields[config_class])
    found = {"rope_theta": 10000.0, "rope_scaling": None, **written(config, tmp_path)}
    del found["rope_parameters"]
    assert found["rope_theta"] == config.rope_parameters["rope_theta"] == ROPES[rope]["rope_theta"]
    if config_class is EagleMLAConfig and rope in ("linear", "llama3"):  # the servers would run them as YaRN
        assert found["rope_scaling"] is None
    else:
        assert (found["rope_scaling"] or {"rope_type": "default"})["rope_type"] == rope

    dim = 8 if config_class is EagleMLAConfig else 16
    draft = class_of(config.architectures)(config_class.from_pretrained(tmp_path))
    wanted = torch.tensor(rotation_frequencies(found["rope_theta"], dim, found["rope_scaling"]))
    positions = torch.tensor([0, 1, 77])
    cos, sin = draft.cos_sin(torch.zeros(1), positions)
    angles = (positions[:, None] * wanted).repeat(1, 2)
    # in Llama's attention servers read no `mscale`
    size = temperature(YARN, "", 1) if rope == "yarn" and config_class is not EagleMLAConfig else 1.0
    torch.testing.assert_close(cos, angles.cos() * size, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin, angles.sin() * size, rtol=1e-5, atol=1e-5)
    draft.save_pretrained(tmp_path)  # in half precision the angles stay those of float32
    half = load_draft(tmp_path, dtype=torch.bfloat16)
    assert half.fc.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half.cos_sin(torch.zeros(1), positions), (cos, sin))


def test_yarn_without_mscale_stretches_what_is_rotated():
    yarn = {name: x for name, x in YARN.items() if "mscale" not in name}
    config = EagleMLAConfig(rope_parameters=dict(yarn), qk_rope_head_dim=8, hidden_size=64)
    cos, _ = class_of(config.architectures)(config).cos_sin(torch.zeros(1), torch.tensor([0]))
    assert cos.max().item() == pytest.approx(temperature(yarn, "mscale", 1))


@pytest.mark.parametrize("config_class", [EagleConfig, EagleMLAConfig])
@pytest.mark.parametrize(
    ("tap_ids", "deepseek", "llama"),
    [(None, [1, 14, 26], [1, 14, 26]), ([2, 9, 20], [1, 8, 19], [1, 8, 19]), ([3, 9, 20], [3, 9, 20], [2, 8, 19])],
)
def test_sglang_takes_other_ids_beside_a_deepseek_target(config_class, tap_ids, deepseek, llama, tmp_path):
    """There it adds 1 only when the first is 1."""
    for target, wanted in ((DeepseekV3Config(**KIMI_TEXT), deepseek), (target_config(), llama)):
        config_class.from_target(target, tap_ids=tap_ids).save_pretrained(tmp_path)
        found = written(config_class.from_pretrained(tmp_path), tmp_path)
        assert found["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == wanted
        assert found["eagle_aux_hidden_state_layer_ids"] == (tap_ids or [2, 15, 27])
        assert "sglang_counts_entries" not in found


def test_a_first_tap_that_sglang_cannot_be_told_is_named(caplog):
    EagleMLAConfig.from_target(DeepseekV3Config(**KIMI_TEXT), tap_ids=[1, 9, 20])
    assert "begin with 1, which SGLang cannot read for this target" in caplog.text


def test_sizes_are_the_targets_or_deepseeks_or_those_asked_for():
    v2 = DeepseekV2Config(**{**KIMI_TEXT, "q_lora_rank": None, "rope_parameters": None})
    # servers want the bottleneck that this target is without
    assert {name: getattr(EagleMLAConfig.from_target(v2), name) for name in SIZES} == {**SIZES, "q_lora_rank": 1536}
    asked = EagleMLAConfig.from_target(v2, q_lora_rank=7, v_head_dim=6)
    assert (asked.q_lora_rank, asked.v_head_dim, asked.kv_lora_rank) == (7, 6, 20)
    qwen = EagleMLAConfig.from_target(Qwen3Config(hidden_size=4096, num_key_value_heads=8, num_hidden_layers=36))
    assert [getattr(qwen, name) for name in SIZES] == [1536, 512, 128, 64, 128]
    assert (qwen.num_attention_heads, qwen.num_key_value_heads, qwen.rope_parameters["rope_type"]) == (
        32,
        32,
        "default",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_lora_rank": 0}, "`kv_lora_rank` must be at least 1, got 0"),
        ({"q_lora_rank": 0}, "`q_lora_rank` must be at least 1"),
        ({"qk_rope_head_dim": 7}, "`qk_rope_head_dim` must be even"),
        ({"rope_parameters": dict(ROPES["llama3"])}, "must be of type default or yarn, got 'llama3'"),
        ({"rope_parameters": {**YARN, "attention_factor": 1.0}}, "`attention_factor` = 1.0, which the servers do not"),
        ({"rope_parameters": {k: v for k, v in YARN.items() if k != "mscale"}}, "both `mscale` and `mscale_all_dim`"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 8, 8]}},
            r"`mrope_section` is \[16, 8, 8\], but a draft with latent attention is rotated in 1d only: leave it out",
        ),
        ({"draft_vocab_size": 1001}, "`draft_vocab_size` must be between 1"),
        ({"num_hidden_layers": 2}, "`num_hidden_layers` of an EAGLE-3 draft must be 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message):
        EagleMLAConfig.from_target(target_config(), **fields)


def test_the_written_file_is_plain_json(tmp_path):
    written(EagleMLAConfig.from_target(target_config()), tmp_path)
    assert "NaN" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["q_lora_rank"] == 1536


def test_plain_auto_config_does_not_know_the_type_that_servers_need(tmp_path):
    """Which the README says: our own class reads the folder, and the servers have the type in tables of their own."""
    EagleMLAConfig(hidden_size=64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type `kimi_k2` but Transformers does not recognize"):
        AutoConfig.from_pretrained(tmp_path)
    assert EagleMLAConfig.from_pretrained(tmp_path).model_type == "kimi_k2"
