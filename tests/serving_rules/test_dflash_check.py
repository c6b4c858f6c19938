"""The check of DFlash folders: both forms pass, planted faults are caught, and mended where the folder still knows."""

import json
import shutil

import pytest
import torch
from foreign_folders import (
    BLOCK,
    HEADS,
    KV_HEADS,
    MASK,
    OUTPUTS,
    block_config,
    random_blocks,
    speculators,
    speculators_blocks,
    write,
)
from foreign_math import block_logits
from safetensors.torch import load_file
from test_serving_check import ROPES, damaged, faults, nan, prefix, put, run, tensor
from tiny import tiny_llama
from tiny_blocks import tiny_block_pair
from transformers import LlamaConfig

from hf_eagle import load_draft
from hf_eagle.drafts.dflash.modeling import DFlashLayer
from hf_eagle.serving.check import check_draft
from hf_eagle.serving.commands import serve_commands, tokens_of_a_round
from hf_eagle.serving.draft_folder import DraftFolder
from hf_eagle.serving.kinds import SERVED, kind_of
from hf_eagle.serving.kinds.dflash_math import ServedDFlash
from hf_eagle.serving.probe import probe
from hf_eagle.serving.repair import repair_draft
from hf_eagle.targets.target import FrozenTarget


LAYERS = 2
ROPE = {"rope_type": "default", "rope_theta": 20000.0}
WIDTH = 12  # of a head: neither 128 nor hidden over heads


def whole(layers=LAYERS, second=False):
    """Config and tensors with all that the readers of a form ask for."""
    taps = {"mask_token_id": MASK, "target_layer_ids": OUTPUTS}
    config = block_config(96, layers, rope_parameters=ROPE, dflash_config=taps, sliding_window=None)
    config |= {"dtype": "float32", "torch_dtype": "float32", "head_dim": WIDTH}
    tensors = random_blocks(layers, WIDTH)
    for number in range(layers):
        name = f"layers.{number}.self_attn.k_norm.weight"
        tensors[name] = tensors["layers.0.self_attn.k_norm.weight"].clone()
    del config["use_cache"]
    if second:
        config |= {"model_type": "muse_glimmer_assistant", "sliding_window": 2048, **taps}
        tensors["encoder.fc.weight"] = tensors.pop("fc.weight")
        tensors["encoder.output_norm_enc.weight"] = tensors.pop("hidden_norm.weight")
    return config, tensors


@pytest.fixture(scope="module")
def target():
    return tiny_llama()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, target):
    """form -> a folder without a fault."""
    folder = tmp_path_factory.mktemp("drafts")
    made = {"main": whole(), "second": whole(second=True)}
    return {form: write(folder / form, *content) for form, content in made.items()}


def logits(folder, target):
    """Of a block behind six rows of random features, by a mathematics of its own."""
    features = torch.randn(6, len(OUTPUTS) * 32, generator=torch.Generator().manual_seed(3))
    return reference_logits(folder, target, 17, features)


def reference_logits(folder, target, newest, features):
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    lent = target.get_input_embeddings().weight.detach(), target.lm_head.weight.detach()
    shape = config["num_attention_heads"], config["dflash_config"]["mask_token_id"], config["block_size"]
    rope = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]
    return block_logits(tensors, *lent, newest, features, *shape, *rope)


# ---- what passes ----


@pytest.mark.parametrize("form", ["main", "second"])
def test_a_whole_folder_of_either_form_passes(form, folders, target):
    assert faults(folders[form]) == faults(folders[form], target) == []
    assert kind_of(DraftFolder.read(folders[form])) is SERVED["dflash"]


@pytest.mark.parametrize("layers", [1, 3])
def test_any_number_of_layers_passes(layers, target, tmp_path):
    assert faults(write(tmp_path, *whole(layers)), target) == []


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("architecture", ["DFlashDraftModel"])
def test_vllm_reads_either_type_as_the_same_class(model_type, architecture, target, folders, tmp_path):
    damaged(folders["main"], tmp_path / "draft", put(model_type=model_type, architectures=[architecture]))
    assert faults(tmp_path / "draft", target) == []


def test_the_form_says_which_readers_take_it(folders):
    found = [[x for x in check_draft(folders[form]) if x.reader == "transformers"] for form in ("main", "second")]
    (main,), (second,) = ([str(x) for x in notes] for notes in found)
    assert main.startswith("transformers: (note) ") and second.startswith("transformers: (note) ")
    assert "read by vLLM, SGLang and z-lab's code" in main and "`--served_form transformers`" in main
    assert "read by vLLM, SGLang and transformers" in second and "z-lab's own code does not read it" in second


@pytest.mark.parametrize("model_type", ["dflash", "bert"])
def test_of_a_type_that_servers_refuse_it_is_not_said_that_they_read_it(model_type, folders, target, tmp_path):
    damaged(folders["main"], tmp_path / "draft", put(model_type=model_type))
    found = check_draft(tmp_path / "draft", target.config)
    assert {"vLLM", "SGLang"} <= {x.reader for x in found if "type" in x.text and x.level != "note"}
    assert not any("is read by" in x.text for x in found)


def test_fields_that_say_the_same_twice_are_no_fault(folders, target, tmp_path):
    """Entry ids of the taps are output ids plus one; causality that is off; a block in both places."""
    taps = {"mask_token_id": MASK, "target_layer_ids": OUTPUTS, "block_size": BLOCK, "causal": False}
    same = {"eagle_aux_hidden_state_layer_ids": [i + 1 for i in OUTPUTS], "is_causal": False, "dflash_config": taps}
    damaged(folders["main"], tmp_path / "draft", put(**same))
    assert faults(tmp_path / "draft", target) == []


@pytest.mark.parametrize("form", ["servers", "transformers"])
@pytest.mark.parametrize("options", [{}, {"draft_num_layers": 3}, {"draft_num_layers": 2, "share_k_norm": True}])
@pytest.mark.parametrize("rope", [None, *ROPES])
def test_every_draft_that_is_made_passes_and_is_restated(form, options, rope, target, tmp_path):
    model = tiny_llama(rope_parameters=ROPES[rope]) if rope else target
    model.save_pretrained(tmp_path / "target")
    _, draft = tiny_block_pair(FrozenTarget(model), served_form=form, **options)
    draft.save_pretrained(tmp_path / "draft")
    assert faults(tmp_path / "draft") == faults(tmp_path / "draft", model) == []
    assert probe(tmp_path / "draft", tmp_path / "target", model.config) == []


def test_the_probe_notices_a_change_of_our_model(target, tmp_path, monkeypatch):
    target.save_pretrained(tmp_path / "target")
    _, draft = tiny_block_pair(FrozenTarget(target), draft_num_layers=2)
    draft.save_pretrained(tmp_path / "draft")
    monkeypatch.setattr(DFlashLayer, "context", lambda layer, x, cos_sin: layer.block(x, cos_sin)[1:])
    (found,) = probe(tmp_path / "draft", tmp_path / "target", target.config)
    assert "the draft that was trained is not the one that is served" in found.text


# ---- planted faults ----


def nested(**fields):
    """Change fields of `dflash_config`; `...` takes one out."""

    def change(config, tensors):
        config["dflash_config"] = {**config["dflash_config"], **fields}
        for name in [name for name, value in config["dflash_config"].items() if value is ...]:
            del config["dflash_config"][name]

    return change


def both(*changes):
    def change(config, tensors):
        for one in changes:
            one(config, tensors)

    return change


def renamed(old, new):
    return lambda config, tensors: tensors.update({new: tensors.pop(old)})


def without(name):
    return tensor(name, lambda x: None)


def mapped(config, tensors):
    """A vocabulary of 24 tokens, its head and its map."""
    config["draft_vocab_size"] = 24
    tensors |= {"lm_head.weight": torch.ones(24, 32), "d2t": torch.zeros(24, dtype=torch.long)}


ATTENTION = "layers.0.self_attn"
TYPES = ["full_attention", "sliding_attention"]
PLAIN = {"rope_type": "default"}
# name -> (form, how it is planted, words of a finding, whether `--fix` mends it)
PLANTED = {
    # tensors
    "no fc": ("main", without("fc.weight"), "`fc.weight` is missing: it loads silently", None),
    "no hidden_norm": ("main", without("hidden_norm.weight"), "`hidden_norm.weight` is missing: it loads", False),
    "no q_norm": ("main", without(f"{ATTENTION}.q_norm.weight"), "q_norm.weight` is missing: it loads", False),
    "no k_norm": ("main", without("layers.1.self_attn.k_norm.weight"), "k_norm.weight` is missing: it loads", False),
    "no norm": ("main", without("norm.weight"), "`norm.weight` is missing: it silently stays random", False),
    "second form without fc": ("second", without("encoder.fc.weight"), "`fc.weight` is missing: it loads", None),
    "model. prefix": ("main", prefix, "loading fails. Fix: take `model.` off", True),
    "verifier_norm": ("main", tensor("verifier_norm.weight", lambda x: torch.ones(32)), "loading fails", False),
    "mask_hidden": ("main", tensor("mask_hidden", lambda x: torch.ones(32)), "`mask_hidden` has no parameter", False),
    "a trained bias": ("main", tensor(f"{ATTENTION}.q_proj.bias", lambda x: torch.ones(48)), "silently dropped", False),
    "a bias of zeros": (
        "main",
        tensor(f"{ATTENTION}.q_proj.bias", lambda x: torch.zeros(48)),
        "silently dropped",
        True,
    ),
    "attention_bias": ("main", put(attention_bias=True), "biases of uninitialised memory are added", True),
    "own embeddings": ("main", tensor("embed_tokens.weight", lambda x: torch.ones(96, 32)), "which SGLang uses", True),
    "own head": ("main", tensor("lm_head.weight", lambda x: torch.ones(96, 32)), "`lm_head.weight` is used", False),
    "NaN": ("main", tensor("fc.weight", nan), "`fc.weight` holds NaN or infinity", False),
    "names of the other form": (
        "second",
        renamed("encoder.fc.weight", "fc.weight"),
        "has another name here, `encoder.fc.weight`",
        True,
    ),
    "dtypes": ("main", tensor("norm.weight", lambda x: x.double()), "several dtypes", True),
    # sizes
    "too many layers": ("main", put(num_hidden_layers=4), "is 4, but there are tensors of 2: layers without", True),
    "no head_dim": ("main", put(head_dim=...), "`head_dim` is missing: 128 is taken, but the tensors have 12", True),
    "no head_dim, SGLang": ("main", put(head_dim=...), "missing: 8, `hidden_size` over heads, is taken", True),
    "no kv heads": ("main", put(num_key_value_heads=...), "`num_key_value_heads` is missing: 32 are taken", True),
    "second form, no kv heads": ("second", put(num_key_value_heads=...), "is missing: 32 are taken, and loading", True),
    "vocab_size of another": ("main", put(vocab_size=95), "`vocab_size` is 95, the target's is 96", False),
    "no vocab_size": ("main", put(vocab_size=...), "`vocab_size` is missing in config.json", None),
    "hidden_size of another": ("main", put(target_hidden_size=64), "`target_hidden_size` is 64", False),
    "no eps": ("main", put(rms_norm_eps=...), "vLLM and SGLang take 1e-6, transformers 1e-5", None),
    "a short context": ("main", put(max_position_embeddings=64), "silently drafts zeros", True),
    "no context": ("main", put(max_position_embeddings=...), "`max_position_embeddings` is missing", True),
    # class and type
    "a plain architecture": ("main", put(architectures=["Qwen3ForCausalLM"]), "none of which runs this draft", True),
    "DraftModel": ("main", put(architectures=["DraftModel"]), "['DraftModel'], none of which runs this draft", True),
    "for vLLM alone": ("second", put(architectures=["MuseGlimmerAssistantModel"]), "does not name DFlashDraft", True),
    "model_type dflash": ("main", put(model_type="dflash"), "`model_type` 'dflash' for such a draft is not", True),
    "DSpark": ("main", put(architectures=["Qwen3DSparkModel"]), "slot k predicts the token after its own", False),
    "DSpark of rank 0": ("main", put(markov_rank=0), "slot k predicts the token after its own", False),
    "DSpark by its head": (
        "main",
        lambda config, tensors: tensors.update({"markov_head.markov_w1.weight": torch.ones(96, 4)}),
        "`markov_head.markov_w1.weight` shows a DSpark draft",
        False,
    ),
    # taps
    "no taps": ("main", nested(target_layer_ids=...), "`dflash_config.target_layer_ids` is missing", False),
    "taps at top level": (
        "main",
        both(nested(target_layer_ids=...), put(target_layer_ids=OUTPUTS)),
        "`target_layer_ids` is at top level only: loading fails",
        True,
    ),
    "taps in no order": ("main", nested(target_layer_ids=[6, 1, 3]), "is recorded in the order of layers", False),
    "a tap too few": ("main", nested(target_layer_ids=[1, 3]), "`fc.weight` is [32, 96] where", False),
    "taps of a deeper target": (
        "main",
        nested(target_layer_ids=[1, 3, 8]),
        "a target of 8 layers does not have",
        False,
    ),
    "the last layer": ("main", nested(target_layer_ids=[1, 3, 7]), "names 7, the last layer", False),
    "the embeddings": ("main", nested(target_layer_ids=[-1, 1, 3]), "names -1, the embeddings", False),
    "taps of words": ("main", nested(target_layer_ids=["1", "3"]), "`dflash_config.target_layer_ids` is ['1'", False),
    "vLLM's field of entries": (
        "main",
        put(eagle_aux_hidden_state_layer_ids=OUTPUTS),
        "[1, 3, 6] wins over `target_layer_ids` [1, 3, 6]: the INPUTS",
        True,
    ),
    "eagle_config": ("main", put(eagle_config={"use_aux_hidden_state": True}), "and the server crashes", True),
    "no features": ("main", nested(use_aux_hidden_state=False), "gets the last hidden state instead", False),
    "num_target_layers": ("main", put(num_target_layers=9), "`num_target_layers` is 9, the target has 8", True),
    "taps differ": ("second", put(target_layer_ids=[2, 3, 6]), "[2, 3, 6] at top level and [1, 3, 6] in", False),
    # mask token
    "no mask": ("main", nested(mask_token_id=...), "`dflash_config.mask_token_id` is missing: the draft is ref", False),
    "mask null": ("main", nested(mask_token_id=None), "`mask_token_id` is None, no token", False),
    "mask negative": ("main", nested(mask_token_id=-1), "`mask_token_id` is -1, no token", False),
    "mask outside": ("main", nested(mask_token_id=96), "is 96, but the table has 96 rows: vLLM on a CPU sil", False),
    "masks differ": ("second", put(mask_token_id=8), "`mask_token_id` is 8 at top level", False),
    # a block
    "no block_size": ("main", put(block_size=...), "`block_size` is missing: without `--speculative-num", False),
    "a block of one": ("main", put(block_size=1), "`block_size` is 1, and must be a whole number of at", False),
    "blocks differ": ("main", nested(block_size=8), "`block_size` is 5 at top level", False),
    "is_causal": ("main", put(is_causal=True), "`is_causal` is true: a slot does not see", False),
    "causal": ("main", nested(causal=True), "`dflash_config.causal` is true", False),
    # windows
    "a window": ("main", put(layer_types=TYPES), "asks for sliding attention: it hides keys", False),
    "types of one layer": ("main", put(layer_types=TYPES[:1]), "must name the attention of 2 layers", True),
    "types of no kind": ("main", put(layer_types=["full", "full"]), "must name the attention of 2 layers", True),
    "use_swa": ("main", nested(use_swa=True), "`dflash_config.use_swa`", False),
    "a window of the class": (
        "main",
        put(use_sliding_window=True, sliding_window=16, max_window_layers=1, layer_types=...),
        "`use_sliding_window` without `layer_types`, asks for sliding attention",
        False,
    ),
    "a window of the class's own": (
        "main",
        put(use_sliding_window=True, sliding_window=..., max_window_layers=0, layer_types=...),
        "`use_sliding_window` without `layer_types`, asks for sliding attention",
        False,
    ),
    # vocabulary
    "a vocabulary without a map": ("main", put(draft_vocab_size=24), "is 24 without a `d2t`", False),
    "a vocabulary of its own": ("main", mapped, "are not supported, the target's head is run", False),
    "a map of all tokens": (
        "main",
        tensor("d2t", lambda x: torch.zeros(96, dtype=torch.long)),
        "`d2t` has no parameter where the draft has the whole",
        True,
    ),
    # RoPE
    "theta lost": ("main", put(rope_theta=..., rope_parameters=PLAIN), "no RoPE base is written: 10000", False),
    "new rope alone": ("main", put(rope_theta=..., rope_scaling=...), "only in the new spelling", True),
    "old rope alone": ("main", put(rope_parameters=...), "only in the old spelling", True),
    "two bases": ("main", put(rope_theta=5e5), "two spellings of RoPE disagree", False),
    "pairs rotated": ("main", put(is_neox_style=False), "`is_neox_style` is False: vLLM computes with it", False),
    "logit_scale": ("main", put(logit_scale=-0.5), "`logit_scale` is -0.5: vLLM computes with it", False),
    "logit_scale null": ("main", put(logit_scale=None), "`logit_scale` is None: vLLM computes with it", True),
    "activation": ("main", put(hidden_act="gelu"), "only silu is run", False),
    # transformers' defaults
    "second form, no mask on top": ("second", put(mask_token_id=...), "201818 is taken, silently", True),
    "second form, no taps on top": ("second", put(target_layer_ids=...), "[1, 13, 25, 37, 49] is taken", True),
    "second form, no block": ("second", put(block_size=...), "`block_size` is missing: 16 is taken", False),
    "second form, no types": ("second", put(layer_types=...), "sliding attention is taken for all layers", True),
    "second form, no window": ("second", put(sliding_window=None), "`sliding_window` is null, and the config", True),
    "second form, old rope": ("second", put(rope_parameters=...), "500000 is taken, silently", True),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_caught_and_mended_where_it_can_be(name, folders, target, tmp_path):
    """`None` of `mends` is for what `--fix` refuses, or cannot be told apart from a draft without a fault."""
    form, change, words, mends = PLANTED[name]
    damaged(folders[form], tmp_path / "draft", change)
    found = faults(tmp_path / "draft", target)
    assert any(words in line for line in found), found
    assert all(line.count(" Fix: ") == 1 and line.endswith(".") and "\n" not in line for line in found)
    if mends is None:
        return

    done = repair_draft(tmp_path / "draft", tmp_path / "mended", target.config)
    left = faults(tmp_path / "mended", target)
    if mends:
        assert done and left == []
        torch.testing.assert_close(logits(tmp_path / "mended", target), logits(folders[form], target))
    else:
        assert any(words in line for line in left), left


def test_a_mask_embedding_beside_the_weights_is_a_finding(folders, target, tmp_path):
    shutil.copytree(folders["main"], tmp_path / "draft")
    torch.save({"embedding": torch.ones(32), "mask_token_id": MASK}, tmp_path / "draft" / "mask_embedding.pt")
    (found,) = faults(tmp_path / "draft", target)
    assert "`mask_embedding.pt` replaces the embedding of the mask token" in found
    repair_draft(tmp_path / "draft", tmp_path / "mended", target.config)
    assert faults(tmp_path / "mended", target) == []


def test_a_whole_draft_is_mended_by_leaving_it_as_it_is(folders, target, tmp_path):
    for form, folder in folders.items():
        assert repair_draft(folder, tmp_path / form, target.config) == []
        assert load_file(folder / "model.safetensors").keys() == load_file(tmp_path / form / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("model_type", "factors", "told"),
    [
        ("gemma2", {}, True),
        ("gemma3_text", {}, True),
        ("granite", {"embedding_multiplier": 12.0}, True),
        ("granite", {"embedding_multiplier": 1.0}, False),
        ("falcon_h1", {"embedding_multiplier": 5.6}, True),
        ("minicpm", {"scale_emb": 12}, True),
        ("llama", {}, False),
    ],
)
def test_a_target_that_scales_its_embeddings_is_a_limit(model_type, factors, told, folders):
    """As training decides it, which refuses such a target."""
    fields = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 8, "max_position_embeddings": 512}
    scaling = LlamaConfig(**fields)
    vars(scaling).update(factors)
    scaling.model_type = model_type
    found = [x.text for x in check_draft(folders["main"], scaling) if x.level == "limit"]
    assert [f"a target of type {model_type} scales its embeddings" in text for text in found] == [True] * told


@pytest.mark.parametrize("form", ["main", "second"])
def test_a_head_in_the_file_is_told_alike_by_the_check_and_by_loading(form, folders, target, tmp_path):
    """vLLM uses it, SGLang and transformers do not."""
    folder = tmp_path / "draft"
    damaged(folders[form], folder, tensor("lm_head.weight", lambda x: torch.ones(96, 32)))
    with pytest.raises(ValueError, match="refuse, ignore or use one of its own: remove it if it is a copy of the"):
        load_draft(folder)

    (found,) = [x for x in check_draft(folder, target.config) if x.level != "note"]
    assert "is used instead of the target's head, which SGLang and transformers use" in found.text
    assert "remove it if it is a copy of the target's" in found.fix and "cannot be served alike" in found.fix


@pytest.mark.parametrize("field", ["architectures", "model_type", "dflash_config", "layer_types", "block_size"])
@pytest.mark.parametrize("dspark", [False, True])
@pytest.mark.parametrize("form", ["main", "second"])
def test_a_copy_is_mended_whatever_field_is_missing(form, dspark, field, folders, tmp_path):
    damaged(folders[form], tmp_path / "draft", put(**({"markov_rank": 0} if dspark else {}), **{field: ...}))
    repair_draft(tmp_path / "draft", tmp_path / "mended")
    assert (tmp_path / "mended" / "config.json").exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, True),
        ({"layer_types": ["sliding_attention"] * 8}, True),
        ({"layer_types": ["sliding_attention", "full_attention"] * 4}, False),
        ({"sliding_window": 512}, False),  # the whole context
        ({"sliding_window": None}, False),
    ],
)
def test_the_window_of_a_target_all_of_whose_layers_slide_is_a_limit(fields, told, folders):
    """vLLM gives it to the draft, whose config cannot say otherwise."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 8, "max_position_embeddings": 512}
    config = LlamaConfig(**sizes)
    vars(config).update({"layer_types": None, "sliding_window": 16, **fields})
    for form in folders.values():
        found = [x for x in check_draft(form, config) if x.level == "limit"]
        assert [x.reader for x in found] == ["vLLM"] * told
        assert all("its window of 16 tokens to the draft" in x.text for x in found)


# ---- notes ----


@pytest.mark.parametrize(("layers", "told"), [(1, False), (2, True), (3, True)])
def test_the_key_norms_of_vllm_on_a_cpu_are_noted_where_they_differ(layers, told, target, tmp_path):
    config, tensors = whole(layers)
    assert not any("k_norm" in str(x) for x in check_draft(write(tmp_path / "equal", config, tensors), target.config))
    last = f"layers.{layers - 1}.self_attn.k_norm.weight"
    tensors[last] = tensors[last] + 0.1
    found = check_draft(write(tmp_path / "own", config, tensors), target.config)
    assert [x.level for x in found if "on a CPU alone" in x.text and "`--share_k_norm`" in x.fix] == ["note"] * told


@pytest.mark.parametrize(("count", "told"), [(None, False), (BLOCK - 1, False), (BLOCK, True), (1, True)])
def test_another_number_of_tokens_than_trained_is_noted(count, told, folders):
    found = [x for x in check_draft(folders["main"], num_speculative_tokens=count) if "speculative" in x.text]
    assert [x.level for x in found] == ["note"] * told
    assert all(f"is {count}, but the draft was trained to draft {BLOCK - 1}" in x.text for x in found)


# ---- other forms ----


@pytest.mark.parametrize(("non_causal", "told"), [(False, True), (True, False), (None, False)])
def test_speculators_form_is_told_with_its_trap(non_causal, told, target, tmp_path):
    config, tensors = speculators_blocks(target.get_input_embeddings().weight.detach())
    config["sliding_window_non_causal"] = non_causal
    found = faults(write(tmp_path, {k: v for k, v in config.items() if v is not None}, tensors), target)
    assert "the config is in the form of vLLM's speculators" in found[0]
    assert any("vLLM makes ALL layers causal of it" in line for line in found) == told and len(found) == 1 + told


def test_speculators_form_of_other_kinds_is_told_without_that_trap(target, tmp_path):
    (found,) = faults(write(tmp_path, *speculators(target.get_input_embeddings().weight.detach())), target)
    assert "the config is in the form of vLLM's speculators" in found


@pytest.mark.parametrize("field", ["head_dim", "num_key_value_heads", "layer_types", "model_type", "block_size"])
@pytest.mark.parametrize("value", ["x", [1.5], [{}], {}, None, True, 0], ids=str)
def test_fields_of_any_type_are_findings_or_taken(field, value, folders, target, tmp_path):
    damaged(folders["second"], tmp_path / "draft", both(put(**{field: value}), nested(**{field: value})))
    check_draft(tmp_path / "draft", target.config)
    repair_draft(tmp_path / "draft", tmp_path / "mended", target.config)


def test_the_script_compares_logits_and_numbers_of_tokens(target, tmp_path, monkeypatch, capsys):
    target.save_pretrained(tmp_path / "target")
    _, draft = tiny_block_pair(FrozenTarget(target), served_form="transformers")
    draft.save_pretrained(tmp_path / "draft")
    asked = ("--target", tmp_path / "target", "--num_speculative_tokens", 6)
    code, printed = run(monkeypatch, capsys, tmp_path / "draft", *asked)
    assert code == 0 and "serve it as it was trained." in printed.out
    assert "`num_speculative_tokens` is 6, but the draft was trained to draft 4" in printed.out


# ---- mathematics and commands ----


@pytest.mark.parametrize("form", ["main", "second"])
def test_the_restated_mathematics_is_a_blocks(form, folders, target):
    folder = DraftFolder.read(folders[form])
    table, head = target.get_input_embeddings().weight.detach(), target.lm_head.weight.detach()
    served = ServedDFlash(folder.config, {name: folder.tensor(name) for name in folder.shapes}, table, head)
    assert served.feature_width == 96
    generator = torch.Generator().manual_seed(1)
    ids, features = torch.randint(0, 96, (15,), generator=generator), torch.randn(12, 96, generator=generator)

    wanted = [reference_logits(folders[form], target, int(ids[end - 1]), features[:end]) for end in (10, 11, 12)]
    torch.testing.assert_close(served.drafted_logits(ids, features), torch.cat(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["main", "second"])
def test_commands_draft_what_was_trained(form, folders):
    config = json.loads((folders[form] / "config.json").read_text())
    count = tokens_of_a_round("dflash", config)
    commands = serve_commands("me/target", str(folders[form]), count, "dflash", config=config)
    assert count == BLOCK - 1 and '"method": "dflash"' in commands["vLLM"]
    assert '"num_speculative_tokens": 4' in commands["vLLM"] and "--speculative-algorithm DFLASH" in commands["SGLang"]
    assert commands["SGLang"].endswith(" --speculative-num-draft-tokens 5") and "topk" not in commands["SGLang"]
    assert ("transformers" in commands) == (form == "second")
    if form == "second":
        code = commands["transformers"].removeprefix("python - <<'END'\n").removesuffix("\nEND")
        compile(code, "command", "exec")
        assert 'assistant_model=assistant, speculation_type="dflash"' in code and str(folders[form]) in code


def test_heads_are_grouped_and_wide():
    assert HEADS != KV_HEADS and WIDTH * HEADS != 32
