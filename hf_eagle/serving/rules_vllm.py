"""How vLLM 0.32 reads a draft folder, restated from its source and independently of how hf_eagle writes one.

Sources: `config/speculative.py`, `transformers_utils/configs/eagle.py`, `models/llama_eagle.py`, `llama_eagle3.py`,
`deepseek_eagle3.py`, `models/utils.py` (`AutoWeightsLoader`), `v1/worker/gpu_model_runner.py`.

These rules are shared by several kinds of draft. A rule takes the folder and what is known of the target, and yields
what is wrong. `kinds/` says which rules apply to a kind, with what arguments and in which order.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from .draft_folder import DraftFolder, Finding, Shape, TargetFacts, named, shape_findings


READER = "vLLM"


# ---- the config ----


def architecture(
    folder: DraftFolder,
    target: TargetFacts | None,
    resolve: Callable[[str], str],
    classes: Collection[str],
    model_types: Collection[str],
) -> Iterator[Finding]:
    """The config names a class that runs such a draft, and has a type that this class reads.

    Args:
        folder, target: as for every rule.
        resolve: maps a name in `architectures` to the one that vLLM looks up.
        classes: names that its registry resolves to the class that runs such a draft.
        model_types: model types that are read as such a draft.
    """
    names = folder.config.get("architectures") or []
    resolved = [resolve(name) for name in names]
    if not set(classes) & set(resolved):
        yield Finding(
            READER,
            f"`architectures` {names} resolves to {resolved}, none of which runs this draft.",
            f"name one of {', '.join(sorted(classes))}",
        )

    model_type = folder.config.get("model_type")
    if model_type not in model_types:
        what = "makes vLLM build a multi-token prediction head" if model_type == "deepseek_v3" else "is not supported"
        yield Finding(
            READER,
            f"`model_type` {model_type!r} for such a draft {what}.",
            f"set it to {' or '.join(map(repr, model_types))}",
        )


def layers(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The config counts as many layers as have tensors."""
    said = folder.config.get("num_hidden_layers")
    if said != folder.num_layers:
        yield Finding(
            READER,
            f"`num_hidden_layers` is {said}, but there are tensors of {folder.num_layers}: layers without tensors "
            "silently run on uninitialised memory.",
            f"set it to {folder.num_layers}",
        )


def vocab_size(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The vocabulary is the target's."""
    said = folder.config.get("vocab_size")
    if said is None or (target is not None and said != target.vocab_size):
        whose = "" if target is None else f", the target's is {target.vocab_size}"
        yield Finding(READER, f"`vocab_size` is {said}{whose}: draft tokens get other ids.", "set it to the target's")


def hidden_size(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The draft is as wide as the target, since it uses the target's embeddings."""
    said = folder.config.get("hidden_size")
    if target is not None and said != target.hidden_size:
        yield Finding(
            READER,
            f"`hidden_size` is {said}, the target's {target.hidden_size}: its embeddings cannot be shared, and the "
            "draft's own are uninitialised.",
            "serve the draft with the target that it was trained for",
        )


def biases(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """If the config asks for a bias in Llama's layer, the folder has one."""
    for name in ("attention_bias", "bias", "qkv_bias", "mlp_bias"):
        block = ".mlp." if name == "mlp_bias" else ".self_attn."
        if folder.config.get(name) and not any(block in n and n.endswith(".bias") for n in folder.shapes):
            yield Finding(
                READER,
                f"`{name}` is true, but there are no such tensors: biases of uninitialised memory are added.",
                "set it to false",
            )


def activation(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The activation is silu, since SwiGLU is hard-coded in vLLM's layers."""
    act = folder.config.get("hidden_act", "silu")
    if act != "silu":
        yield Finding(READER, f"`hidden_act` is {act!r}, and only silu is run.", "train with silu")


def rope_of(folder: DraftFolder) -> dict[str, Any]:
    """RoPE as vLLM reads it: the new spelling, or the old one if that is missing."""
    return folder.config.get("rope_parameters") or folder.config.get("rope_scaling") or {}


def rope_base(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """A base is written, in at least one spelling."""
    new, old = folder.config.get("rope_parameters") or {}, folder.config.get("rope_theta")
    if new.get("rope_theta") is None and old is None:
        yield Finding(
            READER,
            "no RoPE base is written: 10000 is used silently.",
            "write `rope_theta`, the base of training, at top level and in `rope_parameters`",
        )


def rotated_part(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """RoPE rotates the whole head."""
    part = rope_of(folder).get("partial_rotary_factor", 1.0)
    if part != 1.0:
        yield Finding(
            READER,
            f"`partial_rotary_factor` is {part}: only a part of each head is rotated, but training rotated all of it.",
            "leave it out",
        )


def assumed_base(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """Note a base that looks like a default that was never set."""
    said = folder.config.get("rope_theta")
    if target is not None and said == 10000 and target.rope.get("rope_theta", 10000) != 10000:
        yield Finding(
            READER,
            f"the RoPE base is 10000, which readers assume if none was written, and the target's is "
            f"{target.rope['rope_theta']:g}.",
            "make sure that the draft was trained with 10000",
            level="note",
        )


def context(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The draft's context is as long as the target's."""
    positions = folder.config.get("max_position_embeddings")
    if positions is None:
        yield Finding(READER, "`max_position_embeddings` is missing.", "set it to the target's")
    elif not isinstance(positions, int):
        yield Finding(READER, f"`max_position_embeddings` is {positions!r}, no whole number.", "set it to the target's")
    elif target is not None and positions < target.max_positions:
        yield Finding(
            READER,
            f"`max_position_embeddings` is {positions}, less than the target's {target.max_positions}: as soon as one "
            "sequence is longer, the draft does not run for any sequence of the batch, silently: at most token 0 is "
            "proposed and rejected (V1 runner). Versions before 0.32 read past their RoPE table.",
            "set it to the target's",
        )


def yarn_table(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """With YaRN, the table of RoPE is as long as the context."""
    rope, positions = rope_of(folder), folder.config.get("max_position_embeddings")
    if rope.get("rope_type", rope.get("type")) != "yarn" or not isinstance(positions, int):
        return

    reached = round((rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or positions))
    if reached < positions:
        yield Finding(
            READER,
            f"YaRN's table has `factor` x `original_max_position_embeddings`, {reached} positions, and "
            f"`max_position_embeddings` is {positions}: those between are read from outside of the table.",
            f"serve at most {reached} tokens (`--max-model-len`)",
            level="note",
        )


# ---- the tensors ----


def tensors(
    folder: DraftFolder,
    wanted: Mapping[str, Shape],
    places: Mapping[str, str],
    elsewhere: Collection[str] = (),
) -> Iterator[Finding]:
    """Every parameter has its tensor, and every tensor its parameter.

    Args:
        folder: the draft.
        wanted: names of vLLM's parameters in a checkpoint -> their shapes.
        places: name of a tensor -> the parameter that the loader looks for.
        elsewhere: names that need no parameter here.
    """
    given, unknown = {}, []
    for name, place in places.items():
        if place in wanted:
            given[place] = folder.shapes[name]
        elif place == "embed_tokens.weight":
            yield Finding(
                READER,
                "`embed_tokens.weight` is used instead of the target's embeddings, which SGLang uses.",
                "remove it",
            )
        elif place not in elsewhere:
            unknown.append(name)

    yield from _unknown(folder, unknown)
    yield from _missing(folder, [name for name in wanted if name not in given and name != "d2t"])
    yield from shape_findings(READER, folder, wanted, given)


def _unknown(folder: DraftFolder, names: list[str]) -> Iterator[Finding]:
    biases = [name for name in names if name.endswith(".bias")]
    if folder.config.get("attention_bias"):  # vLLM's attention has parameters for these then
        biases = [name for name in biases if ".self_attn." not in name]
    if biases:
        yield Finding(READER, f"{named(biases)} has no parameter and is silently dropped.", "train without biases")

    others = [name for name in names if not name.endswith(".bias")]
    if others:
        fix = "take `model.` off the names" if folder.prefixed else "remove what is not the draft's"
        yield Finding(READER, f"{named(others)} has no parameter of that name: loading fails.", fix)


def _missing(folder: DraftFolder, names: list[str]) -> Iterator[Finding]:
    if names == ["lm_head.weight"]:
        yield Finding(
            READER,
            "`lm_head.weight` is missing: the target's head is run instead.",
            "restore the tensor from the checkpoint that was trained; nothing can replace it",
        )
    elif names and not folder.prefixed:  # `_unknown` reports a wrong prefix
        yield Finding(
            READER,
            f"{named(map(folder.spelt, names))} is missing: it loads silently and runs on untrained numbers.",
            "restore the tensors from the checkpoint that was trained; nothing can replace them",
        )
