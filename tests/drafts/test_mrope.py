"""Drafts with three positions a token, beside transformers' own rotary embeddings."""

import json

import pytest
import torch
from tiny_vision import NAMES, tiny_vision_model
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from hf_eagle.drafts.build import load_draft
from hf_eagle.drafts.eagle3.configuration import EagleConfig, draft_config
from hf_eagle.drafts.eagle3.modeling import LlamaForCausalLMEagle3
from hf_eagle.drafts.mrope import EagleMRotaryEmbedding, axes_of_pairs


SIZES = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128}
QWEN3 = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
QWEN25 = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "module"),
    [
        (Qwen3VLTextConfig(**SIZES, rope_parameters=QWEN3), Qwen3VLTextRotaryEmbedding),
        (Qwen2_5_VLTextConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, rope_parameters=QWEN25), None),
    ],
)
def test_rotation_is_transformers_own_bit_for_bit(config, module, dtype):
    positions = torch.randint(0, 100_000, (3, 2, 500))
    like = torch.zeros(1, dtype=dtype)
    theirs = (module or Qwen2_5_VLRotaryEmbedding)(config)(like, positions)
    if module is None and theirs[0].dim() == 4:  # split by axes where it is applied
        pytest.fail("transformers mixes the axes elsewhere now")
    ours = EagleMRotaryEmbedding(EagleConfig.from_target(config, tap_ids=[4, 18, 29], rope="mrope"))(like, positions)
    assert ours[0].dtype == dtype
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_axes():
    assert axes_of_pairs([3, 3, 2], True) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert axes_of_pairs([4, 2, 2], True) == [0, 1, 2, 0, 1, 2, 0, 0]
    assert axes_of_pairs([1, 1, 2], False) == [0, 1, 2, 2]


def test_text_is_rotated_as_by_plain_rope():
    config = tiny_vision_model().config
    one, three = (LlamaForCausalLMEagle3(EagleConfig.from_target(config, rope=kind)) for kind in ("1d", "mrope"))
    positions, like = torch.tensor([[0, 5, 90], [3, 4, 5]]), torch.zeros(1)
    for a, b in zip(one.cos_sin(like, positions), three.cos_sin(like, three.on_axes(positions)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="three positions a token, but this draft has plain RoPE"):
        one.on_axes(positions.expand(3, -1, -1))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_for_servers(name, tmp_path):
    """Both spellings; plain RoPE says nothing of axes, and so servers give a token one position."""
    config = tiny_vision_model(name).config
    for kind in ("1d", "mrope"):
        draft = LlamaForCausalLMEagle3(EagleConfig.from_target(config, rope=kind))
        draft.save_pretrained(tmp_path / kind)
        written = json.loads((tmp_path / kind / "config.json").read_text())
        assert written["rope_theta"] == config.text_config.rope_parameters["rope_theta"]
        if kind == "1d":
            assert written["rope_scaling"] is None and set(written["rope_parameters"]) == {"rope_type", "rope_theta"}
            continue
        section = config.text_config.rope_parameters["mrope_section"]
        wanted = {"rope_type": "default", "mrope_section": section, "mrope_interleaved": "3" in name}
        assert written["rope_scaling"] == wanted
        assert written["rope_parameters"] == {**wanted, "rope_theta": written["rope_theta"]}
        again = load_draft(tmp_path / kind)
        assert again.config.mrope_section == section
        positions = torch.randint(0, 99, (3, 1, 7))
        for a, b in zip(
            again.cos_sin(again.fc.weight, positions), draft.cos_sin(draft.fc.weight, positions), strict=True
        ):
            assert torch.equal(a, b)


def test_what_is_refused():
    config = tiny_vision_model().config
    with pytest.raises(ValueError, match="`draft_rope` is mrope, but the draft has latent attention"):
        draft_config(config, "mla", rope="mrope")
    with pytest.raises(ValueError, match="`draft_rope` must be one of 1d, mrope, got '2d'"):
        draft_config(config, rope="2d")
    with pytest.raises(ValueError, match=r"`mrope_section` \[3, 3, 2\] of a draft must add up to half of .* 32"):
        EagleConfig.from_target(config, rope="mrope", head_dim=32)
    from tiny import tiny_llama

    with pytest.raises(ValueError, match="`draft_rope` is mrope, but the target counts all tokens alike"):
        draft_config(tiny_llama().config, rope="mrope")
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}
    with pytest.raises(ValueError, match="`draft_rope` is mrope, but the target rotates a part of each head"):
        draft_config(Qwen3_5TextConfig(rope_parameters=rope), rope="mrope")
