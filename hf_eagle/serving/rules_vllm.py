"""What vLLM 0.32 makes of a draft folder, stated from its source and independently of how hf_eagle writes one.

Read there: `config/speculative.py`, `transformers_utils/configs/eagle.py`, `models/llama_eagle.py`, `llama_eagle3.py`,
`deepseek_eagle3.py`, `models/utils.py` (`AutoWeightsLoader`), `v1/worker/gpu_model_runner.py`.
"""

from collections.abc import Iterator

from .draft_folder import DraftFolder, Finding, Shape, TargetFacts, named, shape_findings


READER = "vLLM"
# names that its registry resolves to the class that runs such a draft; EAGLE-1's get "Eagle" put in front
_CLASSES = {
    "eagle3": {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"},
    "mla": {"Eagle3DeepseekV2ForCausalLM", "Eagle3DeepseekV3ForCausalLM"},
    "eagle1": {"EagleLlamaForCausalLM"},
}
_TAPS = "eagle_aux_hidden_state_layer_ids"
_MODEL_TYPES = {"eagle3": ("llama",), "eagle1": ("llama",), "mla": ("kimi_k2", "deepseek_v2")}


def findings(folder: DraftFolder, target: TargetFacts | None = None) -> list[Finding]:
    """What keeps vLLM from running this folder as it was trained."""
    rules = (_architecture, _layers, _vocabulary, _features, _taps, _flags, _rope, _context, _tensors)
    return [finding for rule in rules for finding in rule(folder, target)]


def _architecture(folder, target) -> Iterator[Finding]:
    names = folder.config.get("architectures") or []
    if folder.kind == "eagle1":
        resolved = [name if name.startswith("Eagle") else f"Eagle{name}" for name in names]
    else:
        resolved = [n if n.startswith("Eagle3") or n.endswith("Eagle3") else f"Eagle3{n}" for n in names]
    if not _CLASSES[folder.kind] & set(resolved):
        yield Finding(
            READER,
            f"`architectures` {names} resolves to {resolved}, none of which runs this draft.",
            f"name one of {', '.join(sorted(_CLASSES[folder.kind]))}",
        )
    model_type, known = folder.config.get("model_type"), _MODEL_TYPES[folder.kind]
    if model_type not in known:
        what = "is turned into a multi-token prediction head" if model_type == "deepseek_v3" else "is not read as one"
        yield Finding(
            READER, f"`model_type` {model_type!r} of such a draft {what}.", f"set it to {' or '.join(map(repr, known))}"
        )


def _layers(folder, target) -> Iterator[Finding]:
    said = folder.config.get("num_hidden_layers")
    if said != folder.num_layers:
        yield Finding(
            READER,
            f"`num_hidden_layers` is {said}, but there are tensors of {folder.num_layers}: layers without tensors run "
            "on uninitialised memory, in silence.",
            f"set it to {folder.num_layers}",
        )


def _target_vocab(folder, target) -> int | None:
    return folder.config.get("vocab_size") if target is None else target.vocab_size


def _draft_vocab(folder) -> int | None:
    size = folder.config.get("draft_vocab_size")
    return folder.config.get("vocab_size") if size is None else size


def _vocabulary(folder, target) -> Iterator[Finding]:
    said = folder.config.get("vocab_size")
    if said is None or (target is not None and said != target.vocab_size):
        whose = "" if target is None else f", the target's is {target.vocab_size}"
        yield Finding(READER, f"`vocab_size` is {said}{whose}: draft tokens get other ids.", "set it to the target's")
    if folder.kind == "eagle1":
        return
    whole = _draft_vocab(folder) == _target_vocab(folder, target)
    if whole and "d2t" in folder.shapes:
        yield Finding(
            READER,
            f"`draft_vocab_size` is the whole vocabulary of {_draft_vocab(folder)}, and beside it `d2t` has no "
            "parameter: loading fails.",
            "remove `d2t` and `t2d`, or set `draft_vocab_size` to the rows of the head",
        )
    if not whole and not any("d2t" in name for name in folder.shapes):
        yield Finding(
            READER,
            f"the {_draft_vocab(folder)} draft tokens have no `d2t`: they are taken for the target's first tokens, in "
            "silence.",
            "restore `d2t`; without it the rows of the head are nobody's",
        )


def _features(folder, target) -> Iterator[Finding]:
    config = folder.config
    if target is not None and config.get("hidden_size") != target.hidden_size:
        yield Finding(
            READER,
            f"`hidden_size` is {config.get('hidden_size')}, the target's {target.hidden_size}: its embeddings cannot "
            "be shared, and the draft's own are uninitialised.",
            "serve the draft beside the target that it was trained for",
        )
    if folder.kind == "eagle1":
        if "logit_scale" in config and config["logit_scale"] is None:
            yield Finding(READER, "`logit_scale` is null, and logits are multiplied by it.", "leave the field out")
    elif "target_hidden_size" in config and config["target_hidden_size"] is None:
        yield Finding(
            READER,
            "`target_hidden_size` is null, and the width of `fc` is computed from it.",
            "set it to the width of one tap, or leave it out where that is `hidden_size`",
        )
    elif target is not None and _tap_width(config) != target.hidden_size:
        yield Finding(
            READER,
            f"`target_hidden_size` is {_tap_width(config)}, but the target's features are {target.hidden_size} wide.",
            "serve the draft beside the target that it was trained for",
        )


def _tap_width(config) -> int:
    return config.get("target_hidden_size") or config.get("hidden_size") or 0


def _nested(config) -> dict:
    return config.get("eagle_config") or {}


def _num_taps(config) -> int:
    number = config.get("num_aux_hidden_states")
    return len(_nested(config).get(_TAPS) or [0, 0, 0]) if number is None else number


def _taps(folder, target) -> Iterator[Finding]:
    if folder.kind == "eagle1":
        return
    config = folder.config
    ids = config.get(_TAPS) or _nested(config).get(_TAPS) or [2, 3, 4]  # entry ids, or as many as the default has
    if not config.get(_TAPS):
        instead = "those in `eagle_config`, as ENTRY ids" if _nested(config).get(_TAPS) else "(2, N // 2, N - 3)"
        yield Finding(
            READER,
            f"the top-level `{_TAPS}` is missing: vLLM takes {instead}.",
            "write the entry ids of the taps that the draft was trained with",
        )
    if ids != sorted(set(ids)):
        yield Finding(
            READER,
            f"`{_TAPS}` {ids} is sorted and de-duplicated before use, so the columns of `fc` meet other taps.",
            "write ascending unique ids and order the columns of `fc` by them",
        )
    if len(set(ids)) != _num_taps(config):
        yield Finding(
            READER,
            f"`num_aux_hidden_states` makes `fc` for {_num_taps(config)} taps, but {len(set(ids))} are recorded.",
            "set `num_aux_hidden_states` to the number of taps",
        )
    if target is not None and not all(0 <= i <= target.num_layers for i in ids):
        yield Finding(
            READER,
            f"`{_TAPS}` {ids} names layers that a target of {target.num_layers} layers does not have.",
            f"use entry ids of 0..{target.num_layers}, those of training",
        )
    if not _nested(config).get("use_aux_hidden_state", True):
        yield Finding(
            READER,
            "`eagle_config.use_aux_hidden_state` is false: the draft gets the last hidden state instead of its taps.",
            "set it to true",
        )


def _flags(folder, target) -> Iterator[Finding]:
    config = folder.config
    for name in ("attention_bias", "bias", "qkv_bias", "mlp_bias") if folder.kind != "mla" else ():
        block = ".mlp." if name == "mlp_bias" else ".self_attn."
        if config.get(name) and not any(block in n and n.endswith(".bias") for n in folder.shapes):
            yield Finding(
                READER,
                f"`{name}` is true, but there are no such tensors: biases of uninitialised memory are added.",
                "set it to false",
            )
    other_norms = {
        "norm_before_residual": folder.kind != "eagle1" and config.get("norm_before_residual"),
        "norm_before_fc": folder.kind == "eagle3"
        and _nested(config).get("norm_before_fc", config.get("norm_before_fc")),
    }
    for name, is_set in other_norms.items():
        if is_set:
            yield Finding(
                READER,
                f"`{name}` is true: vLLM runs another draft than EAGLE-3 as the paper and SGLang have it.",
                "set it to false, unless the draft was trained so",
            )
    if config.get("hidden_act", "silu") != "silu":
        yield Finding(READER, f"`hidden_act` is {config['hidden_act']!r}, and only silu is run.", "train with silu")
    if "sliding_attention" in (config.get("layer_types") or []):
        yield Finding(
            READER,
            "`layer_types` asks for sliding attention, which hides keys that training showed.",
            "leave `layer_types` out",
        )
    if folder.kind == "mla" and config.get("q_lora_rank") is None:
        yield Finding(
            READER,
            "`q_lora_rank` is null: its loader joins `kv_a_proj_with_mqa` with a `q_a_proj` that is not there.",
            "train the draft with a `q_lora_rank`",
            level="limit",
        )


def _rope(folder, target) -> Iterator[Finding]:
    new, old = folder.config.get("rope_parameters"), folder.config.get("rope_theta")
    if (new or {}).get("rope_theta") is None and old is None:
        yield Finding(
            READER,
            "no RoPE base is written: it is taken to be 10000, in silence.",
            "write `rope_theta`, the base of training, at top level and in `rope_parameters`",
        )
    rope = new or folder.config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if folder.kind == "mla" and kind not in ("default", "yarn"):
        yield Finding(
            READER,
            f"RoPE of type {kind!r} is run as YaRN in latent attention.",
            "train the draft with plain RoPE or YaRN",
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield Finding(
            READER,
            f"`partial_rotary_factor` is {rope['partial_rotary_factor']}: a part of each head is rotated, in training "
            "the whole.",
            "leave it out",
        )
    if target is not None and old == 10000 and target.rope.get("rope_theta", 10000) != 10000:
        yield Finding(
            READER,
            f"the RoPE base is 10000, which readers assume where none was written, and the target's is "
            f"{target.rope['rope_theta']:g}.",
            "make sure that the draft was trained with 10000",
            level="note",
        )


def _context(folder, target) -> Iterator[Finding]:
    positions = folder.config.get("max_position_embeddings")
    if positions is None:
        yield Finding(READER, "`max_position_embeddings` is missing.", "set it to the target's")
    elif target is not None and positions < target.max_positions:
        yield Finding(
            READER,
            f"`max_position_embeddings` is {positions}, less than the target's {target.max_positions}: it has to be "
            "raised by the server, and versions before 0.32 read past their RoPE table.",
            "set it to the target's",
        )


def parameters(config: dict, kind: str, num_layers: int) -> dict[str, Shape]:
    """vLLM's parameters by their names in a checkpoint, without the vocabulary and what the target lends."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    found: dict[str, Shape] = {}
    for index in range(num_layers):
        width = 2 * hidden if index == 0 and kind != "eagle1" else hidden
        layer = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        if kind == "mla":
            layer |= _latent_attention(config, width)
        else:
            layer |= {
                "self_attn.q_proj": (heads * head_dim, width),
                "self_attn.k_proj": (kv_heads * head_dim, width),
                "self_attn.v_proj": (kv_heads * head_dim, width),
                "self_attn.o_proj": (hidden, heads * head_dim),
            }
        norms = ["post_attention_layernorm"]
        norms += ["input_layernorm"] if kind != "eagle1" or index else []  # EAGLE-1's first layer has an identity there
        norms += ["hidden_norm"] if kind != "eagle1" else []
        layer |= {norm: (hidden,) for norm in norms}
        found |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    if kind == "eagle1":
        return found | {"fc.weight": (hidden, 2 * hidden)}
    taps, width = _num_taps(config), _tap_width(config)
    found |= {"fc.weight": (hidden, taps * width), "norm.weight": (hidden,)}
    if config.get("fc_norm"):
        found |= {f"fc_norm.{i}.weight": (width,) for i in range(taps)}
    return found


def _latent_attention(config: dict, width: int) -> dict[str, Shape]:
    heads, latent = config["num_attention_heads"], config.get("kv_lora_rank", 0)
    nope, rope, value = (config.get(name, 0) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    rank = config.get("q_lora_rank")
    queries = {"q_proj": (heads * (nope + rope), width)}
    if rank is not None:
        queries = {"q_a_proj": (rank, width), "q_a_layernorm": (rank,), "q_b_proj": (heads * (nope + rope), rank)}
    found = queries | {
        "kv_a_proj_with_mqa": (latent + rope, width),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (nope + value), latent),
        "o_proj": (config["hidden_size"], heads * value),
    }
    return {f"self_attn.{name}": shape for name, shape in found.items()}


def _tensors(folder, target) -> Iterator[Finding]:
    config = folder.config
    wanted = parameters(config, folder.kind, folder.num_layers)
    if folder.kind != "eagle1":
        wanted["lm_head.weight"] = (_draft_vocab(folder), config["hidden_size"])
        if _draft_vocab(folder) != _target_vocab(folder, target):
            wanted["d2t"] = (_draft_vocab(folder),)
    given, unknown = {}, []
    for name, shape in folder.shapes.items():
        if folder.kind != "eagle1" and "t2d" in name:
            continue
        own = name.replace("midlayer.", "layers.0.") if folder.kind != "eagle1" else name
        if own in wanted:
            given[own] = shape
        elif own == "embed_tokens.weight":
            yield Finding(
                READER,
                "`embed_tokens.weight` is used instead of the target's embeddings, which SGLang uses.",
                "remove it",
            )
        elif own != "d2t" or folder.kind == "eagle1":  # elsewhere it is said with the vocabulary
            unknown.append(name)
    biases = [name for name in unknown if name.endswith(".bias")]
    if folder.kind == "eagle1":
        biases = [name for name in biases if name != "fc.bias"]  # zeros, for SGLang
    if config.get("attention_bias"):
        biases = [name for name in biases if ".self_attn." not in name]
    if biases:
        yield Finding(READER, f"{named(biases)} has no parameter and is dropped in silence.", "train without biases")
    unknown = [name for name in unknown if not name.endswith(".bias")]
    if unknown:
        fix = "take `model.` off the names" if folder.prefixed else "remove what is not the draft's"
        yield Finding(READER, f"{named(unknown)} has no parameter of that name: loading fails.", fix)
    missing = [folder.spelt(name) for name in wanted if name not in given and name != "d2t"]
    if missing == ["lm_head.weight"]:
        yield Finding(
            READER,
            "`lm_head.weight` is missing: the target's head is run in its place.",
            "restore the tensor from the checkpoint that was trained; nothing can replace it",
        )
    elif missing and not folder.prefixed:
        yield Finding(
            READER,
            f"{named(missing)} is missing: it loads in silence and runs on numbers that nobody trained.",
            "restore the tensors from the checkpoint that was trained; nothing can replace them",
        )
    yield from shape_findings(READER, folder, wanted, given)
