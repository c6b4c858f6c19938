"""Drafts that cannot be imported: refused with the name of what is in the way, and nothing of them is run."""

import json
import os
from pathlib import Path

import foreign_folders as forms
import pytest
import torch
from foreign_folders import TAP_IDS, write
from tiny_tokenizer import LLAMA3, tiny_tokenizer
from transformers import AutoTokenizer
from warm_python import warm_python

from hf_eagle import FrozenTarget, load_draft
from hf_eagle.door.sentences import is_sentence
from hf_eagle.foreign.convert import from_foreign


ROOT = Path(__file__).resolve().parents[2]


def nested(config, **fields):
    return {"transformer_layer_config": config["transformer_layer_config"] | fields}


def rope(config, **fields):
    return {"rope_scaling": fields}


def in_eagle_config(config, **fields):
    return {"eagle_config": (config.get("eagle_config") or {}) | fields}


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (forms.speculators, {"norm_before_residual": True}, "`norm_before_residual` of this draft is True.*SGLang"),
        (forms.speculators, {"norm_before_residual": None}, "`norm_before_residual` of this draft is True"),
        (forms.speculators, {"norm_before_fc": True}, "`norm_before_fc` of this draft is True"),
        (forms.speculators, {"speculators_model_type": "peagle"}, "`speculators_model_type` is 'peagle'"),
        (
            forms.speculators,
            (nested, {"model_type": "qwen3"}),
            "`model_type` of this draft's layer is 'qwen3', but .* has layers of llama: no other",
        ),
        (
            forms.speculators,
            (nested, {"layer_types": ["chunked_attention"]}),
            "`layer_types` of this draft has chunked",
        ),
        (forms.speculators, (nested, {"layer_types": ["sliding_attention"]}), "but it has no `sliding_window`"),
        (forms.nemo, {"parallel_drafting": True}, "`parallel_drafting` of this draft is True"),
        (forms.nemo, {"hidden_act": "gelu"}, "`hidden_act` of this draft is 'gelu'"),
        (forms.nemo, {"partial_rotary_factor": 0.5}, "`partial_rotary_factor` of this draft is 0.5"),
        (forms.modelopt, (in_eagle_config, {"use_aux_hidden_state": False}), "`use_aux_hidden_state` of this draft"),
        (forms.modelopt, (in_eagle_config, {"use_mtp_layernorm": True}), "`use_mtp_layernorm` of this draft is True"),
        (forms.modelopt, (in_eagle_config, {"parallel_draft_step": 4}), "`parallel_draft_step` of this draft is 4"),
        (forms.modelopt, {"rope_theta": 10000.0}, "`rope_theta` of this draft is 10000.0 and 500000.0 in one config"),
        (
            forms.specforge,
            (rope, {"type": "dynamic", "factor": 2.0}),
            "`rope_scaling` of this draft is of type 'dynamic'",
        ),
        (forms.specforge, (rope, {"type": "default", "mrope_section": [2, 3, 3]}), "is of type 'mrope'"),
        (
            forms.torchspec,
            (rope, {"type": "linear", "factor": 2.0}),
            "`rope_parameters` of a draft with latent attention",
        ),
        (forms.torchspec, {"rope_interleave": False}, "`rope_interleave` of this draft is False"),
        (forms.eagle3, {"vocab_size": 5}, "`vocab_size` of this draft is 5, but `target` .* has .*a different target"),
        (forms.eagle3, {"hidden_size": 64}, "`hidden_size` of this draft is 64.*needs its own embeddings"),
        (forms.specforge, {"target_hidden_size": 64}, "`target_hidden_size` of this draft is 64"),
        (forms.eagle3, {"num_attention_heads": None}, "`num_attention_heads` is missing in the config.json"),
        (
            forms.eagle3,
            {"intermediate_size": 41},
            r"`midlayer.mlp.gate_proj.weight` is \[40, 32\] instead of \[41, 32\]",
        ),
        (forms.specforge, {"fc_norm": True}, "`fc_norm.0.weight` is missing"),
        (forms.specforge, (in_eagle_config, {TAP_IDS: [0, 2, 4, 6]}), r"takes 3 taps, but 4 are known, \[1, 3, 5, 7\]"),
        (forms.specforge, (in_eagle_config, {TAP_IDS: [2, 0, 6]}), "`tap_ids` must be ascending"),
        (forms.specforge, {"tokenizer_fingerprint": "0" * 16}, "has a different tokenizer from `target`"),
    ],
)
def test_flags_and_sizes_are_refused_by_name(build, change, message, target_folder, embedding, tmp_path):
    config, tensors = build(embedding)
    changes = change[0](config, **change[1]) if isinstance(change, tuple) else change
    write(tmp_path, config | changes, tensors)
    with pytest.raises(ValueError, match=message):
        from_foreign(tmp_path, target_folder)


def bias(name, size=32):
    return lambda t: t | {name: torch.ones(size)}


def second_layer(t):
    return t | {"layers.1.hidden_norm.weight": torch.ones(32)}


def absolute_ids(t):
    return t | {"d2t": torch.arange(24) + t["d2t"]}


def unset_mapping(t):
    return t | {"d2t": torch.zeros(24, dtype=torch.long), "t2d": torch.ones_like(t["t2d"])}


def rows_by_offset(t):
    """What TorchSpec's converter makes when it prunes."""
    d2t = torch.tensor([3] * 10 + [7] * 14)
    t2d = torch.zeros_like(t["t2d"])
    t2d[torch.arange(24) + d2t] = True
    return t | {"d2t": d2t, "t2d": t2d, "lm_head.weight": torch.randn(len(t2d), 32)[d2t]}


def trained_embeddings(t):
    embedding = t["embed_tokens.weight"].clone()
    embedding[5] += 0.1
    return t | {"embed_tokens.weight": embedding}


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (forms.modelopt, bias("layers.0.self_attn.q_proj.bias"), "`attention_bias`: this draft holds a bias"),
        (forms.eagle3, bias("midlayer.mlp.up_proj.bias", 40), "`mlp_bias`: this draft holds a bias"),
        (forms.eagle3, bias("fc.bias"), "`fc.bias`: this draft holds a bias"),
        (forms.modelopt, second_layer, "`num_hidden_layers` of this draft is 2"),
        (forms.nemo, bias("model.mask_hidden"), "`mask_hidden` shows `parallel_drafting`"),
        (
            forms.specforge,
            bias("midlayer.self_attn.q_norm.weight", 16),
            "`midlayer.self_attn.q_norm.weight` is unexpected",
        ),
        (forms.eagle1, bias("layers.0.input_layernorm.weight"), "`layers.0.input_layernorm.weight` is unexpected"),
        (forms.eagle3, lambda t: {n: x for n, x in t.items() if n != "norm.weight"}, "`norm.weight` is missing"),
        (forms.eagle3, lambda t: {n: x for n, x in t.items() if n != "d2t"}, "`d2t` is missing"),
        (forms.eagle3, lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"}, "`lm_head.weight` is missing"),
        (forms.modelopt, absolute_ids, "Were absolute ids stored"),
        (forms.specforge, unset_mapping, "`t2d` of this draft marks .* vocabulary mapping was never set"),
        (forms.specforge, rows_by_offset, "pruned by the offsets in `d2t` instead of by token ids"),
        (forms.specforge, trained_embeddings, "`embed_tokens` of this draft differs from the target's in 1 of"),
        (forms.modelopt, lambda t: t | {"fc.weight": t["fc.weight"].to(torch.float8_e4m3fn)}, "a quantised draft"),
        (forms.eagle3, lambda t: t | {"fc.weight": t["fc.weight"] * float("nan")}, "`draft` .* holds NaN or infinity"),
        (forms.eagle1, lambda t: t | {"fc.weight": t["fc.weight"] / 0}, "`draft` .* holds NaN or infinity in 1 of"),
        (forms.eagle3, lambda t: t | {"fc.weight": t["fc.weight"].long()}, "`fc.weight` is stored as int64"),
    ],
)
def test_tensors_are_refused_by_name(build, change, message, target_folder, embedding, tmp_path):
    config, tensors = build(embedding)
    write(tmp_path, config, change(tensors))
    with pytest.raises(ValueError, match=message):
        from_foreign(tmp_path, target_folder)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (forms.eagle1, {"tap_ids": [1, 2, 3]}, "an EAGLE-1 draft has no taps"),
        (forms.eagle3, {"drop_fc_bias": True}, "`drop_fc_bias` is for EAGLE-1 drafts"),
        (forms.eagle3, {"rope_theta": 0.0}, "`rope_theta` must be above 0"),
        (forms.eagle3, {"form": "medusa"}, "`form` must be auto or one of eagle1, eagle3"),
        (forms.eagle3, {"form": "nemo", "tap_ids": [1, 9, 2]}, "`tap_ids` must be entry ids between 0 and 8"),
    ],
)
def test_options_that_mean_nothing_are_refused(build, options, message, target_folder, embedding, tmp_path):
    write(tmp_path, *build(embedding))
    with pytest.raises(ValueError, match=message):
        from_foreign(tmp_path, target_folder, **options)


def test_nemos_latent_attention_has_no_temperature(target_folder, embedding, tmp_path):
    config, tensors = forms.torchspec(embedding)
    write(tmp_path, config, {n if n.startswith("lm_head") else f"model.{n}": x for n, x in tensors.items()})
    with pytest.raises(ValueError, match="`mscale_all_dim` of this draft is set, but NeMo trains"):
        from_foreign(tmp_path, target_folder)


def test_another_tokenizer_is_noticed_and_the_targets_is_written_down(target_folder, embedding, tmp_path, caplog):
    config, tensors = forms.specforge(embedding)
    AutoTokenizer.from_pretrained(target_folder).save_pretrained(write(tmp_path / "same", config, tensors))
    assert len(from_foreign(tmp_path / "same", target_folder).config.tokenizer_fingerprint) == 16
    other = tiny_tokenizer(LLAMA3)
    other.add_tokens(["anothertoken"])
    other.save_pretrained(write(tmp_path / "other", config, tensors))
    with pytest.raises(ValueError, match="has a different tokenizer"):
        from_foreign(tmp_path / "other", target_folder)

    bare = tmp_path / "bare"  # a target of which only the config is there
    bare.mkdir()
    (bare / "config.json").write_bytes((target_folder / "config.json").read_bytes())
    assert from_foreign(tmp_path / "same", bare).config.tokenizer_fingerprint is None
    assert "has no tokenizer" in caplog.text and "were not compared" in caplog.text


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_is_not_run(target_folder, embedding, tmp_path):
    config, tensors = forms.eagle3(embedding)
    write(tmp_path / "draft", config, tensors, "pytorch_model.bin")
    torch.save(tensors | {"norm.weight": Harmful(str(tmp_path / "made"))}, tmp_path / "draft" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors, or is damaged, and is not run"):
        from_foreign(tmp_path / "draft", target_folder)
    assert not (tmp_path / "made").exists()
    torch.save({"state_dict": tensors}, tmp_path / "draft" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold tensors by name, and nothing else"):
        from_foreign(tmp_path / "draft", target_folder)
    (tmp_path / "draft" / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="is damaged"):
        from_foreign(tmp_path / "draft", target_folder)
    (tmp_path / "draft" / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="holds no weights: looked for model.safetensors"):
        from_foreign(tmp_path / "draft", target_folder)


def run(*options):
    done = warm_python().run(ROOT / "scripts" / "import_draft.py", *options)
    return done.returncode, done.stdout, done.stderr


def test_the_script_imports_and_never_overwrites(target_folder, embedding, tmp_path):
    write(tmp_path / "foreign", *forms.modelopt(embedding))
    out = tmp_path / "ours"
    options = (tmp_path / "foreign", "--target", target_folder, "--output_dir", out)
    code, printed, problems = run(*options)
    assert code == 0, problems
    assert "in the form `modelopt` (NVIDIA ModelOpt)" in printed
    assert "taps: the inputs of layers 2, 4, 5 (from its config)" in printed and "RoPE: default, base 500000" in printed
    assert "LlamaForCausalLMEagle3" in printed and "torch.float32, 24 draft tokens" in printed
    draft = load_draft(out, FrozenTarget.from_pretrained(str(target_folder)))
    assert draft.config.draft_vocab_size == 24 and draft.config.tokenizer_fingerprint
    before = (out / "model.safetensors").read_bytes()

    code, _, problems = run(*options)
    assert code and "`output_dir`" in problems and "is not empty" in problems
    assert "Traceback" not in problems and (out / "model.safetensors").read_bytes() == before

    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config | {"norm_before_residual": True}))
    code, _, problems = run(*options[:-1], tmp_path / "other")
    assert code and problems.startswith("error: `norm_before_residual`") and len(problems.splitlines()) == 1
    assert not (tmp_path / "other").exists()


BUILDS = [forms.modelopt, forms.eagle3, forms.speculators, forms.torchspec, forms.nemo, forms.specforge, forms.eagle1]
FIELDS = [
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "rms_norm_eps",
]
FIELDS += ["eagle_config", "architectures", "transformer_layer_config", "head_dim", "kv_lora_rank", "draft_vocab_size"]


@pytest.mark.parametrize("build", BUILDS)
def test_fields_of_any_type_are_refused_in_a_sentence_or_taken(build, target_folder, embedding, tmp_path):
    config, tensors = build(embedding)
    for field in FIELDS:
        for value in ("x", [1.5], {}, 7):
            write(tmp_path / "draft", config | {field: value}, tensors)
            try:
                from_foreign(tmp_path / "draft", target_folder)
            except (OSError, ValueError) as problem:
                assert is_sentence(problem), (field, value, problem)
                assert "\n" not in str(problem) and "`" in str(problem)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[]", "config.json must hold an object, but holds a list"),
        ("config.json", b"{oops", "config.json cannot be read as JSON"),
        ("config.json", None, "holds no config.json: name the folder of a draft"),
        ("model.safetensors", b"", "model.safetensors is cut, it has 0 bytes"),
        ("model.safetensors", b"nothing", "model.safetensors is cut"),
        ("model.safetensors.index.json", b"[]", "model.safetensors.index.json must hold an object"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "must hold text as `weight_map"),
        ("tokenizer.json", b"{oops", "tokenizer.json cannot be read as JSON"),
    ],
)
def test_files_that_are_broken_are_named(name, content, message, target_folder, embedding, tmp_path):
    folder = tmp_path / "draft"
    write(folder, *forms.modelopt(embedding))
    if "index" in name:
        (folder / "model.safetensors").unlink()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as problem:
        from_foreign(folder, target_folder)
    text = str(problem.value)
    assert text.startswith(f"`draft` {folder} ") and message in text and "\n" not in text


def test_a_draft_or_target_that_is_not_there(target_folder, embedding, tmp_path):
    write(tmp_path / "draft", *forms.modelopt(embedding))
    with pytest.raises(OSError, match="^`draft` /no/such/draft does not exist: correct the path"):
        from_foreign("/no/such/draft", target_folder)
    with pytest.raises(OSError, match="^`target` /no/such/target does not exist: correct the path"):
        from_foreign(tmp_path / "draft", "/no/such/target")


@pytest.mark.parametrize("place", ["top", "eagle_config"])
def test_taps_that_disagree_with_the_drafts_files_are_refused(place, target_folder, embedding, tmp_path):
    config, tensors = forms.eagle3(embedding)
    own = {TAP_IDS: [1, 4, 6]} if place == "top" else {"eagle_config": {TAP_IDS: [0, 3, 5]}}
    write(tmp_path, config | own, tensors)
    with pytest.raises(
        ValueError, match=r"`tap_ids` is \[1, 2, 3\], but the draft's own files say that it was trained on \[1, 4, 6\]"
    ):
        from_foreign(tmp_path, target_folder, tap_ids=[1, 2, 3])
    assert from_foreign(tmp_path, target_folder, tap_ids=[1, 4, 6]).config.tap_ids == [1, 4, 6]


@pytest.mark.parametrize("field", [{"rms_norm_eps": float("nan")}, {"rms_norm_eps": None}, {"rope_theta": 0}])
def test_numbers_that_no_layer_computes_with_are_refused(field, target_folder, embedding, tmp_path):
    config, tensors = forms.eagle3(embedding)
    write(tmp_path, config | field, tensors)
    with pytest.raises(ValueError, match=f"`draft` {tmp_path}.*`{next(iter(field))}` is"):
        from_foreign(tmp_path, target_folder)
