"""The folder a draft is saved to: exact names and shapes, bit-equal reading, and refusal of anything else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCAB, tiny_pair

from hf_eagle import load_draft


def names_and_shapes(vd: int | None, taps: int, fc_norm: bool) -> dict:
    """Contract section 5, written out for hidden 32, 4 heads of 8, 2 KV heads, MLP 48."""
    names = {
        "fc.weight": [32, taps * 32],
        "midlayer.input_layernorm.weight": [32],
        "midlayer.hidden_norm.weight": [32],
        "midlayer.post_attention_layernorm.weight": [32],
        "midlayer.self_attn.q_proj.weight": [32, 64],
        "midlayer.self_attn.k_proj.weight": [16, 64],
        "midlayer.self_attn.v_proj.weight": [16, 64],
        "midlayer.self_attn.o_proj.weight": [32, 32],
        "midlayer.mlp.gate_proj.weight": [48, 32],
        "midlayer.mlp.up_proj.weight": [48, 32],
        "midlayer.mlp.down_proj.weight": [32, 48],
        "norm.weight": [32],
        "lm_head.weight": [vd or VOCAB, 32],
    }
    if vd:
        names |= {"d2t": [vd], "t2d": [VOCAB]}
    return names | ({f"fc_norm.{i}.weight": [32] for i in range(taps)} if fc_norm else {})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("vd", "fields"), [(40, {}), (None, {}), (24, {"fc_norm": True, "norm_output": True, "tap_ids": [1, 3, 5, 7]})]
)
def test_names_and_shapes_are_exactly_the_contracts(vd, fields, tied, tmp_path):
    _, draft = tiny_pair(vd, tied=tied, **fields)
    draft.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert found == names_and_shapes(vd, draft.config.num_taps, draft.config.fc_norm)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    modes = {p.stat().st_mode for p in tmp_path.iterdir()}
    assert len(modes) == 1  # weights are as readable as the config
    if vd:
        assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool


@pytest.mark.parametrize("vd", [40, None])
def test_reading_back_is_bit_equal(vd, tmp_path):
    target, draft = tiny_pair(vd, fc_norm=True)
    draft.save_pretrained(tmp_path)
    again = load_draft(tmp_path, target)
    wanted = draft.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert not again.embed_tokens.weight.requires_grad
    assert again.embed_tokens.weight.data_ptr() == target.embedding_weight().data_ptr()  # no second copy


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("lm_head.weight"),
            "missing: lm_head.weight; the head was dropped by code",
        ),
        (lambda t: t.pop("midlayer.hidden_norm.weight"), "missing: midlayer.hidden_norm.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), "unexpected: model.norm.weight"),
        (lambda t: t.update({"fc.bias": torch.zeros(32)}), "unexpected: fc.bias"),
        (lambda t: t.update({"fc.weight": torch.zeros(32, 64)}), "of another shape: .*fc.weight"),
        (lambda t: t.pop("d2t"), "missing: d2t"),
        (lambda t: t["d2t"].add_(torch.arange(40)), "`d2t` and `t2d` of this draft do not fit"),
    ],
)
def test_a_folder_that_is_not_exactly_a_draft_is_refused(change, message, tmp_path):
    _, draft = tiny_pair(40)
    draft.save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_draft(tmp_path)


@pytest.mark.parametrize("vd", [40, None])  # a head of another shape than the embeddings, and of the same
def test_a_tied_target_does_not_tie_the_drafts_head(vd, tmp_path):
    target, draft = tiny_pair(vd, tied=True)
    assert target.config.tie_word_embeddings and not draft.config.tie_word_embeddings
    embeddings = target.embedding_weight().clone()
    with torch.no_grad():
        draft.lm_head.weight.add_(1)
    draft.save_pretrained(tmp_path)
    again = load_draft(tmp_path, target)
    assert torch.equal(again.lm_head.weight, draft.lm_head.weight)
    assert torch.equal(again.embed_tokens.weight, embeddings)


@pytest.mark.parametrize("vd", [40, None])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_folder_saved_as_tied_is_refused(vd, dropped, tmp_path):
    """By code that let the draft's config inherit the target's flag, whether or not the head got lost by it."""
    target, draft = tiny_pair(vd, tied=True)
    draft.save_pretrained(tmp_path)
    if dropped:
        damage(tmp_path, lambda t: t.pop("lm_head.weight"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="`tie_word_embeddings` .* got True: `lm_head.weight` is trained and its own"):
        load_draft(tmp_path, target)


def test_a_target_folder_is_no_draft(tmp_path):
    target, _ = tiny_pair()
    target.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not a draft: `architectures` .* \['LlamaForCausalLM'\]"):
        load_draft(tmp_path)


def test_another_targets_embeddings_are_refused():
    _, draft = tiny_pair()
    with pytest.raises(ValueError, match=r"table is \(50, 32\) but this draft was made for \(96, 32\)"):
        draft.set_target_embeddings(torch.zeros(50, 32))


def test_a_half_precision_folder_says_so(tmp_path):
    _, draft = tiny_pair()
    draft.to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert load_draft(tmp_path).lm_head.weight.dtype == torch.bfloat16
