"""Weights that are not there are never random numbers, and a config of another model ends at once."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from releases import skip_before
from safetensors.torch import load_file, save_file
from tiny_files import write_tiny_target
from tiny_new_families import new_family_config, tiny_new_family
from tiny_targets import tiny_family
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from workers import run_worker

from hf_eagle import FrozenTarget
from hf_eagle.targets.weights import check_sizes, load_whole, stored_shapes


IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    write_tiny_target(folder / "llama")
    for family in ("qwen3_moe", "gpt_oss"):
        tiny_family(family).save_pretrained(folder / family)
    return folder


def changed(sound, tmp_path, family="llama", drop=lambda name: False, rename=str, shape=None, extra=None):
    """A copy of a sound target with other tensors."""
    folder = shutil.copytree(sound / family, tmp_path / family)
    tensors = load_file(folder / "model.safetensors")
    tensors = {rename(name): x for name, x in tensors.items() if not drop(name)} | (extra or {})
    for name, sizes in (shape or {}).items():
        tensors[name] = torch.zeros(sizes)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(folder, caplog=None):
    with pytest.raises(ValueError) as problem:
        FrozenTarget.from_pretrained(str(folder))
    text = str(problem.value)
    assert text.startswith(f"`target` {folder}") and text.endswith(".") and "\n" not in text
    return text


LAYER = "model.layers.3."
NAMES = ["input_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm"]
NAMES += [f"self_attn.{part}_proj" for part in "kovq"]
NAMES = ["model.embed_tokens.weight", "model.norm.weight", *(f"{LAYER}{name}.weight" for name in NAMES)]


@pytest.mark.parametrize("name", NAMES)
def test_any_tensor_that_is_missing_is_named(sound, tmp_path, name, caplog):
    text = refused(changed(sound, tmp_path, drop=lambda other: other == name))
    assert f"lacks {1 + ('embed' in name)} of the 75 tensors of a LlamaForCausalLM (" in text and name in text
    assert "where random numbers would be taken: restore its weights" in text
    assert "LOAD REPORT" not in caplog.text  # of which the sentence says all


def test_the_first_names_and_their_count(sound, tmp_path):
    text = refused(changed(sound, tmp_path, drop=lambda name: name.startswith(("model.layers.4", "model.layers.5"))))
    assert (
        f"lacks 18 of the 75 tensors of a LlamaForCausalLM ({', '.join(n.replace('.3.', '.4.') for n in NAMES[2:6])}"
        in text
    )
    assert " and 14 more)" in text


def test_names_that_nobody_knows(sound, tmp_path):
    text = refused(changed(sound, tmp_path, rename=lambda name: f"base.{name}"))
    assert "holds no tensor with a name that a LlamaForCausalLM knows" in text


@pytest.mark.parametrize("sizes", [(40, 32), (48,), (48, 33), (1, 48, 32)])
def test_a_tensor_of_another_shape_is_named(sound, tmp_path, sizes, caplog):
    text = refused(changed(sound, tmp_path, shape={f"{LAYER}mlp.up_proj.weight": sizes}))
    assert (
        f"holds 1 tensors of other shapes than its config.json says ({LAYER}mlp.up_proj.weight is {list(sizes)}" in text
    )
    assert "instead of [48, 32])" in text and "LOAD REPORT" not in caplog.text


def test_a_config_of_another_width_is_told_with_the_tensors(sound, tmp_path):
    folder = changed(sound, tmp_path, drop=lambda name: name.startswith("model.layers.7"))
    change(folder / "config.json", hidden_size=64)
    text = refused(folder)
    assert "lacks 9 of the 75 tensors" in text and ", and holds 65 tensors of other shapes" in text


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_expert_that_is_missing_is_found(sound, tmp_path, family):
    """Of a file of each expert, which are put together, and of one of all."""
    names = [name for name in load_file(sound / family / "model.safetensors") if "experts" in name and ".1." in name]
    lost = names[len(names) // 2]
    text = refused(changed(sound, tmp_path, family, drop=lambda name: name == lost))
    assert "model.layers.1.mlp.experts" in text


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama"])
def test_more_tensors_than_are_needed_do_no_harm(sound, tmp_path, family, caplog):
    extra = {"model.layers.9.mlp.up_proj.weight": torch.ones(3), "mtp.fc.weight": torch.ones(2)}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    folder = changed(sound, tmp_path, family, extra=extra)
    logging.getLogger("transformers").propagate = True
    target = FrozenTarget.from_pretrained(str(folder), tap_ids=[1])
    wanted = AutoModelForCausalLM.from_pretrained(sound / family).eval()
    with torch.no_grad():
        assert torch.equal(target.model(IDS).logits, wanted(IDS).logits)


def test_what_is_tied_or_computed_may_be_missing(sound, tmp_path):
    held = load_file(sound / "llama" / "model.safetensors")
    assert not any("lm_head" in name or "inv_freq" in name for name in held)
    FrozenTarget.from_pretrained(str(sound / "llama"))
    folder = changed(sound, tmp_path)
    change(folder / "config.json", tie_word_embeddings=False)
    assert "lacks 1 of the 75 tensors of a LlamaForCausalLM (lm_head.weight)" in refused(folder)


def test_a_target_in_several_files(sound, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sound / "llama")
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    parts = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 1 and len(stored_shapes("target", tmp_path / "parts")) == 74
    FrozenTarget.from_pretrained(str(tmp_path / "parts"))

    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[:-10])
    assert f"cannot be read: {parts[1].name} is cut" in refused(tmp_path / "parts")
    parts[1].unlink()
    with pytest.raises(OSError, match=f"`target` {tmp_path}/parts cannot be read .*{parts[1].name}"):
        FrozenTarget.from_pretrained(str(tmp_path / "parts"))
    parts[1].write_bytes(whole)
    index = tmp_path / "parts" / "model.safetensors.index.json"
    for content in ({"weight_map": []}, {}, {"weight_map": {"x": 1}}, []):
        index.write_text(json.dumps(content))
        assert "model.safetensors.index.json" in refused(tmp_path / "parts")


def test_the_report_of_a_sound_model_is_passed_on(sound, tmp_path):
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.WARNING)  # scripts that ran before in this process may have asked for less
    logger.addHandler(handler)
    try:
        load_whole(AutoModelForCausalLM, changed(sound, tmp_path, extra={"more.weight": torch.ones(2)}))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert sum("LOAD REPORT" in text and "more.weight" in text for text in seen) == 1 and not logger.filters


# ---- before anything is built ----


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("num_hidden_layers", 10**6, "8"),
        ("hidden_size", 10**6, "32"),
        ("intermediate_size", 10**7, "310"),
        ("vocab_size", 10**9, "310"),
        ("num_key_value_heads", 10**6, "310"),
        ("head_dim", 10**6, "310"),
    ],
)
def test_a_config_of_a_far_larger_model_is_refused_before_it_is_built(
    sound, tmp_path, field, value, shown, monkeypatch
):
    folder = changed(sound, tmp_path)
    change(folder / "config.json", **{field: value, "layer_types": None})
    config = AutoConfig.from_pretrained(folder) if field != "hidden_size" else None
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("is built"))
    text = refused(folder)
    assert f"`{field}` in its config.json is {value:,}, but its weights show {shown}: restore" in text
    assert config is None or getattr(config, field) == value


def test_a_part_of_a_config_counts_and_what_is_unknown_does_not():
    shapes = {"model.embed_tokens.weight": (310, 32), "model.layers.7.mlp.up_proj.weight": (48, 32), "x": ()}
    sound = LlamaConfig(vocab_size=310, hidden_size=32, intermediate_size=48, num_hidden_layers=8)
    check_sizes("target", "x", sound, shapes)
    check_sizes("target", "x", SimpleNamespace(num_hidden_layers=None, hidden_size="x"), shapes)
    check_sizes("target", "x", SimpleNamespace(num_hidden_layers=10**6), {})
    # rope, positions and ids are numbers of another kind, and four-bit weights lie eight in one
    check_sizes(
        "target", "x", SimpleNamespace(max_position_embeddings=10**7, rope_theta=10**9, eos_token_id=10**6), shapes
    )
    check_sizes("target", "x", SimpleNamespace(hidden_size=8 * 32), shapes)
    tower = SimpleNamespace(depth=10**6)
    with pytest.raises(ValueError, match="`draft` x: `depth` in its config.json is 1,000,000"):
        check_sizes("draft", "x", SimpleNamespace(sub_configs={"vision_config": None}, vision_config=tower), shapes)


def test_a_field_of_each_layer_counts_by_its_largest(tmp_path):
    """Of Gemma 4, whose layers differ in the width of their heads."""
    skip_before("transformers", "5.24")
    tiny_new_family("gemma4_text").save_pretrained(tmp_path)
    target = FrozenTarget.from_pretrained(str(tmp_path))
    assert target(IDS).last_hidden.shape == (1, 6, 32)

    shapes = {"model.embed_tokens.weight": (96, 32), "model.layers.7.mlp.up_proj.weight": (48, 32)}
    wide = new_family_config("gemma4_text", global_head_dim=10**6)
    with pytest.raises(ValueError, match="`target` x: `head_dim` in its config.json is 1,000,000"):
        check_sizes("target", "x", wide, shapes)


# ---- spread over ranks ----


def test_every_rank_of_a_spread_target_refuses(sound, tmp_path):
    """Alike and by itself, so that none waits for another; no rank reads the whole."""
    skip_before("transformers", "5.24")
    (tmp_path / "llama").mkdir()
    dense = changed(sound, tmp_path / "llama", drop=lambda name: name == f"{LAYER}mlp.up_proj.weight")
    lost = "model.layers.1.mlp.experts.5.up_proj.weight"
    (tmp_path / "moe").mkdir()
    moe = changed(sound, tmp_path / "moe", "qwen3_moe", drop=lambda name: name == lost)
    (tmp_path / "other").mkdir()
    other = changed(sound, tmp_path / "other", shape={f"{LAYER}mlp.up_proj.weight": (40, 32)})
    cases = [["fsdp2", dense], ["tensor", dense], ["fsdp2", moe], ["expert", moe], ["fsdp2", other], ["tensor", other]]
    cases += [[mode, sound / "llama"] for mode in ("fsdp2", "tensor")] + [["expert", sound / "qwen3_moe"]]
    cases = [[mode, str(folder)] for mode, folder in cases]
    run_worker(tmp_path / "out", ranks=2, worker="loading_worker.py", cases=cases)
    for rank in range(2):
        told = json.loads((tmp_path / "out" / f"told-{rank}.json").read_text())
        for (mode, folder), text in zip(cases, told, strict=True):
            place = "experts" if "qwen3_moe" in folder else "model.layers.3.mlp.up_proj.weight"
            assert text is None if "sound" in folder else text.startswith(f"`target` {folder} ") and place in text, mode


def test_a_draft_that_borrows_both_tables_has_no_tensor_of_the_vocabularys_size():
    """EAGLE-1 beside a small target: 49,152 tokens, and no tensor wider than 1,536."""
    shapes = {"fc.weight": (576, 1152), "layers.0.mlp.gate_proj.weight": (1536, 576)}
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=1)
    check_sizes("draft", "somewhere", config, shapes)
    with pytest.raises(ValueError, match="`vocab_size` in its config.json is 49,152, but its weights show 4"):
        check_sizes("draft", "somewhere", config, {**shapes, "embed_tokens.weight": (4, 576)})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8], ids=str)
def test_weights_of_whole_numbers_are_refused(sound, tmp_path, dtype):
    whole = {name: x.to(dtype) for name, x in load_file(sound / "llama" / "model.safetensors").items()}
    text = refused(changed(sound, tmp_path, extra=whole))
    assert "74 weights that are whole numbers of type" in text and "model.embed_tokens.weight" in text


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` is nan"),
        ({"rms_norm_eps": float("inf")}, "`rms_norm_eps` is inf"),
        ({"rms_norm_eps": -1.0}, "`rms_norm_eps` is -1.0"),
        *[
            ({"rope_parameters": {"rope_type": "default", "rope_theta": bad}}, "`rope_parameters.rope_theta` is")
            for bad in (0, -1.0, float("nan"), float("inf"))
        ],
    ],
)
def test_numbers_that_no_layer_computes_with_are_refused(sound, tmp_path, fields, named):
    folder = changed(sound, tmp_path)
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(held | fields))
    assert named in refused(folder)


def test_a_target_of_nan_is_named_with_its_folder(sound, tmp_path):
    broken = {name: x * torch.nan for name, x in load_file(sound / "llama" / "model.safetensors").items()}
    folder = changed(sound, tmp_path, extra=broken)
    with pytest.raises(ValueError, match=f"`target` {folder} gives NaN .* 74 of its 74 weights hold NaN or infinity"):
        FrozenTarget.from_pretrained(str(folder))(IDS)
