"""DFlash drafts of every author: recognised, with the logits of their mathematics, refused by name, and trained on."""

import json
import logging

import foreign_folders as forms
import pytest
import torch
from foreign_folders import BLOCK, BLOCKS, HEADS, MASK, OUTPUTS, TAP_IDS, write
from foreign_math import block_logits
from safetensors.torch import load_file
from transformers import Qwen3Config

from hf_eagle import load_draft
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.warm_start import start_from
from hf_eagle.foreign.convert import from_foreign
from hf_eagle.foreign.files import read_target_head
from hf_eagle.serving.check import check_draft


# builder -> the form that it is taken for, and what its config says of the mathematics, restated by hand
SAID = {
    "zlab_blocks": ("zlab", {"eps": 1e-6, "theta": 2e4}),
    "specforge_blocks": ("zlab", {"eps": 1e-6, "theta": 1e6}),
    "speculators_blocks": ("speculators", {"eps": 1e-6, "theta": 7e4}),
    "transformers_blocks": ("transformers", {"eps": 1e-6, "theta": 3e4}),
}


@pytest.mark.parametrize("build", BLOCKS)
def test_an_imported_draft_computes_what_its_project_says(build, target_folder, target, embedding, tmp_path, caplog):
    form, mathematics = SAID[build.__name__]
    config, tensors = build(embedding)
    with caplog.at_level(logging.INFO, "hf_eagle"):
        imported = from_foreign(write(tmp_path / "foreign", config, tensors), target_folder)
    assert f"in the form `{form}`" in caplog.text
    imported.save_pretrained(tmp_path / "ours")
    draft = load_draft(tmp_path / "ours", target)

    g = torch.Generator().manual_seed(1)
    ids, features = torch.randint(0, len(embedding), (8,), generator=g), torch.randn(8, 96, generator=g)
    lent, shape = (embedding, target.head_weight().detach()), (HEADS, MASK, BLOCK)
    wanted = [block_logits(tensors, *lent, int(ids[n - 1]), features[:n], *shape, **mathematics) for n in (6, 7, 8)]
    wanted = torch.cat(wanted)
    with torch.no_grad():
        found = draft.drafted_logits(ids, features)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("build", BLOCKS)
def test_what_is_saved_is_a_folder_that_the_servers_take(build, target_folder, target, embedding, tmp_path):
    config, tensors = build(embedding)
    from_foreign(write(tmp_path / "foreign", config, tensors), target_folder).save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["dflash_config"] == {"mask_token_id": MASK, "target_layer_ids": OUTPUTS}
    assert written["block_size"] == BLOCK and written["architectures"] == ["DFlashDraftModel"]
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == SAID[build.__name__][1]["theta"]
    assert written["vocab_size"] == len(embedding) and written["num_target_layers"] == 8
    layers = load_file(tmp_path / "ours" / "model.safetensors")
    assert len(layers) == 3 + 11 * written["num_hidden_layers"]
    assert [x for x in check_draft(tmp_path / "ours", target.config) if x.level != "note"] == []


def test_taps_count_what_the_form_counts(target_folder, embedding, tmp_path):
    """Only speculators counts entries; given entry ids have to agree."""
    for number, build in enumerate(BLOCKS):
        folder = write(tmp_path / str(number), *build(embedding))
        assert from_foreign(folder, target_folder).config.tap_ids == [i + 1 for i in OUTPUTS]
        assert from_foreign(folder, target_folder, tap_ids=[2, 4, 7]).config.target_layer_ids == OUTPUTS
        with pytest.raises(ValueError, match=r"`tap_ids` is \[1, 3, 6\], but the draft's own files say"):
            from_foreign(folder, target_folder, tap_ids=OUTPUTS)


@pytest.mark.parametrize("build", [*BLOCKS, forms.specforge])
@pytest.mark.parametrize("other", [[2, 7, 4], [4, 2, 7], [7, 4, 2]])
def test_taps_in_another_order_are_refused(build, other, target_folder, embedding, tmp_path):
    """The columns of `fc` have the order of training, whichever of both is said to be wrong."""
    config, tensors = build(embedding)
    for given, stored in ((sorted(other), other), (other, sorted(other))):
        config = with_taps(config, stored)
        with pytest.raises(ValueError, match="own files say that it was trained on .* in this order"):
            from_foreign(write(tmp_path, config, tensors), target_folder, tap_ids=given)


def with_taps(config, entries):
    """A config that names the taps, by the ids of their entries, where it named them before."""
    outputs = [i - 1 for i in entries]
    if "aux_hidden_state_layer_ids" in config:
        return config | {"aux_hidden_state_layer_ids": entries}
    if "eagle_config" in config:
        return config | {"eagle_config": config["eagle_config"] | {TAP_IDS: outputs}}
    if "dflash_config" in config:
        return config | nested(config, target_layer_ids=outputs)
    return config | {"target_layer_ids": outputs}


@pytest.mark.parametrize(("said", "told"), [(False, True), (True, False), (None, False)])
def test_the_causal_trap_of_speculators_is_told(said, told, target_folder, embedding, tmp_path, caplog):
    config, tensors = forms.speculators_blocks(embedding, sliding_window_non_causal=said)
    with caplog.at_level(logging.WARNING, "hf_eagle"):
        from_foreign(write(tmp_path, config, tensors), target_folder)
    assert ("of which vLLM makes causal attention in ALL layers" in caplog.text) == told


def test_copies_of_the_targets_tables_are_left_out(target_folder, target, embedding, tmp_path):
    config, tensors = forms.zlab_blocks(embedding)
    head = read_target_head(target_folder)
    torch.testing.assert_close(head.float(), target.head_weight().detach().float())
    whole = tensors | {"embed_tokens.weight": embedding, "lm_head.weight": head}
    whole |= {"d2t": torch.zeros(len(embedding), dtype=torch.long)}
    one = from_foreign(write(tmp_path / "with", config, whole), target_folder)
    other = from_foreign(write(tmp_path / "without", config, tensors), target_folder)
    one.save_pretrained(tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(tensors)
    own = {name: x for name, x in other.state_dict().items() if name not in other.lent_tensors}
    assert all(torch.equal(one.state_dict()[name], x) for name, x in own.items())


@pytest.mark.parametrize("build", BLOCKS)
def test_training_starts_from_it(build, target_folder, target, embedding, tmp_path):
    imported = from_foreign(write(tmp_path / "foreign", *build(embedding)), target_folder)
    imported.save_pretrained(tmp_path / "ours")
    source = load_draft(tmp_path / "ours", target)
    fresh = new_draft(source.config, target.embedding_weight(), head_weight=target.head_weight())
    start_from(fresh, source)
    own = [name for name in source.state_dict() if name not in source.lent_tensors]
    assert own and all(torch.equal(fresh.state_dict()[name], source.state_dict()[name]) for name in own)


# ---- refused ----


def nested(config, **fields):
    return {"dflash_config": config["dflash_config"] | fields}


def of_layer(config, **fields):
    return {"transformer_layer_config": config["transformer_layer_config"] | fields}


def without_ellipses(config):
    """A config without the fields that `...` takes out, of the nested ones too."""
    return {
        name: without_ellipses(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value is not ...
    }


WINDOWED = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0, "layer_types": ...}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (
            forms.zlab_blocks,
            {"architectures": ["Qwen3DSparkModel"]},
            "a DSpark draft, which DeepSpec also calls dflash",
        ),
        (forms.zlab_blocks, {"architectures": ["Qwen3DSparkModel"], "markov_rank": 0}, "it would be off by one"),
        (forms.speculators_blocks, {"speculators_model_type": "dspark"}, "`speculators_model_type` is 'dspark'"),
        (forms.speculators_blocks, {"sample_from_anchor": True}, "`sample_from_anchor` of this draft is True"),
        (forms.zlab_blocks, (nested, {"sample_from_anchor": True}), "`sample_from_anchor` of this draft is True"),
        (forms.zlab_blocks, {"is_causal": True}, "`is_causal` of this draft is True"),
        (forms.zlab_blocks, (nested, {"causal": True}), "`causal` of this draft is True"),
        (forms.zlab_blocks, (nested, {"use_swa": True}), "`use_swa` of this draft is True"),
        (forms.zlab_blocks, SLIDING, "`layer_types` of this draft has sliding attention"),
        (forms.speculators_blocks, (of_layer, SLIDING), "`layer_types` of this draft has sliding attention"),
        (
            forms.speculators_blocks,
            (of_layer, {"model_type": "gemma3"}),
            "`model_type` of this draft's layer is 'gemma3'",
        ),
        (forms.transformers_blocks, SLIDING, "`layer_types` of this draft has sliding attention"),
        (forms.transformers_blocks, {"layer_types": ...}, "`layer_types` of this draft has sliding attention"),
        (forms.zlab_blocks, {"layer_types": ["chunked_attention"] * 2}, "`layer_types` .* has chunked attention"),
        (forms.zlab_blocks, {"layer_types": ["full_attention", "linear_attention"]}, "has linear attention"),
        (forms.speculators_blocks, (of_layer, {"layer_types": ["full"] * 2}), "`layer_types` of this draft has full,"),
        (forms.zlab_blocks, WINDOWED, "`use_sliding_window` of this draft is set and `layer_types` is not"),
        (forms.zlab_blocks, WINDOWED | {"sliding_window": ...}, "`use_sliding_window` of this draft is set"),
        (forms.zlab_blocks, WINDOWED | {"max_window_layers": 1}, "`use_sliding_window` of this draft is set"),
        (forms.zlab_blocks, WINDOWED | {"layer_types": None}, "`use_sliding_window` of this draft is set"),
        (forms.speculators_blocks, (of_layer, WINDOWED), "`use_sliding_window` of this draft is set"),
        (
            forms.zlab_blocks,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "rope_theta": ...},
            "differ by type of layer, but our drafts have one RoPE for all layers",
        ),
        (forms.zlab_blocks, (nested, {"mask_token_id": None}), "`mask_token_id` of this draft is None"),
        (forms.zlab_blocks, (nested, {"mask_token_id": 10**6}), "`mask_token_id` must be a row of the target's table"),
        (forms.zlab_blocks, {"block_size": ...}, "`block_size` of this draft is None"),
        (forms.zlab_blocks, (nested, {"conv_kernel_size": 3}), "`conv_kernel_size` of this draft is 3.* DFlash2"),
        (forms.zlab_blocks, (nested, {"target_layer_ids": [1, 3, 7]}), "`tap_ids` of a DFlash draft must be entry ids"),
        (forms.zlab_blocks, (nested, {"target_layer_ids": [6, 1, 3]}), "must be ascending"),
        (forms.zlab_blocks, (nested, {"target_layer_ids": [1, 3]}), "takes 3 taps, but 2 are known"),
        (forms.zlab_blocks, {"hidden_size": 64}, "`hidden_size` of this draft is 64"),
        (forms.zlab_blocks, {"num_hidden_layers": 3}, "`layers.2.*is missing"),
        (forms.zlab_blocks, {"head_dim": ...}, r"is \[8\] instead of \[128\]"),
    ],
)
def test_what_servers_would_run_otherwise_is_refused_by_name(
    build, change, message, target_folder, embedding, tmp_path
):
    config, tensors = build(embedding)
    changes = change[0](config, **change[1]) if isinstance(change, tuple) else change
    config = without_ellipses({**config, **changes})
    with pytest.raises(ValueError, match=message):
        from_foreign(write(tmp_path, config, tensors), target_folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ...},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "layer_types": ...},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0, "layer_types": ...},
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0, "layer_types": ...},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    ],
    ids=str,
)
def test_a_window_that_hides_nothing_is_taken_as_its_class_takes_it(fields, target_folder, embedding, tmp_path):
    config, tensors = forms.zlab_blocks(embedding)
    config = without_ellipses(config | fields)
    assert Qwen3Config(**config).layer_types == ["full_attention"] * 2
    from_foreign(write(tmp_path, config, tensors), target_folder)


@pytest.mark.parametrize("form", ["auto", "zlab"])
def test_deepspecs_dflash_is_told_by_its_tensors_too(form, target_folder, embedding, tmp_path):
    config, tensors = forms.zlab_blocks(embedding)
    write(tmp_path, config, tensors | {"markov_head.markov_w1.weight": torch.ones(len(embedding), 1)})
    with pytest.raises(ValueError, match="slot k predicts the token after its own.*cannot be imported"):
        from_foreign(tmp_path, target_folder, form=form)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("hidden_norm.weight", lambda x, table: None, "`hidden_norm.weight` is missing"),
        ("fc.weight", lambda x, table: None, "`fc.weight` is missing"),
        ("layers.1.self_attn.q_norm.weight", lambda x, table: None, "q_norm.weight` is missing"),
        (
            "layers.0.self_attn.q_proj.bias",
            lambda x, table: torch.ones(32),
            "`attention_bias`: this draft holds",
        ),
        (
            "lm_head.weight",
            lambda x, table: table + 0.1,
            "`lm_head.weight` .* is not its target's",
        ),
        ("d2t", lambda x, table: torch.ones(24, dtype=torch.long), "`d2t` of this draft maps 24 draft tokens"),
        ("embed_tokens.weight", lambda x, table: table + 0.1, "`embed_tokens` of this draft differs from the target's"),
        ("fc.weight", lambda x, table: x.to(torch.float8_e4m3fn), "a quantised draft"),
        ("mask_hidden", lambda x, table: torch.ones(32), "`mask_hidden` shows"),
    ],
)
def test_tensors_are_refused_by_name(name, make, message, target_folder, embedding, tmp_path):
    config, tensors = forms.zlab_blocks(embedding)
    made = make(tensors.pop(name, None), embedding)
    write(tmp_path, config, tensors | ({} if made is None else {name: made}))
    with pytest.raises(ValueError, match=message):
        from_foreign(tmp_path, target_folder)
