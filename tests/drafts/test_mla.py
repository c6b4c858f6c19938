"""The draft with latent attention: sizes and names, transformers' own attention, the row-by-row reference, decoding."""

import pytest
import torch
from chain_models import make_draft, make_target, random_prompts
from reference_mla import ReferenceMLADraft
from replayed import replayed
from safetensors.torch import load_file
from test_unroll import STEPS, Wrapped, assert_equal_to_reference, gradients, unroll
from tiny import VOCAB, pad_batch, random_chats, tiny_mapping, unrolled
from tiny_mla import SIZES, YARN, tiny_mla_pair
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, LlamaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from hf_eagle import (
    Eagle3DeepseekV2ForCausalLM,
    EagleConfig,
    EagleMLAConfig,
    FrozenTarget,
    load_draft,
    speculative_generate,
    target_generate,
)
from hf_eagle.drafts import ttt_attention
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle3.configuration import draft_config


QWEN = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 12288, "vocab_size": 151936}
KIMI = {"hidden_size": 7168, "num_attention_heads": 64, "intermediate_size": 18432, "vocab_size": 163840}


@pytest.mark.parametrize(
    ("fields", "count"),
    [(QWEN, 1_493_714_944), ({**QWEN, "draft_vocab_size": 32000}, 1_002_457_088), (KIMI, 3_015_604_224)],
)
def test_parameter_counts(fields, count):
    with torch.device("meta"):
        draft = Eagle3DeepseekV2ForCausalLM(EagleMLAConfig(**fields, eagle_aux_hidden_state_layer_ids=[2, 18, 33]))
    assert sum(p.numel() for p in draft.parameters()) == count


def names_and_shapes(vd: int | None, q_lora_rank: int | None, fc_norm: bool) -> dict:
    """Contract section 4, written out for hidden 32, 4 heads of 8 + 8 and 12, latents of 24 and 20, MLP 48."""
    names = {
        "fc.weight": [32, 96],
        "midlayer.input_layernorm.weight": [32],
        "midlayer.hidden_norm.weight": [32],
        "midlayer.post_attention_layernorm.weight": [32],
        "midlayer.self_attn.kv_a_proj_with_mqa.weight": [28, 64],
        "midlayer.self_attn.kv_a_layernorm.weight": [20],
        "midlayer.self_attn.kv_b_proj.weight": [80, 20],
        "midlayer.self_attn.o_proj.weight": [32, 48],
        "midlayer.mlp.gate_proj.weight": [48, 32],
        "midlayer.mlp.up_proj.weight": [48, 32],
        "midlayer.mlp.down_proj.weight": [32, 48],
        "norm.weight": [32],
        "lm_head.weight": [vd or VOCAB, 32],
    }
    if q_lora_rank is None:
        names["midlayer.self_attn.q_proj.weight"] = [64, 64]
    else:
        names["midlayer.self_attn.q_a_proj.weight"] = [q_lora_rank, 64]
        names["midlayer.self_attn.q_a_layernorm.weight"] = [q_lora_rank]
        names["midlayer.self_attn.q_b_proj.weight"] = [64, q_lora_rank]
    if vd:
        names |= {"d2t": [vd], "t2d": [VOCAB]}
    return names | ({f"fc_norm.{i}.weight": [32] for i in range(3)} if fc_norm else {})


@pytest.mark.parametrize(
    ("vd", "fields"), [(40, {}), (None, {"q_lora_rank": None}), (24, {"fc_norm": True, "norm_output": True})]
)
def test_the_folder_holds_the_contracts_names_and_shapes_and_reads_back(vd, fields, tmp_path):
    target, draft = tiny_mla_pair(vd, **fields)
    draft.save_pretrained(tmp_path)
    found = {name: list(x.shape) for name, x in load_file(tmp_path / "model.safetensors").items()}
    wanted = {"q_lora_rank": 24, "fc_norm": False, **fields}
    assert found == names_and_shapes(vd, wanted["q_lora_rank"], wanted["fc_norm"])
    again = load_draft(tmp_path, target)
    assert type(again) is Eagle3DeepseekV2ForCausalLM
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, draft.state_dict()[name]), name


@pytest.mark.parametrize("rope", [None, YARN, {k: v for k, v in YARN.items() if "mscale" not in k}])
@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_attention_equals_that_of_transformers(rope, q_lora_rank):
    """The same weights in DeepSeek-V3's own attention, with the input twice as wide and nothing behind the heads."""
    fields = {"q_lora_rank": q_lora_rank, "rms_norm_eps": 1e-6} | ({"rope_parameters": dict(rope)} if rope else {})
    _, draft = tiny_mla_pair(**fields)
    config = DeepseekV3Config(
        **{**SIZES, "q_lora_rank": q_lora_rank},
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters=dict(draft.config.rope_parameters),
        attn_implementation="eager",
    )
    theirs = DeepseekV3Attention(config, layer_idx=0)
    ours = draft.midlayer.self_attn
    theirs.o_proj = torch.nn.Identity()
    theirs.load_state_dict({n: w for n, w in ours.state_dict().items() if not n.startswith("o_proj")}, strict=True)
    assert ours.scaling == pytest.approx(theirs.scaling, rel=1e-12)

    x, positions = torch.randn(2, 30, 64), torch.arange(100, 130).expand(2, -1)
    tables = DeepseekV3RotaryEmbedding(config)(x, positions)
    mask = torch.full((30, 30), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        wanted, _ = theirs(hidden_states=x, position_embeddings=tables, attention_mask=mask)
        found = ours.behind_cache(x, draft.cos_sin(x, positions), DynamicCache(), None)
    torch.testing.assert_close(found.flatten(-2), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("draft_vocab_size", "fields"),
    [
        (40, {}),
        (None, {"q_lora_rank": None}),
        (40, {"rope_parameters": YARN}),
        (24, {"fc_norm": True, "norm_output": True, "tap_ids": [1, 2, 4, 6]}),
    ],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_unroll_equals_the_reference(draft_vocab_size, fields, side):
    target, draft = tiny_mla_pair(draft_vocab_size, **fields)
    assert_equal_to_reference(target, draft, random_chats(3, seed=3), side, ReferenceMLADraft)


def test_a_deepseek_target_gets_its_own_kind_of_draft():
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SIZES,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        first_k_dense_replace=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters=dict(YARN),
        initializer_range=0.2,
    )
    target = FrozenTarget(DeepseekV3ForCausalLM(config))
    chosen = draft_config(target.config, draft_vocab_size=40)
    assert type(chosen) is EagleMLAConfig and chosen.rope_parameters == YARN
    assert type(draft_config(target.config, "llama")) is EagleConfig
    assert type(draft_config(LlamaConfig(num_hidden_layers=8))) is EagleConfig
    assert draft_config(LlamaConfig(num_hidden_layers=8), "mla", {"v_head_dim": 7}).v_head_dim == 7
    with pytest.raises(ValueError, match="`v_head_dim` is 7, but the draft's attention is Llama's"):
        draft_config(LlamaConfig(num_hidden_layers=8), "auto", {"v_head_dim": 7})
    target.tap_ids = chosen.tap_ids
    draft = new_draft(chosen, target.embedding_weight(), tiny_mapping(), target.head_weight())
    assert_equal_to_reference(target, draft, random_chats(2, seed=3), reference=ReferenceMLADraft)


def test_every_parameter_learns_and_the_embedding_does_not():
    target, draft = tiny_mla_pair(fc_norm=True)
    output, _ = unroll(target, draft, pad_batch(random_chats(4, seed=3)))
    output.loss.backward()
    without = [name for name, p in draft.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["embed_tokens.weight"]


@pytest.mark.parametrize("setting", ["eager", "gradient_checkpointing", "whole_projections"])
def test_other_ways_to_compute_it_equal_the_default(setting, monkeypatch):
    target, draft = tiny_mla_pair(rope_parameters=YARN, norm_output=True)
    batch = pad_batch(random_chats(4, seed=8), side="left")
    output, _ = unroll(target, draft.train(), batch)
    wanted = gradients(draft, output.loss)
    if setting == "eager":
        draft.set_attn_implementation("eager")
        monkeypatch.setattr(ttt_attention, "flash_ttt_attention", None)  # so that it cannot be what runs
    elif setting == "gradient_checkpointing":
        draft.gradient_checkpointing_enable()
    else:  # as under an adapter, which is no plain linear layer
        attention = draft.midlayer.self_attn
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"):
            setattr(attention, name, Wrapped(getattr(attention, name)))
    other, _ = unroll(target, draft, batch)
    torch.testing.assert_close(other.loss, output.loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(draft, other.loss).items():
        torch.testing.assert_close(gradient, wanted[name.replace("wrapped.", "")], rtol=1e-4, atol=1e-5)


def test_mixed_precision_is_near_full_precision():
    target, draft = tiny_mla_pair(rope_parameters=YARN)
    batch = pad_batch(random_chats(4, seed=8))
    exact, _ = unroll(target, draft, batch)
    wanted = gradients(draft, exact.loss)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = unroll(target, draft, batch)
    assert mixed.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    for name, gradient in gradients(draft, mixed.loss).items():
        assert (gradient - wanted[name]).norm() < 0.1 * wanted[name].norm(), name


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": None, "fc_norm": True, "norm_output": True}])
def test_decoding_with_a_cache_equals_the_unroll(fields):
    target, draft = tiny_mla_pair(rope_parameters=YARN, **fields)
    ids, row = torch.randint(3, VOCAB, (1, 20)), 11
    features = target(ids)
    trained = unrolled(draft, ids, features.taps, rows=torch.tensor([row]), num_steps=STEPS).hidden_states
    cache = DynamicCache()
    hidden, tokens = draft.combine_features(features.taps)[:, : row + 1], ids[:, 1 : row + 2]
    positions = torch.arange(row + 1)[None]
    for step in range(STEPS):
        normed, feedback = draft.decode(tokens, hidden, positions, cache)
        torch.testing.assert_close(normed[0, -1:], trained[step], rtol=1e-4, atol=1e-5)
        hidden, tokens = feedback[:, -1:], ids[:, row + 2 + step][None]
        positions = torch.tensor([[row + 1 + step]])


@pytest.fixture(scope="module")
def taught():
    target = make_target()
    return target, make_draft(target, 40, (0, 2, 3), config_class=EagleMLAConfig, **SIZES)


@pytest.mark.parametrize("shape", [{"num_speculative_tokens": 3}, {"method": "tree", "depth": 3, "top_k": 3}])
def test_decoding_a_batch_leaves_the_targets_output(shape, taught):
    """Prompts of different lengths, and a draft that is right now and then: rows of the cache go apart."""
    target, draft = taught
    ids, mask = random_prompts(2, 9, seed=7), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 24}
    found = speculative_generate(target, draft, ids, **options, **shape)
    assert found.answers == target_generate(target, ids, **options)
    accepted = [counts[0] for counts in found.accepted_per_position]
    assert all(0 < right for right in accepted) and sum(accepted) < sum(found.drafts)
    assert found.drafts[0] != found.drafts[1]


def test_replaying_answers_counts_as_decoding_does(taught):
    ids, mask = random_prompts(2, 9, seed=7), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    shapes = [{"num_speculative_tokens": 3}, {"num_speculative_tokens": 3, "draft_window": 6}]
    for decoded, again in replayed(*taught, {"input_ids": ids, "attention_mask": mask}, shapes, 24):
        assert again == decoded
