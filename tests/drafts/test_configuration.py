"""`config.json` of a draft: exactly what both servers read, and errors at the door."""

import json

import pytest
from transformers import LlamaConfig

from hf_eagle import EagleConfig


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 100000.0},
    "linear": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def target_config(**fields):
    defaults = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 30,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": ROPES["default"],
    }
    return LlamaConfig(**{**defaults, **fields})


def written(config, tmp_path):
    config.save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


def test_every_field_of_the_contract_is_written(tmp_path):
    config = EagleConfig.from_target(target_config(), draft_vocab_size=100)
    config.use_cache = False  # the trainer does this
    found = written(config, tmp_path)
    wanted = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": 1000,
        "draft_vocab_size": 100,
        "hidden_size": 64,
        "target_hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
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
        "num_aux_hidden_states": 3,
        "eagle_aux_hidden_state_layer_ids": [2, 15, 27],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 14, 26]},
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    assert {name: found.get(name, "absent") for name in wanted} == wanted
    assert "use_cache" not in found


@pytest.mark.parametrize("rope", ROPES)
def test_rope_is_written_in_both_spellings_and_read_back(rope, tmp_path):
    parameters = ROPES[rope]
    config = EagleConfig.from_target(target_config(rope_parameters=dict(parameters)))
    found = written(config, tmp_path)
    assert found["rope_parameters"] == parameters
    assert found["rope_theta"] == parameters["rope_theta"]
    scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
    assert found["rope_scaling"] == (None if rope == "default" else scaling)
    assert EagleConfig.from_pretrained(tmp_path).rope_parameters == parameters


def test_config_round_trips(tmp_path):
    config = EagleConfig.from_target(
        target_config(), draft_vocab_size=64, tap_ids=[1, 7, 20, 30], fc_norm=True, norm_output=True
    )
    config.save_pretrained(tmp_path / "a")
    again = EagleConfig.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    assert again.tap_ids == [1, 7, 20, 30] and again.num_taps == 4 and again.fc_norm and again.norm_output
    # a reader that knows nothing of EAGLE gets the same base
    assert LlamaConfig.from_pretrained(tmp_path / "a").rope_parameters["rope_theta"] == 100000.0


def test_defaults_need_no_argument():
    assert EagleConfig().draft_vocab_size == EagleConfig().vocab_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draft_vocab_size": 1001}, "`draft_vocab_size` must be between 1 and the target's vocabulary size 1000"),
        ({"draft_vocab_size": 0}, "`draft_vocab_size` must be between 1"),
        ({"tap_ids": [2, 15, 31]}, r"`tap_ids` must be entry ids between 0 and 30 .* got \[2, 15, 31\]"),
        ({"tap_ids": [-1, 15, 27]}, "`tap_ids` must be entry ids between 0 and 30"),
        ({"tap_ids": []}, "`tap_ids` must be entry ids"),
        ({"tap_ids": [15, 2, 27]}, r"`tap_ids` must be ascending and unique .* use \[2, 15, 27\]"),
        ({"tap_ids": [2, 2, 27]}, "ascending and unique"),
        ({"num_hidden_layers": 30}, "`num_hidden_layers` of an EAGLE-3 draft must be 1, got 30"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings` of an EAGLE-3 draft must be False"),
        ({"attention_bias": True}, "`attention_bias`"),
        ({"norm_before_residual": True}, "`norm_before_residual`"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message):
        EagleConfig.from_target(target_config(), **fields)


def test_a_shallow_target_is_told_which_taps_would_do():
    with pytest.raises(ValueError, match=r"at least 7 layers, this one has 4: pass `tap_ids`, for example 0,2,4"):
        EagleConfig.from_target(target_config(num_hidden_layers=4))
    assert EagleConfig.from_target(target_config(num_hidden_layers=4), tap_ids=[0, 2, 4]).tap_ids == [0, 2, 4]
