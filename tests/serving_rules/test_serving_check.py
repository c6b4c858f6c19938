"""The check passes every draft that hf_eagle makes, catches planted faults, and mends those that can be mended."""

import ast
import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import make_trainer
from tiny import pad_batch, random_chats, tiny_eagle1_pair, tiny_llama, tiny_pair
from tiny_mla import YARN, tiny_mla_pair
from transformers import DeepseekV3Config, LlamaConfig

from hf_eagle import load_draft
from hf_eagle.drafts.layers import EagleRMSNorm
from hf_eagle.drafts.prune import prune_vocabulary
from hf_eagle.drafts.unroll_plan import UnrollPlan
from hf_eagle.serving import rules_folder, rules_sglang, rules_vllm, served_math
from hf_eagle.serving.check import check_draft, require_servable
from hf_eagle.serving.draft_folder import TargetFacts
from hf_eagle.serving.probe import probe
from hf_eagle.serving.repair import repair_draft
from hf_eagle.serving.rules_sglang import captured_ids


FLAGS = {"3": {}, "3.1": {"fc_norm": True, "norm_output": True}}
ROPES = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
    "linear": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0},
}


def faults(path, target=None):
    """Lines of everything but notes."""
    config = target and target.config
    return [str(finding) for finding in check_draft(path, config) if finding.level != "note"]


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    """The target of all tiny pairs."""
    folder = tmp_path_factory.mktemp("target")
    tiny_llama().save_pretrained(folder)
    return folder


# ---- what hf_eagle makes passes ----


@pytest.mark.parametrize("pair", [tiny_pair, tiny_mla_pair])
@pytest.mark.parametrize("size", [40, None])
@pytest.mark.parametrize("taps", [None, [1, 4, 6], [1, 3, 5, 7]])
@pytest.mark.parametrize("flags", FLAGS)
def test_every_kind_of_eagle3_draft_passes(pair, size, taps, flags, target_folder, tmp_path):
    target, draft = pair(size, taps, **FLAGS[flags])
    draft.save_pretrained(tmp_path)
    assert faults(tmp_path) == faults(tmp_path, target) == []
    assert probe(tmp_path, target_folder, target.config) == []


@pytest.mark.parametrize("tied", [False, True])
def test_an_eagle1_draft_passes(tied, tmp_path):
    target, draft = tiny_eagle1_pair(tiny_llama(tied=tied))
    draft.save_pretrained(tmp_path / "draft")
    target.model.save_pretrained(tmp_path / "target")
    assert faults(tmp_path / "draft") == faults(tmp_path / "draft", target) == []
    assert probe(tmp_path / "draft", tmp_path / "target", target.config) == []


@pytest.mark.parametrize("rope", [*ROPES, "latent yarn"])
def test_every_rope_passes_and_is_restated(rope, target_folder, tmp_path):
    stretched = {**YARN, "mscale": 0.7, "original_max_position_embeddings": 16, "factor": 8.0}
    pair = tiny_mla_pair if rope == "latent yarn" else tiny_pair
    target, draft = pair(40, rope_parameters=ROPES.get(rope, stretched))
    draft.save_pretrained(tmp_path)
    assert faults(tmp_path, target) == []
    assert probe(tmp_path, target_folder, target.config) == []


@pytest.mark.parametrize("size", [40, None])
def test_a_pruned_draft_passes(size, tmp_path):
    target, draft = tiny_pair(size)
    prune_vocabulary(draft, torch.arange(96)[draft.t2d if size else slice(None)][3:19])
    draft.save_pretrained(tmp_path)
    assert faults(tmp_path, target) == []


def test_a_half_precision_draft_passes_without_a_note(tmp_path):
    target, draft = tiny_pair(40)
    draft.to(torch.bfloat16).save_pretrained(tmp_path)
    assert check_draft(tmp_path, target.config) == []


def test_a_context_that_the_target_stretches_by_its_rope_is_asked_of_the_draft(tmp_path):
    _, draft = tiny_pair(40)
    draft.save_pretrained(tmp_path)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    stretched = SimpleNamespace(config=LlamaConfig(**sizes(rope_parameters=rope)))
    (found,) = faults(tmp_path, stretched)
    assert "`max_position_embeddings` of 512 gives a shorter context" in found and "set it to 1024" in found


@pytest.mark.parametrize("module", [rules_vllm, rules_sglang, rules_folder, served_math])
def test_the_rules_lean_on_nothing_that_writes_drafts(module):
    imported = [node for node in ast.walk(ast.parse(Path(module.__file__).read_text())) if type(node) is ast.ImportFrom]
    ours = {node.module for node in imported if node.level or node.module.startswith("hf_eagle")}
    assert ours <= {"draft_folder"}


@pytest.mark.parametrize("first", [2, 3])
def test_a_draft_for_a_deepseek_target_passes_with_it(first, tmp_path):
    latent = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
    config = DeepseekV3Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=8, num_attention_heads=4, intermediate_size=48, **latent
    )
    _, draft = tiny_mla_pair(40)
    draft.config = type(draft.config).from_target(config, 40, [first, 4, 5])
    draft.save_pretrained(tmp_path)
    deepseek, llama = SimpleNamespace(config=config), SimpleNamespace(config=LlamaConfig(**sizes()))
    assert faults(tmp_path, deepseek) == []
    wrong = faults(tmp_path, llama)
    assert (wrong == []) == (first == 2)  # there both families count alike
    if first == 3:
        assert "captures the entries of layers [4, 5, 6], where vLLM records [3, 4, 5]" in wrong[0]


def sizes(**changes):
    return {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 8, "max_position_embeddings": 512, **changes}


@pytest.mark.parametrize(
    ("model_type", "latent", "nested", "wanted"),
    [
        ("llama", False, [1, 3, 4], [2, 4, 5]),
        ("deepseek_v3", True, [1, 3, 4], [2, 4, 5]),
        ("deepseek_v3", True, [2, 3, 4], [2, 3, 4]),
        ("kimi_k2", True, [3, 5, 6], [3, 5, 6]),
        ("glm4_moe_lite", True, [3, 5, 6], [3, 5, 6]),
        ("longcat_flash", True, [3, 5, 6], [4, 6, 7]),
        ("gpt_oss", False, [3, 5, 8], [3, 5, 8]),
        ("gpt_oss", False, [3, 5, 6], [4, 6, 7]),
    ],
)
def test_what_sglang_captures_depends_on_the_target(model_type, latent, nested, wanted):
    target = TargetFacts(model_type, latent, 96, 32, 8, 512, {})
    assert captured_ids({"eagle_config": {"eagle_aux_hidden_state_layer_ids": nested}}, target) == wanted


# ---- planted faults ----


def put(**fields):
    """Change fields of the config; `...` takes one out."""

    def change(config, tensors):
        config.update(fields)
        for name in [name for name, value in config.items() if value is ...]:
            del config[name]

    return change


def tensor(name, make):
    """Put a tensor in the place of `name`; `None` takes it out."""

    def change(config, tensors):
        made = make(tensors.pop(name, None))
        if made is not None:
            tensors[name] = made

    return change


def nested_taps(ids):
    return put(eagle_config={"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": ids})


def prefix(config, tensors):
    for name in [name for name in tensors if name not in ("lm_head.weight", "d2t", "t2d")]:
        tensors[f"model.{name}"] = tensors.pop(name)


def absolute(config, tensors):
    tensors["d2t"] += torch.arange(40)


def unsorted(config, tensors):
    ids = (tensors["d2t"] + torch.arange(40)).flip(0)
    tensors["d2t"] = ids - torch.arange(40)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()


def whole_d2t(config, tensors):
    tensors["d2t"] = torch.zeros(96, dtype=torch.long)
    tensors["t2d"] = torch.ones(96, dtype=torch.bool)


def twice(config, tensors):
    tensors["d2t"][1] = tensors["d2t"][0] - 1


def nan(x):
    x[3, 5] = float("nan")
    return x


# name -> (kind, how it is planted, words of a finding, whether `--fix` mends it)
PLANTED = {
    "missing tensor": ("eagle3", tensor("midlayer.hidden_norm.weight", lambda x: None), "loads silently", False),
    "no head": ("eagle3", tensor("lm_head.weight", lambda x: None), "`lm_head.weight` is missing", False),
    "model. prefix": ("eagle3", prefix, "loading fails. Fix: take `model.` off", True),
    "tied": ("eagle3", put(tie_word_embeddings=True), "`tie_word_embeddings` is true", True),
    "new rope alone": ("eagle3", put(rope_theta=..., rope_scaling=...), "only in the new spelling", True),
    "old rope alone": ("eagle3", put(rope_parameters=...), "only in the old spelling", True),
    "theta lost": ("eagle3", put(rope_theta=..., rope_parameters={"rope_type": "default"}), "no RoPE base", False),
    "two bases": ("eagle3", put(rope_theta=5e5), "two spellings of RoPE disagree", False),
    "vLLM's taps one up": ("eagle3", put(eagle_aux_hidden_state_layer_ids=[3, 5, 6]), "vLLM records [3, 5, 6]", True),
    "SGLang's taps one up": ("eagle3", nested_taps([2, 4, 5]), "captures the entries of layers [3, 5, 6]", True),
    "SGLang's taps one down": ("eagle3", nested_taps([0, 2, 3]), "captures the entries of layers [1, 3, 4]", True),
    "own taps one up": ("own taps", nested_taps([1, 4, 6]), "captures the entries of layers [2, 5, 7]", False),
    "no vLLM taps": ("eagle3", put(eagle_aux_hidden_state_layer_ids=...), "as ENTRY ids", True),
    "no SGLang taps": ("eagle3", put(eagle_config={"use_aux_hidden_state": True}), "the target class's default", True),
    "no features": ("eagle3", put(eagle_config={"use_aux_hidden_state": False}), "`eagle_config.use_aux_hidden", True),
    "taps in no order": ("own taps", put(eagle_aux_hidden_state_layer_ids=[4, 1, 6]), "sorted and de-dupl", False),
    "a tap too few": ("own taps", put(eagle_aux_hidden_state_layer_ids=[1, 4]), "3 taps, but 2 are recorded", False),
    "taps of a deeper target": ("own taps", put(eagle_aux_hidden_state_layer_ids=[1, 4, 33]), "does not have", False),
    "number of taps": ("eagle3", put(num_aux_hidden_states=4), "is [32, 96] where the config asks for [32, 12", True),
    "absolute d2t": ("eagle3", absolute, "`d2t` holds target ids instead of offsets", True),
    "unsorted d2t": ("eagle3", unsorted, "`d2t` is not in the order", True),
    "d2t names a token twice": ("eagle3", twice, "`d2t` names a token twice", False),
    "d2t outside": ("eagle3", tensor("d2t", lambda x: x + 90), "`d2t` points outside the 96 tokens", False),
    "no d2t": ("eagle3", tensor("d2t", lambda x: None), "silently taken for the target's first tokens", False),
    "no t2d": ("eagle3", tensor("t2d", lambda x: None), "there is a `d2t` without a `t2d`", True),
    "t2d disagrees": ("eagle3", tensor("t2d", lambda x: x.roll(1)), "`t2d` disagrees with `d2t`", True),
    "d2t of a whole vocabulary": ("whole", whole_d2t, "`d2t` has no parameter: loading fails", True),
    "no draft_vocab_size": ("eagle3", put(draft_vocab_size=...), "SGLang has no default", True),
    "draft_vocab_size null": ("eagle3", put(draft_vocab_size=None), "head is thrown away for the target's", True),
    "draft_vocab_size of another": ("eagle3", put(draft_vocab_size=41), "is [40, 32] where the config asks", True),
    "vocab_size of another": ("eagle3", put(vocab_size=95), "`vocab_size` is 95, the target's is 96", True),
    "target_hidden_size null": ("eagle3", put(target_hidden_size=None), "`target_hidden_size` is null", True),
    "num_hidden_layers": ("eagle3", put(num_hidden_layers=8), "is 8, but there are tensors of 1", True),
    "no dtype": ("eagle3", put(dtype=..., torch_dtype=...), "float16 is taken", True),
    "one dtype": ("eagle3", put(torch_dtype=...), "`torch_dtype` is missing", True),
    "another dtype": ("eagle3", put(dtype="bfloat16"), "says bfloat16, the tensors are float32", True),
    "mixed dtypes": ("eagle3", tensor("norm.weight", lambda x: x.double()), "several dtypes", True),
    "context is text": ("eagle3", put(max_position_embeddings="x"), "`max_position_embeddings` is 'x', no whole", True),
    "short context": ("eagle3", put(max_position_embeddings=64), "of 64 gives a shorter context than the target", True),
    "part of a head rotated": (
        "eagle3",
        put(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        "`partial_rotary_factor` is 0.5",
        True,
    ),
    "NaN": ("eagle3", tensor("fc.weight", nan), "`fc.weight` holds NaN or infinity", False),
    "surplus tensor": ("eagle3", tensor("adapter.scale", lambda x: torch.ones(2)), "`adapter.scale` has no par", True),
    "norm of queries": (
        "eagle3",
        tensor("midlayer.self_attn.q_norm.weight", lambda x: torch.ones(8)),
        "`midlayer.self_attn.q_norm.weight` has no parameter",
        False,
    ),
    "bias of zeros": ("eagle3", tensor("fc.bias", lambda x: torch.zeros(32)), "silently dropped", True),
    "trained bias": ("eagle3", tensor("fc.bias", lambda x: torch.ones(32)), "silently dropped", False),
    "own embeddings": (
        "eagle3",
        tensor("embed_tokens.weight", lambda x: torch.ones(96, 32)),
        "which SGLang uses",
        True,
    ),
    "wrong shape": ("eagle3", tensor("fc.weight", lambda x: x[:, :64].contiguous()), "`fc.weight` is [32, 64]", False),
    "no cache": ("eagle3", put(use_cache=False), "`use_cache` is false", True),
    "architectures": ("eagle3", put(architectures=["LlamaForCausalLM"]), "does not name LlamaForCausalLMEagle3", True),
    "model_type": ("eagle3", put(model_type="qwen3"), "`model_type` 'qwen3'", True),
    "attention_bias": ("eagle3", put(attention_bias=True), "biases of uninitialised memory are added", True),
    "norm_before_residual": ("eagle3", put(norm_before_residual=True), "`norm_before_residual` is true", False),
    "fc_norm lost": ("3.1", put(fc_norm=False), "`fc_norm.0.weight`, `fc_norm.1.weight`", True),
    "sliding window": ("eagle3", put(layer_types=["sliding_attention"]), "hides keys that training showed", False),
    "activation": ("eagle3", put(hidden_act="gelu"), "only silu is run", False),
    "EAGLE-1 with a head": ("eagle1", tensor("lm_head.weight", lambda x: torch.ones(96, 32)), "loading fails", True),
    "EAGLE-1 with a norm": ("eagle1", tensor("norm.weight", lambda x: torch.ones(32)), "loading fails", False),
    "EAGLE-1 with an input norm": (
        "eagle1",
        tensor("layers.0.input_layernorm.weight", lambda x: torch.ones(32)),
        "`layers.0.input_layernorm.weight` has no parameter",
        False,
    ),
    "EAGLE-1 without fc.bias": (
        "eagle1",
        tensor("fc.bias", lambda x: None),
        "silently stays random. Fix: save ze",
        True,
    ),
    "EAGLE-1 with a trained bias": ("eagle1", tensor("fc.bias", lambda x: x + 1), "`fc.bias` is not zero", False),
    "EAGLE-1 with a d2t": (
        "eagle1",
        tensor("d2t", lambda x: torch.zeros(9, dtype=torch.long)),
        "`d2t` has no par",
        True,
    ),
    "EAGLE-1 for one server": ("eagle1", put(architectures=["LlamaForCausalLMEagle"]), "none of which runs", True),
    "logit_scale null": ("eagle1", put(logit_scale=None), "logits are multiplied by it", True),
    "deepseek_v3": ("mla", put(model_type="deepseek_v3"), "build a multi-token prediction head", True),
    "no bottleneck of queries": ("mla", put(q_lora_rank=None), "`q_lora_rank` is null", False),
    "layers of a latent target": ("mla", put(num_hidden_layers=61), "exactly one, or is refused", True),
    "rope in halves": ("mla", put(rope_interleave=False), "halves are rotated", False),
    "no kv_b_proj": ("mla", tensor("midlayer.self_attn.kv_b_proj.weight", lambda x: None), "is missing", False),
}


@pytest.fixture(scope="module")
def drafts(tmp_path_factory):
    """kind -> (target, folder of a faultless draft, its logits)."""
    made = {
        "eagle3": tiny_pair(40),
        "whole": tiny_pair(None),
        "own taps": tiny_pair(40, [1, 4, 6]),
        "3.1": tiny_pair(40, fc_norm=True, norm_output=True),
        "eagle1": tiny_eagle1_pair(),
        "mla": tiny_mla_pair(40),
    }
    folder = tmp_path_factory.mktemp("drafts")
    for kind, (target, draft) in made.items():
        draft.save_pretrained(folder / kind)
        assert faults(folder / kind, target) == []
    return {kind: (target, folder / kind, logits(folder / kind, target)) for kind, (target, _) in made.items()}


def damaged(folder, into, change):
    shutil.copytree(folder, into)
    config, tensors = json.loads((into / "config.json").read_text()), load_file(into / "model.safetensors")
    change(config, tensors)
    (into / "config.json").write_text(json.dumps(config))
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def logits(folder, target):
    """Over the target's vocabulary, minus infinity where nothing can be drafted."""
    draft, batch = load_draft(folder, target), pad_batch(random_chats(2, seed=1))
    target.tap_ids = draft.config.tap_ids
    features, rows = target(batch["input_ids"], batch["attention_mask"]), UnrollPlan.of_rows(batch["input_ids"])
    found = draft.compute_logits(draft(batch["input_ids"], features, rows).hidden_states[0])
    ids = torch.arange(96) if draft.draft_ids is None else draft.draft_ids
    return torch.full((len(found), 96), float("-inf")).index_copy(1, ids, found)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_caught_and_mended_where_it_can_be(name, drafts, tmp_path):
    kind, change, words, mends = PLANTED[name]
    target, folder, whole = drafts[kind]
    damaged(folder, tmp_path / "draft", change)
    before = (tmp_path / "draft" / "model.safetensors").read_bytes()
    found = faults(tmp_path / "draft", target)
    assert any(words in line for line in found), found
    assert all(line.count(" Fix: ") == 1 and line.endswith(".") and "\n" not in line for line in found)

    done = repair_draft(tmp_path / "draft", tmp_path / "mended", target.config)
    assert (tmp_path / "draft" / "model.safetensors").read_bytes() == before
    left = faults(tmp_path / "mended", target)
    if mends:
        assert done and left == []
        assert torch.equal(logits(tmp_path / "mended", target), whole)
    else:
        assert any(words in line for line in left), left


def test_there_are_as_many_faults_as_asked_for():
    assert len(PLANTED) >= 25 and sum(mends for *_, mends in PLANTED.values()) >= 15


def test_a_whole_draft_is_mended_by_leaving_it_as_it_is(drafts, tmp_path):
    for kind, (target, folder, _) in drafts.items():
        assert repair_draft(folder, tmp_path / kind, target.config) == []
        wanted, found = load_file(folder / "model.safetensors"), load_file(tmp_path / kind / "model.safetensors")
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_without_the_target_taps_are_not_guessed(drafts, tmp_path):
    damaged(
        drafts["eagle3"][1], tmp_path / "draft", put(eagle_aux_hidden_state_layer_ids=..., tie_word_embeddings=True)
    )
    (done,) = repair_draft(tmp_path / "draft", tmp_path / "mended")
    assert done.startswith("`tie_word_embeddings`")
    assert any("is missing: vLLM takes those in `eagle_config`" in line for line in faults(tmp_path / "mended"))


def test_a_draft_for_another_target_is_not_made_to_look_like_its_own(drafts, tmp_path):
    other = LlamaConfig(**sizes(vocab_size=128))
    assert repair_draft(drafts["eagle3"][1], tmp_path / "mended", other) == []
    assert any(
        "`vocab_size` is 96, the target's is 128" in str(line) for line in check_draft(tmp_path / "mended", other)
    )


def test_without_the_target_equal_ids_are_only_noted(drafts, tmp_path):
    damaged(drafts["eagle3"][1], tmp_path / "draft", nested_taps([2, 4, 5]))
    assert faults(tmp_path / "draft") == []
    assert any("only with DeepSeek" in str(finding) for finding in check_draft(tmp_path / "draft"))


def test_limits_of_a_server_are_told_from_faults(tmp_path):
    target, draft = tiny_pair(40, [0, 4, 8])
    draft.save_pretrained(tmp_path)
    (found,) = [finding for finding in check_draft(tmp_path, target.config) if finding.level == "limit"]
    assert "entry 8, the input of the final norm, is not captured of a llama target" in found.text


def test_what_is_no_draft_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json, so it is not a draft"):
        check_draft(tmp_path)
    for content, word in (("[]", "must hold an object, but holds a list"), ("{oops", "cannot be read as JSON")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"config.json {word}"):
            check_draft(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no \*.safetensors file"):
        check_draft(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="`draft` .* cannot be read: model.safetensors is cut, it has 7 bytes"):
        check_draft(tmp_path)
    save_file({"x.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "`vocab_size` is missing in config.json" in faults(tmp_path)[0]
    with pytest.raises(ValueError, match="holds no `fc.weight`"):
        repair_draft(tmp_path, tmp_path / "out")


def test_a_whole_model_is_no_draft_and_nothing_else_is_said(target_folder):
    (found,) = check_draft(target_folder)
    assert "this is not a draft: its `architectures` are ['LlamaForCausalLM']" in found.text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rms_norm_eps": None}, "`rms_norm_eps` is null, and must be a number of at least 0"),
        ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` is nan, and must be a number of at least 0"),
        ({"rope_theta": 0}, "`rope_theta` is 0, and must be a number above 0"),
        ({"num_hidden_layers": 1.5}, "`num_hidden_layers` in config.json is 1.5, and must be a whole number"),
        ({"hidden_size": "32"}, "`hidden_size` in config.json is '32', and must be a whole number"),
        ({"vocab_size": True}, "`vocab_size` in config.json is True, and must be a whole number"),
        ({"intermediate_size": 0}, "`intermediate_size` in config.json is 0, and must be a whole number"),
    ],
)
def test_a_number_that_no_layer_computes_with_is_a_finding(fields, told, tmp_path):
    _, draft = tiny_pair()
    draft.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert any(told in line for line in faults(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8], ids=str)
def test_weights_of_whole_numbers_are_a_finding(dtype, tmp_path):
    _, draft = tiny_pair()
    draft.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    whole = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert any("readers treat them as rounded weights" in line for line in faults(tmp_path))


def test_nothing_is_overwritten(drafts, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        repair_draft(drafts["eagle3"][1], tmp_path)


def test_the_probe_notices_a_change_of_our_model(drafts, target_folder, monkeypatch):
    target, folder, _ = drafts["eagle3"]
    forward = EagleRMSNorm.forward
    monkeypatch.setattr(EagleRMSNorm, "forward", lambda norm, x: forward(norm, x + 0.01))
    (found,) = probe(folder, target_folder, target.config)
    assert "the draft that was trained is not the one that is served" in found.text


def test_another_name_of_the_layer_is_the_servers_too_and_mended_for_hf_eagle(drafts, target_folder, tmp_path):
    target, folder, whole = drafts["eagle3"]

    def rename(config, tensors):
        for name in [name for name in tensors if name.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)

    damaged(folder, tmp_path / "draft", rename)
    assert faults(tmp_path / "draft", target) == []
    (found,) = probe(tmp_path / "draft", target_folder, target.config)
    assert found.level == "note" and "hf_eagle cannot load this draft, though the servers can" in found.text
    assert repair_draft(tmp_path / "draft", tmp_path / "mended") == ["layer 0 is named `midlayer`"]
    assert torch.equal(logits(tmp_path / "mended", target), whole)


# ---- where it runs ----


def test_the_trainer_checks_what_it_saves(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_steps=1, save_total_limit=1)
    trainer.train()
    trainer.save_model()
    assert faults(tmp_path / "run", trainer.target) == []
    assert faults(tmp_path / "run" / "checkpoint-2", trainer.target) == []
    trainer.model.config.max_position_embeddings = 64
    with pytest.raises(
        ValueError, match="was saved, but would not be served as it was trained.*gives a shorter context"
    ):
        trainer.save_model()


def test_a_kind_that_no_server_has_is_saved_with_a_warning(tmp_path, caplog):
    target, draft = tiny_mla_pair(40, q_lora_rank=None)
    draft.save_pretrained(tmp_path)
    require_servable(tmp_path, target.config)
    assert "`q_lora_rank` is null" in caplog.text
    require_servable(tmp_path / "nothing", target.config)  # an adapter's folder has no draft to serve


def run(monkeypatch, capsys, *options):
    script = Path(__file__).resolve().parents[2] / "scripts" / "check_draft.py"
    monkeypatch.setattr("sys.argv", [str(script), *map(str, options)])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code, capsys.readouterr()
    return 0, capsys.readouterr()


def test_the_script_says_what_is_wrong_and_mends_it(drafts, target_folder, tmp_path, monkeypatch, capsys):
    _, folder, _ = drafts["eagle3"]
    beside = ("--target", target_folder)
    assert run(monkeypatch, capsys, folder)[0] == 0
    code, printed = run(monkeypatch, capsys, folder, *beside)
    assert code == 0 and "serve it as it was trained." in printed.out

    damaged(folder, tmp_path / "draft", put(tie_word_embeddings=True, draft_vocab_size=None))
    code, printed = run(monkeypatch, capsys, tmp_path / "draft", *beside)
    assert code == 1 and sum(line.startswith("SGLang: `") for line in printed.out.splitlines()) >= 2
    code, printed = run(monkeypatch, capsys, tmp_path / "draft", *beside, "--fix", tmp_path / "mended")
    assert code == 0 and "mended: `tie_word_embeddings` is false now, it was true" in printed.out
    code, printed = run(monkeypatch, capsys, tmp_path / "draft", "--fix", tmp_path / "mended")
    assert code == 2 and printed.err.startswith("error: `fix`") and "Traceback" not in printed.err
    code, printed = run(monkeypatch, capsys, tmp_path / "nowhere")
    assert code == 2 and "does not exist" in printed.err
