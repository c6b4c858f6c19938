"""What SGLang 0.5 makes of a draft folder, stated from its source and independently of how hf_eagle writes one.

Read there (0.5.23): `models/llama_eagle.py`, `llama_eagle3.py`, `kimi_k25_eagle3.py`, `set_eagle3_layers_to_capture` of
the targets, `model_runner_components/spec_aux_hidden_state.py`, `configs/model_config.py`.
"""

import math
from collections.abc import Iterator
from typing import Any

from .draft_folder import DraftFolder, Finding, Shape, TargetFacts, named, shape_findings


READER = "SGLang"
_CLASSES = {"eagle3": "LlamaForCausalLMEagle3", "mla": "Eagle3DeepseekV2ForCausalLM", "eagle1": "LlamaForCausalLMEagle"}
# targets with latent attention whose class adds 1 to the ids all the same
_LATENT_BUT_COUNTS_OUTPUTS = ("longcat_flash", "glm5_next")
# targets whose class captures behind the last layer too, entry id N
_CAPTURES_THE_END = ("gemma3", "gemma4", "gpt_oss", "laguna", "mimo_v2", "minimax_m3", "nemotron_h")


def findings(folder: DraftFolder, target: TargetFacts | None = None) -> list[Finding]:
    """What keeps SGLang from running this folder as it was trained."""
    rules = (_architecture, _layers, _head, _features, _taps, _flags, _rope, _context, _dtype, _tensors)
    return [finding for rule in rules for finding in rule(folder, target)]


def _architecture(folder, target) -> Iterator[Finding]:
    names, wanted = folder.config.get("architectures") or [], _CLASSES[folder.kind]
    if wanted not in names:
        yield Finding(READER, f"`architectures` {names} does not name {wanted}.", f"put {wanted} first")
    model_type = folder.config.get("model_type")
    if folder.kind == "mla" and model_type not in ("kimi_k2", "deepseek_v2", "deepseek_v3"):
        yield Finding(READER, f"`model_type` {model_type!r} has no latent attention.", "set it to 'kimi_k2'")
    if folder.kind != "mla" and model_type != "llama":
        yield Finding(
            READER, f"the Llama draft class is given a config of type {model_type!r}.", "set `model_type` to 'llama'"
        )


def _layers(folder, target) -> Iterator[Finding]:
    said = folder.config.get("num_hidden_layers")
    if folder.kind == "mla" and said != 1:
        yield Finding(
            READER, f"`num_hidden_layers` is {said}: a latent draft has exactly one, or is refused.", "set it to 1"
        )
    elif said != folder.num_layers:
        yield Finding(
            READER,
            f"`num_hidden_layers` is {said}, but there are tensors of {folder.num_layers}: the others are random.",
            f"set it to {folder.num_layers}",
        )


def _head(folder, target) -> Iterator[Finding]:
    config = folder.config
    if config.get("tie_word_embeddings"):
        yield Finding(
            READER,
            "`tie_word_embeddings` is true: the draft's head is replaced by the target's embedding table.",
            "set it to false, whatever the target has",
        )
    if folder.kind == "eagle1":
        return
    if "draft_vocab_size" not in config:
        yield Finding(
            READER, "`draft_vocab_size` is missing, and asked for without a default.", "set it to the rows of the head"
        )
    elif config["draft_vocab_size"] is None:
        yield Finding(
            READER,
            "`draft_vocab_size` is null: the trained head is thrown away for the target's.",
            "set it to the rows of the head",
        )
    size, vocab = config.get("draft_vocab_size") or config.get("vocab_size"), config.get("vocab_size")
    vocab = vocab if target is None else target.vocab_size
    if size != vocab and not any("d2t" in name for name in folder.shapes):
        yield Finding(
            READER,
            f"there is no `d2t` for the {size} draft tokens: they are taken for the target's first ones.",
            "restore `d2t`; without it the rows of the head are nobody's",
        )


def _features(folder, target) -> Iterator[Finding]:
    config, width = folder.config, folder.config.get("target_hidden_size", folder.config.get("hidden_size"))
    if folder.kind == "eagle3" and width is None:
        yield Finding(READER, "`target_hidden_size` is null, and `fc` is sized by it.", "set it to the width of a tap")
    if target is not None and config.get("hidden_size") != target.hidden_size:
        yield Finding(
            READER,
            f"`hidden_size` is {config.get('hidden_size')}, the target's is {target.hidden_size}: the target's "
            "embeddings are not taken, and the draft's own are random.",
            "serve the draft beside the target that it was trained for",
        )


def counts_entries(target: TargetFacts) -> bool:
    """Whether this target's class takes ids as ENTRY ids (unless the first is 1), and not as OUTPUT ids."""
    return target.latent and not target.model_type.startswith(_LATENT_BUT_COUNTS_OUTPUTS)


def captured_ids(config: dict, target: TargetFacts | None) -> list[int] | None:
    """Layers whose ENTRY is captured for this draft beside this target; `None` for the target class's default."""
    ids = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if not ids:
        return None
    if target is not None and counts_entries(target) and ids[0] != 1:
        return list(ids)
    if target is not None and target.model_type == "gpt_oss" and max(ids) == target.num_layers:
        return list(ids)
    return [i + 1 for i in ids]


def _num_taps(config: dict, kind: str) -> int:
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if kind == "mla":
        return len(nested or config.get("eagle_aux_hidden_state_layer_ids") or [0, 0, 0])
    number = config.get("num_aux_hidden_states")
    return len(nested or [0, 0, 0]) if number is None else number


def _taps(folder, target) -> Iterator[Finding]:
    if folder.kind == "eagle1":
        return
    config, field = folder.config, "eagle_config.eagle_aux_hidden_state_layer_ids"
    captured, entries = captured_ids(config, target), config.get("eagle_aux_hidden_state_layer_ids")
    if captured is None:
        yield Finding(
            READER, f"`{field}` is missing: taps are the target class's default.", "write the ids of training, minus 1"
        )
        return
    nested = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    if not config["eagle_config"].get("use_aux_hidden_state", True):
        yield Finding(READER, "`eagle_config.use_aux_hidden_state` is false: nothing is captured.", "set it to true")
    if len(set(captured)) != _num_taps(config, folder.kind):
        yield Finding(
            READER,
            f"`fc` is made for {_num_taps(config, folder.kind)} taps, but `{field}` names {len(set(captured))}.",
            "let both say what the draft was trained with",
        )
    if captured != sorted(captured):
        yield Finding(
            READER, f"`{field}` {nested} is captured in the order of layers, not in this one.", "sort the ids"
        )
    if target is not None and max(captured) == target.num_layers:
        if not target.model_type.startswith(_CAPTURES_THE_END):
            yield Finding(
                READER,
                f"entry {target.num_layers}, the input of the final norm, is not captured of a {target.model_type} "
                "target.",
                f"train with taps below {target.num_layers}",
                level="limit",
            )
    if not entries or captured == list(entries):
        return
    if target is not None and counts_entries(target) and entries[0] == 1:
        yield Finding(
            READER,
            f"beside this target ids that begin with 1 are raised by one, and no ids give the taps {entries}.",
            "train with taps that begin elsewhere",
            level="limit",
        )
    elif target is None and list(nested) == list(entries):
        yield Finding(
            READER,
            f"`{field}` {nested} gives the taps of `eagle_aux_hidden_state_layer_ids` only beside DeepSeek, Kimi and "
            "GLM-4-lite.",
            "name the target of the draft to the check",
            level="note",
        )
    else:
        yield Finding(
            READER,
            f"`{field}` {nested} captures the entries of layers {captured}, where vLLM records {list(entries)}: one of "
            "the two serves other taps than were trained, and acceptance collapses in silence.",
            "make both say the taps of training",
        )


def _flags(folder, target) -> Iterator[Finding]:
    config = folder.config
    nested = config.get("eagle_config") or {}
    if folder.kind == "eagle3" and nested.get("norm_before_fc", config.get("norm_before_fc")):
        yield Finding(READER, "`norm_before_fc` is true: a norm that EAGLE-3 lacks is run.", "set it to false")
    biased = ["bias"] if folder.kind != "eagle1" else []
    biased += ["attention_bias"] if folder.kind != "mla" else []
    for name in biased:
        if config.get(name) and not any(tensor.endswith(".bias") for tensor in folder.shapes):
            yield Finding(
                READER, f"`{name}` is true, but there are no biases: random ones are added.", "set it to false"
            )
    if folder.kind == "mla" and config.get("q_lora_rank") is None:
        yield Finding(
            READER,
            "`q_lora_rank` is null, which the latent draft class refuses.",
            "train the draft with a `q_lora_rank`",
            level="limit",
        )


def _rope(folder, target) -> Iterator[Finding]:
    new = folder.config.get("rope_parameters")
    base = folder.config.get("rope_theta") if new is None else new.get("rope_theta", folder.config.get("rope_theta"))
    if base is None:
        yield Finding(
            READER,
            "no RoPE base is written: 10000 is taken, in silence.",
            "write `rope_theta`, the base of training, at top level and in `rope_parameters`",
        )
    if folder.kind == "mla" and (new or {}).get("rope_type", "default") not in ("default", "yarn"):
        yield Finding(
            READER,
            f"RoPE of type {new['rope_type']!r} is run as YaRN in latent attention.",
            "train the draft with plain RoPE or YaRN",
        )
    if folder.kind == "mla" and not folder.config.get("rope_interleave", True):
        yield Finding(READER, "`rope_interleave` is false: halves are rotated, not pairs.", "set it to true")


def _stretched(rope: dict[str, Any]) -> float:
    """By how much this RoPE makes a context longer than `max_position_embeddings`."""
    own = "original_max_position_embeddings" in rope or rope.get("rope_type") == "llama3"
    return 1 if own else rope.get("factor") or 1


def needed_positions(config: dict, target: TargetFacts) -> int:
    """The least `max_position_embeddings` with which a draft of this RoPE has the target's context."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return math.ceil(int(target.max_positions * _stretched(target.rope)) / _stretched(rope))


def _context(folder, target) -> Iterator[Finding]:
    positions = folder.config.get("max_position_embeddings")
    if positions is None:
        yield Finding(READER, "`max_position_embeddings` is missing.", "set it to the target's")
    elif target is not None and positions < needed_positions(folder.config, target):
        yield Finding(
            READER,
            f"`max_position_embeddings` of {positions} gives a shorter context than the target's, and the draft is "
            "refused.",
            f"set it to {needed_positions(folder.config, target)}",
        )


def _dtype(folder, target) -> Iterator[Finding]:
    dtype = folder.config.get("dtype") or folder.config.get("torch_dtype")
    if dtype is None:
        yield Finding(
            READER, "neither `dtype` nor `torch_dtype` is written: float16 is taken.", "write the dtype of the tensors"
        )
    elif dtype == "float32":
        yield Finding(
            READER,
            "a float32 draft runs in float16 by default.",
            "start the server with `--dtype bfloat16`, or save the draft in bfloat16, where that matters",
            level="note",
        )


def parameters(config: dict, kind: str, num_layers: int) -> dict[str, Shape]:
    """SGLang's parameters by their names in a checkpoint, without what the target lends."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    rows = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    found: dict[str, Shape] = {}
    for index in range(num_layers):
        width = 2 * hidden if index == 0 and kind != "eagle1" else hidden
        layer = {**rows, "post_attention_layernorm": (hidden,)}
        if kind == "mla":
            layer |= _latent_attention(config, width, heads)
        else:
            head_dim = config.get("head_dim") or hidden // heads
            kv = (config.get("num_key_value_heads") or heads) * head_dim
            layer |= {"self_attn.q_proj": (heads * head_dim, width), "self_attn.o_proj": (hidden, heads * head_dim)}
            layer |= {"self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width)}
        if kind == "eagle1":
            layer |= {"input_layernorm": (hidden,)} if index else {}
        else:  # later layers norm by `hidden_norm` alone
            layer |= {"hidden_norm": (hidden,)} | ({} if index else {"input_layernorm": (hidden,)})
        found |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    if kind == "eagle1":
        return found | {"fc.weight": (hidden, 2 * hidden), "fc.bias": (hidden,)}
    width, taps = config.get("target_hidden_size") or hidden, _num_taps(config, kind)
    found |= {"fc.weight": (hidden, taps * width), "norm.weight": (hidden,)}
    found["lm_head.weight"] = (config.get("draft_vocab_size") or config.get("vocab_size"), hidden)
    if config.get("fc_norm") or config.get("use_aux_norm"):
        found |= {f"fc_norm.{i}.weight": (width,) for i in range(taps)}
    return found


def _latent_attention(config: dict, width: int, heads: int) -> dict[str, Shape]:
    rank, latent = config.get("q_lora_rank"), config.get("kv_lora_rank")
    nope, rope, value = config.get("qk_nope_head_dim"), config.get("qk_rope_head_dim"), config.get("v_head_dim")
    if None in (latent, nope, rope, value):
        return {}
    found: dict[str, Shape] = {
        "self_attn.kv_a_proj_with_mqa": (latent + rope, width),
        "self_attn.kv_a_layernorm": (latent,),
        "self_attn.kv_b_proj": (heads * (nope + value), latent),
        "self_attn.o_proj": (config["hidden_size"], heads * value),
    }
    if rank is not None:
        found |= {"self_attn.q_a_proj": (rank, width), "self_attn.q_a_layernorm": (rank,)}
        found["self_attn.q_b_proj"] = (heads * (nope + rope), rank)
    return found


def _place(name: str, kind: str) -> str:
    """The parameter that a checkpoint's tensor goes to, in the names of `parameters`."""
    if kind == "eagle1":
        return name
    name = name.replace("midlayer", "layers.0")
    return name.removeprefix("model.") if kind == "eagle3" else name


def _tensors(folder, target) -> Iterator[Finding]:
    wanted = parameters(folder.config, folder.kind, folder.num_layers)
    given, dropped = {}, []
    for name, shape in folder.shapes.items():
        place = _place(name, folder.kind)
        if place in wanted:
            given[place] = shape
        elif folder.kind != "eagle1" and ("d2t" in name or "t2d" in name):
            continue
        elif place != "embed_tokens.weight" and not (folder.kind == "mla" and place.endswith(".q_proj.weight")):
            dropped.append(name)
    if dropped:
        yield Finding(
            READER,
            f"{named(dropped)} has no parameter of that name and is dropped in silence.",
            "remove it, or give it the name that it was meant to have",
        )
    missing = [folder.spelt(name) for name in wanted if name not in given]
    if missing:
        fix = "restore the tensors from the checkpoint that was trained; nothing can replace them"
        if folder.prefixed:
            fix = "take `model.` off the names"
        elif missing == ["fc.bias"]:
            fix = "save zeros as `fc.bias`"
        yield Finding(READER, f"{named(missing)} is missing: it stays random, in silence.", fix)
    yield from shape_findings(READER, folder, wanted, given)
