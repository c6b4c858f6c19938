"""The folder of a DFlash draft: its config.json, its tensors, both of its forms, and what is refused."""

import json
import logging

import pytest
import torch
from chain_models import make_target, random_prompts
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from tiny_blocks import MASK, options_of, tiny_block_pair
from transformers import AutoModel, Gemma3TextConfig, LlamaConfig, Qwen3VLConfig

from hf_eagle import load_draft
from hf_eagle.arguments.objective import EagleArguments, refuse_other_methods
from hf_eagle.decoding import speculative_generate
from hf_eagle.drafts.dflash.configuration import DFlashConfig, config_for, default_layers
from hf_eagle.drafts.dflash.modeling import DFlashDraftModel
from hf_eagle.drafts.kinds import KINDS
from hf_eagle.drafts.warm_start import start_from


FORMS = ("servers", "transformers")


@pytest.fixture(scope="module")
def pair():
    return tiny_block_pair(make_target(), block_size=4, draft_num_layers=2, tap_ids=[1, 3])


def saved(draft, folder, form="servers"):
    draft.config.served_form = form
    draft.save_pretrained(folder)
    draft.config.served_form = "servers"
    return json.loads((folder / "config.json").read_text())


# ---- config.json ----


def test_the_config_holds_what_the_servers_read(pair, tmp_path):
    config, own = saved(pair[1], tmp_path), pair[1].config
    wanted = {
        **{"architectures": ["DFlashDraftModel"], "model_type": "qwen3", "dtype": "float32", "vocab_size": 67},
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": own.rms_norm_eps},
        **{"attention_bias": False, "max_position_embeddings": 256, "tie_word_embeddings": False, "rope_scaling": None},
        **{"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        **{"layer_types": ["full_attention"] * 2, "sliding_window": None, "use_sliding_window": False},
        **{
            "block_size": 4,
            "num_target_layers": 4,
            "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 2]},
        },
    }
    assert {name: config[name] for name in wanted} == wanted
    # read differently by servers, or another convention of counting
    never = ("eagle_aux_hidden_state_layer_ids", "eagle_config", "is_causal", "draft_vocab_size", "sample_from_anchor")
    assert not set(config) & {*never, "mask_token_id", "target_layer_ids", "target_hidden_size", "served_form"}


def test_the_tensors_are_the_drafts_own(pair, tmp_path):
    saved(pair[1], tmp_path)
    attention = [f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    others = ["input_layernorm", "post_attention_layernorm", *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
    layers = [f"layers.{i}.{name}.weight" for i in range(2) for name in (*attention, *others)]
    assert set(load_file(tmp_path / "model.safetensors")) == {"fc.weight", "hidden_norm.weight", "norm.weight", *layers}


def test_a_shared_key_norm_is_one_parameter_and_is_written_for_each_layer(tmp_path):
    target, draft = tiny_block_pair(make_target(), draft_num_layers=3, tap_ids=[1, 3], share_k_norm=True)
    draft.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    norms = [stored[f"layers.{i}.self_attn.k_norm.weight"] for i in range(3)]
    assert all(torch.equal(norm, norms[0]) for norm in norms) and float((norms[0] - 1).abs().max()) > 0.05

    again = load_draft(tmp_path, target)
    assert again.config.share_k_norm and len({id(layer.self_attn.k_norm) for layer in again.layers}) == 1
    assert [name for name, _ in again.named_parameters() if "k_norm" in name] == ["layers.0.self_attn.k_norm.weight"]


# ---- both forms ----


@pytest.mark.parametrize("form", FORMS)
def test_either_form_is_loaded_as_it_was_saved(pair, form, tmp_path, caplog):
    target, draft = pair
    config = saved(draft, tmp_path, form)
    with caplog.at_level(logging.WARNING):
        again = load_draft(tmp_path, target)
    assert not caplog.records
    assert again.config.served_form == form and again.config.tap_ids == [1, 3] and again.kind is KINDS["dflash"]
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name

    # and saved again as it was
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(load_file(tmp_path / "model.safetensors"))


def test_transformers_loads_its_form_and_decodes_with_it(pair, tmp_path):
    target, draft = pair
    saved(draft, tmp_path, "transformers")
    assistant, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(assistant).__name__ == "MuseGlimmerAssistantModel"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]

    drafted = []
    assistant.register_forward_hook(lambda module, args, kwargs, out: drafted.append(out[0]), with_kwargs=True)
    prompt = random_prompts(1, 6, seed=3)
    mask, how = torch.ones_like(prompt), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    answer = target.model.generate(prompt, attention_mask=mask, **how)
    found = target.model.generate(
        prompt, attention_mask=mask, assistant_model=assistant, speculation_type="dflash", **how
    )
    assert torch.equal(found, answer)
    # transformers stops one token before the end, and so drafts one block less
    ours = speculative_generate(target, draft, prompt, max_new_tokens=12)
    assert ours.drafts[0] - len(drafted) in (0, 1)


# ---- what is refused ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_folder_that_is_not_exactly_the_draft_is_refused(pair, form, change, tmp_path):
    saved(pair[1], tmp_path, form)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "fc.weight" if form == "servers" else "encoder.fc.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["mask_hidden"] = torch.zeros(32)
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not hold exactly the tensors of a DFlashDraftModel"):
        load_draft(tmp_path)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"layer_types": ["sliding_attention", "full_attention"]}, "`layer_types` of a DFlash draft must all be"),
        ({"is_causal": True}, "`is_causal` of a DFlash draft must be unset, got True"),
        ({"use_sliding_window": True}, "`use_sliding_window` of a DFlash draft must be unset"),
        ({"sliding_window": 64}, "`sliding_window` of a DFlash draft must be unset"),
        ({"attention_bias": True}, "`attention_bias` of a DFlash draft must be False"),
        ({"draft_vocab_size": 40}, "`draft_vocab_size` of a DFlash draft must be 67"),
        ({"dflash_config": {"mask_token_id": 67, "target_layer_ids": [0]}}, "`mask_token_id` must be a row"),
        ({"dflash_config": {"mask_token_id": 1, "target_layer_ids": [0, 3]}}, "entry ids between 1 and 3, got .1, 4."),
        ({"dflash_config": {"mask_token_id": 1, "target_layer_ids": [2, 0]}}, "ascending and unique"),
        (
            {"dflash_config": {"mask_token_id": 1, "target_layer_ids": [0], "causal": True}},
            "`dflash_config` holds `causal`",
        ),
    ],
)
def test_a_config_that_readers_do_not_run_alike_is_refused(pair, change, told, tmp_path):
    config = saved(pair[1], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=told):
        load_draft(tmp_path)


def test_a_target_that_scales_its_embeddings_is_refused():
    with pytest.raises(ValueError, match="the target scales its embeddings"):
        config_for(Gemma3TextConfig(num_hidden_layers=8), options_of())


@pytest.mark.parametrize(
    "given, told",
    [
        ({"tap_ids": [0, 3]}, r"`tap_ids` .* between 1 and 7, got \[0, 3\]"),
        ({"tap_ids": [2, 8]}, r"`tap_ids` .* between 1 and 7, got \[2, 8\]"),
        ({"tap_ids": [3, 2]}, "ascending and unique"),
        ({"mask_token_id": 96}, "`mask_token_id` must be a row of the target's table, 0 to 95, got 96"),
        ({"block_size": 1}, "`block_size` of a DFlash draft must be at least 2"),
        ({"served_form": "sglang"}, "`served_form` must be one of servers, transformers"),
    ],
)
def test_arguments_that_no_draft_can_have_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        config_for(tiny_llama().config, options_of(**given))


@pytest.mark.parametrize("taps", [None, [1]])
def test_a_target_of_one_layer_is_refused_by_its_number_of_layers(taps):
    with pytest.raises(ValueError, match="at least 2 layers, but `num_target_layers` is 1: .* `method` eagle1.$"):
        config_for(LlamaConfig(num_hidden_layers=1), options_of(tap_ids=taps))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eos, written", [(None, None), (7, 7), ([7], 7), ([7, 8], 7), ([], None)])
def test_tokens_that_end_an_answer_are_written_as_readers_take_them(form, eos, written):
    config = DFlashConfig(target_layer_ids=[1], served_form=form, eos_token_id=eos)
    found = json.loads(config.to_json_string())["eos_token_id"]
    assert found == (written if form == "transformers" else eos)


def test_an_empty_config_is_one_like_any_other_of_transformers(tmp_path):
    empty = DFlashConfig()
    assert empty.tap_ids is None and "DFlashConfig" in repr(empty)
    empty.save_pretrained(tmp_path)
    assert DFlashConfig.from_pretrained(tmp_path).to_json_string() == empty.to_json_string()


@pytest.mark.parametrize("taps", [{}, {"target_layer_ids": []}, {"num_target_layers": 8}])
def test_a_draft_without_taps_is_refused(taps):
    with pytest.raises(ValueError, match=r"`tap_ids` of a DFlash draft must be entry ids between 1 and .*, got \[\]"):
        DFlashDraftModel(DFlashConfig(**taps))


@pytest.mark.parametrize("kind, loss", [("eagle3", "label"), ("eagle3", "dpace"), ("dflash", "lk_alpha")])
def test_a_loss_of_another_kind_is_refused(kind, loss):
    with pytest.raises(ValueError, match=f"`loss` is {loss}, which an? .* draft cannot be trained with"):
        refuse_other_methods(KINDS[kind], EagleArguments(loss=loss))
    for known in KINDS[kind].losses:
        refuse_other_methods(KINDS[kind], EagleArguments(loss=known))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dflash"])
@pytest.mark.parametrize("given", [{"num_anchors": 3}, {"slot_decay": 7.0}, {"dpace_alpha": 0.1}], ids=str)
def test_its_arguments_are_refused_for_other_kinds(kind, given):
    with pytest.raises(ValueError, match=f"`{next(iter(given))}` .* means nothing to an .*`method` to dflash"):
        refuse_other_methods(KINDS[kind], EagleArguments(**given))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"loss": "dpace", "slot_decay": 7.0}, r"`slot_decay` is 7, which `loss` dpace does not read: .* ce or label"),
        ({"loss": "ce", "dpace_alpha": 0.2}, r"`dpace_alpha` is 0.2, which `loss` ce does not read: .*`loss` to dpace"),
        ({"loss": "label", "dpace_alpha": 0.0}, "`dpace_alpha` is 0, which `loss` label does not read"),
    ],
)
def test_arguments_that_its_loss_does_not_read_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        refuse_other_methods(KINDS["dflash"], EagleArguments(**given))


@pytest.mark.parametrize(
    "given", [{"loss": "dpace", "dpace_alpha": 0.2}, {"loss": "label", "slot_decay": 7.0}, {"slot_decay": 7.0}], ids=str
)
def test_arguments_that_its_loss_reads_are_taken(given):
    refuse_other_methods(KINDS["dflash"], EagleArguments(**given))


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_step_is_what_one_kind_does_anyhow(kind):
    if kind == "dflash":
        with pytest.raises(ValueError, match="`ttt_steps` is 1, which means nothing to a DFlash draft"):
            refuse_other_methods(KINDS[kind], EagleArguments(ttt_steps=1))
    else:
        refuse_other_methods(KINDS[kind], EagleArguments(ttt_steps=1))


# ---- taps ----


@pytest.mark.parametrize(
    "layers, count, wanted",
    [(36, 5, [1, 9, 17, 25, 33]), (30, 3, [1, 14, 27]), (8, 3, [1, 3, 5]), (6, 3, [1, 2, 3]), (4, 3, [1]), (2, 3, [0])],
)
def test_the_default_taps_are_spread_as_z_lab_does(layers, count, wanted):
    assert default_layers(LlamaConfig(num_hidden_layers=layers), count) == wanted


def test_on_qwen3_vl_they_begin_behind_the_image_features():
    config = Qwen3VLConfig(text_config={"num_hidden_layers": 36})
    assert default_layers(config, 3) == [3, 18, 33]


# ---- started from another ----


def test_a_draft_starts_from_one_with_other_blocks(pair):
    target, source = pair
    draft = tiny_block_pair(target, seed=5, block_size=7, draft_num_layers=2, tap_ids=[1, 3])[1]
    assert start_from(draft, source) == 0
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, draft.state_dict()[name]), name
    other = tiny_block_pair(target, draft_num_layers=1, tap_ids=[1, 3])[1]
    with pytest.raises(ValueError, match="`init_from` was trained with `draft_num_layers` 2"):
        start_from(other, source)
