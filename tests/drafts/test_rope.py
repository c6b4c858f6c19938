"""RoPE of a draft: copied where both servers run it as transformers does, plain with the target's base elsewhere."""

import pytest
import torch
from test_configuration import ROPES, target_config
from tiny_families import CONFIGS, GLOBAL, tiny_family
from tiny_mla import YARN
from transformers import LlamaConfig, Phi3Config

from hf_eagle import EagleConfig, LlamaForCausalLMEagle3
from hf_eagle.drafts.rope import draft_rope
from hf_eagle.targets.architectures import check_length


POSITIONS = torch.tensor([[0, 1, 17, 60]])


def plain(theta):
    return {"rope_type": "default", "rope_theta": theta}


WITHOUT_MSCALE = {name: x for name, x in YARN.items() if "mscale" not in name}


@pytest.mark.parametrize("rope", [*ROPES.values(), WITHOUT_MSCALE])
@pytest.mark.parametrize("reads_mscale", [False, True])
def test_what_both_servers_run_alike_is_copied(rope, reads_mscale):
    assert draft_rope(target_config(rope_parameters=dict(rope)), reads_mscale=reads_mscale) == rope


def test_what_servers_read_in_latent_attention_alone_is_copied_there_alone(caplog):
    """In Llama's attention they multiply by 0.1 ln(factor) + 1: a draft is trained with that, and the log says so."""
    caplog.set_level("INFO")
    target = target_config(rope_parameters=dict(YARN))
    assert draft_rope(target, reads_mscale=True) == YARN and caplog.text == ""
    assert draft_rope(target) == WITHOUT_MSCALE
    assert "`mscale` 1.0 and `mscale_all_dim` 1.0 are not copied, because servers do not read them" in caplog.text


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "dynamic", "rope_theta": 7e4, "factor": 2.0}, plain(7e4)),
        ({"rope_type": "default", "rope_theta": 7e4, "partial_rotary_factor": 0.5}, plain(7e4)),
        ({"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}, plain(5e6)),
        # SGLang does not read it
        ({**YARN, "attention_factor": 1.3}, WITHOUT_MSCALE),
        # a zero is nothing to transformers and vLLM, and a zero to SGLang
        ({**YARN, "mscale_all_dim": 0.0}, WITHOUT_MSCALE),
        ({**YARN, "truncate": False}, {**WITHOUT_MSCALE, "truncate": False}),
        (None, plain(10000.0)),
    ],
)
def test_what_servers_would_run_otherwise_is_left_out(rope, wanted):
    config = target_config()
    config.rope_parameters = rope
    assert draft_rope(config) == wanted


def test_a_scaling_that_is_left_out_is_named(caplog):
    assert draft_rope(CONFIGS["phi3"]()) == plain(1e4)
    assert "RoPE scaling 'longrope' is not copied" in caplog.text


@pytest.mark.parametrize(
    ("name", "layer_type"),
    [("llama", None), ("qwen3-moe", None), ("gpt-oss", None), ("gemma2", None), ("gemma3", "full_attention")],
)
def test_a_draft_rotates_as_its_target(name, layer_type):
    """The target's own module makes the tables that a draft's are compared with."""
    model = tiny_family(name)
    draft = LlamaForCausalLMEagle3(EagleConfig.from_target(model.config, tap_ids=[2, 4, 5]))
    like = torch.zeros(1, 1)
    rotary = model.get_decoder().rotary_emb
    wanted = rotary(like, POSITIONS) if layer_type is None else rotary(like, POSITIONS, layer_type)
    seen = draft.cos_sin(like, POSITIONS)
    half = seen[0].shape[-1] // 2
    for ours, theirs in zip(seen, wanted, strict=True):  # gpt-oss holds every angle once
        torch.testing.assert_close(ours[..., :half], theirs[..., :half])
    if name == "gemma3":
        assert draft.config.rope_parameters["rope_theta"] == GLOBAL


@pytest.mark.parametrize("name", ["glm", "glm4", "glm4-moe"])
def test_heads_of_a_draft_are_rotated_whole(name):
    model = tiny_family(name)
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.5
    draft = LlamaForCausalLMEagle3(EagleConfig.from_target(model.config, tap_ids=[2, 4, 5]))
    cos, _ = draft.cos_sin(torch.zeros(1), POSITIONS)
    assert cos.shape[-1] == 16 and draft.config.rope_parameters == plain(10000.0)


def test_longrope_beyond_its_first_length_is_refused():
    """There a short sequence is rotated otherwise beside a long one, by transformers as of 5.24."""
    model = tiny_family("phi3")  # 48 tokens, then the other factors
    short = torch.arange(40)[None] + 3
    decoder = model.get_decoder()

    def first_row(longest):
        ids = torch.arange(longest)[None].repeat(2, 1) % 90 + 3
        with torch.no_grad():
            return decoder(ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state[0, :40]

    with torch.no_grad():
        alone = decoder(short, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(first_row(48), alone, rtol=1e-4, atol=1e-4)
    assert not torch.isclose(first_row(49), alone, rtol=1e-2, atol=1e-2).all()

    check_length(model.config, 48)
    with pytest.raises(ValueError, match="`max_length` is 49, but beyond 48 tokens this target rotates every sequence"):
        check_length(model.config, 49)
    check_length(Phi3Config(), 100_000)
    check_length(LlamaConfig(rope_parameters=dict(ROPES["llama3"])), 100_000)
