"""What the readers of a DFlash folder have in common: where its config holds what, its parameters, and shared rules.

A folder has one of two forms. The main form is that of z-lab, `model_type` "qwen3". The second one is what transformers
calls `muse_glimmer_assistant`, with some fields at top level too, and other names of `fc` and `hidden_norm`.
"""

from collections.abc import Iterator

from ...door.config_readings import FULL, MAIN_TYPE, SECOND_TYPE, SLIDING, head_width, kv_heads, named, shown_dspark
from ..draft_folder import DraftFolder, Finding, Shape, TargetFacts
from .parameters import layer, llama_attention


ARCHITECTURE = "DFlashDraftModel"
# one class of vLLM reads them all
MODEL_TYPES = (MAIN_TYPE, SECOND_TYPE, "llama")


# ---- the config ----


def layer_ids(config: dict) -> list[int] | None:
    """Layers whose OUTPUTS are tapped, in the order that is written; `None` if that is not a list of numbers."""
    ids = named(config, "target_layer_ids")
    sound = isinstance(ids, list) and ids and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    return ids if sound else None


def whole_vocabulary(config: dict, target: TargetFacts | None) -> bool:
    """Whether every token of the target can be drafted."""
    vocab = config.get("vocab_size") if target is None else target.vocab_size
    return config.get("draft_vocab_size") in (None, vocab)


# ---- the tensors ----


def place(name: str) -> str:
    """The main form's name of a tensor; both servers take those of either form."""
    name = name.replace("encoder.output_norm_enc.", "hidden_norm.").replace("encoder.fc.", "fc.")
    return name.replace("midlayer.", "layers.0.")


def parameters(config: dict, num_layers: int, read_as: str | None = None) -> dict[str, Shape]:
    """The parameters by their names in the main form, without what the target lends; `read_as` as for `kv_heads`."""
    hidden, width = config["hidden_size"], head_width(config)
    taps = len(layer_ids(config) or [0])
    sizes = {**config, "head_dim": width, "num_key_value_heads": kv_heads(config, read_as)}
    attention = llama_attention(sizes, hidden) | {"q_norm": (width,), "k_norm": (width,)}

    found = {"fc.weight": (hidden, taps * hidden), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    for index in range(num_layers):
        found |= layer(config, attention, ("input_layernorm", "post_attention_layernorm"), f"layers.{index}")
        if config.get("attention_bias"):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                found[f"layers.{index}.self_attn.{name}.bias"] = attention[name][:1]
    return found


# ---- rules that hold for several readers ----


def taps_known(folder: DraftFolder, target: TargetFacts | None, reader: str) -> Iterator[Finding]:
    """The taps are written, and the target has these layers.

    Args:
        folder, target: as for every rule.
        reader: the one that the findings name.
    """
    ids, wanted = layer_ids(folder.config), "write the layers of training there, whose OUTPUTS were tapped, from 0"
    if ids is None:
        said = named(folder.config, "target_layer_ids")
        seen = "is missing" if said is None else f"is {said!r}"
        yield Finding(reader, f"`dflash_config.target_layer_ids` {seen}: no taps are known.", wanted)
    elif min(ids) < -1 or (target is not None and max(ids) >= target.num_layers):
        has = "" if target is None else f" of {target.num_layers} layers"
        yield Finding(reader, f"`target_layer_ids` {ids} names layers that a target{has} does not have.", wanted)


def causal(folder: DraftFolder, target: TargetFacts | None, reader: str) -> Iterator[Finding]:
    """`is_causal` does not hide a block's later slots from its earlier ones."""
    if folder.config.get("is_causal"):
        yield Finding(
            reader,
            "`is_causal` is true: a slot does not see the later slots of its block, which training showed.",
            "leave the field out",
        )


def windows(folder: DraftFolder, target: TargetFacts | None, reader: str) -> Iterator[Finding]:
    """Attention sees all tokens, as in training, in every layer."""
    types, count = folder.config.get("layer_types"), folder.config.get("num_hidden_layers")
    fix = f'write `layer_types` as "{FULL}", once for each of the {count} layers'
    if types is None:
        return
    if not isinstance(types, list) or len(types) != count or any(one not in (FULL, SLIDING) for one in types):
        yield Finding(reader, f"`layer_types` is {types}, and must name the attention of {count} layers.", fix)
    elif SLIDING in types:
        yield Finding(
            reader,
            f"`layer_types` {types} asks for sliding attention: it hides keys that training showed, and each reader "
            "places the window's edge and the order inside a block differently.",
            fix,
        )


def embedding_factor(folder: DraftFolder, target: TargetFacts | None, reader: str) -> Iterator[Finding]:
    """The target does not scale its embeddings."""
    if target is not None and target.scales_embeddings:
        yield Finding(
            reader,
            f"a target of type {target.model_type} scales its embeddings: vLLM gives the draft the table's rows, "
            "SGLang scales them where the target's class says so, and transformers scales them always.",
            "train and measure in the same server, or train an EAGLE-3 draft",
            level="limit",
        )


def other_kind(folder: DraftFolder) -> Iterator[Finding]:
    """The folder is not one of DSpark, whose slots predict one token further."""
    why = shown_dspark(folder.config, folder.shapes)
    if why is not None:
        yield Finding(
            "Every reader",
            f"{why}.",
            "serve it with vLLM's method dspark, or train a DFlash draft",
        )
