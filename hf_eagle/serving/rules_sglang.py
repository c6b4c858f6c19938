"""How SGLang 0.5 reads a draft folder, restated from its source and independently of how hf_eagle writes one.

Sources (0.5.23): `models/llama_eagle.py`, `llama_eagle3.py`, `kimi_k25_eagle3.py`, `set_eagle3_layers_to_capture` of
the targets, `model_runner_components/spec_aux_hidden_state.py`, `configs/model_config.py`.

These rules are shared by several kinds of draft. A rule takes the folder and what is known of the target, and yields
what is wrong. `kinds/` says which rules apply to a kind, with what arguments and in which order.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from .draft_folder import DraftFolder, Finding, Shape, TargetFacts, named, shape_findings


READER = "SGLang"
# targets with latent attention whose class still adds 1 to the ids
_LATENT_BUT_COUNTS_OUTPUTS = ("longcat_flash", "glm5_next")


# ---- the config ----


def architecture(folder: DraftFolder, target: TargetFacts | None, wanted: str) -> Iterator[Finding]:
    """The config names the class that runs such a draft."""
    names = folder.config.get("architectures") or []
    if wanted not in names:
        yield Finding(READER, f"`architectures` {names} does not name {wanted}.", f"put {wanted} first")


def llama_type(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """Llama's classes can read the config."""
    model_type = folder.config.get("model_type")
    if model_type != "llama":
        yield Finding(
            READER, f"the Llama draft class is given a config of type {model_type!r}.", "set `model_type` to 'llama'"
        )


def layers(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The config counts as many layers as have tensors."""
    said = folder.config.get("num_hidden_layers")
    if said != folder.num_layers:
        yield Finding(
            READER,
            f"`num_hidden_layers` is {said}, but there are tensors of {folder.num_layers}: the others are random.",
            f"set it to {folder.num_layers}",
        )


def tied(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The head is not tied to the embeddings."""
    if folder.config.get("tie_word_embeddings"):
        yield Finding(
            READER,
            "`tie_word_embeddings` is true: the draft's head is replaced by the target's embedding table.",
            "set it to false, whatever the target has",
        )


def hidden_size(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The draft is as wide as the target, since it uses the target's embeddings."""
    said = folder.config.get("hidden_size")
    if target is not None and said != target.hidden_size:
        yield Finding(
            READER,
            f"`hidden_size` is {said}, the target's is {target.hidden_size}: the target's embeddings are not used, "
            "and the draft's own are random.",
            "serve the draft with the target that it was trained for",
        )


def counts_entries(target: TargetFacts) -> bool:
    """Return whether this target's class reads ids as ENTRY ids (unless the first is 1), not as OUTPUT ids."""
    return target.latent and not target.model_type.startswith(_LATENT_BUT_COUNTS_OUTPUTS)


def captured_ids(config: dict, target: TargetFacts | None) -> list[int] | None:
    """Layers whose ENTRY is captured for this draft with this target; `None` for the target class's default."""
    ids = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if not ids:
        return None
    if target is not None and counts_entries(target) and ids[0] != 1:
        return list(ids)
    if target is not None and target.model_type == "gpt_oss" and max(ids) == target.num_layers:
        return list(ids)
    return [i + 1 for i in ids]


def bias(folder: DraftFolder, target: TargetFacts | None, name: str) -> Iterator[Finding]:
    """If the field `name` asks for a bias, the folder has one."""
    if folder.config.get(name) and not any(tensor.endswith(".bias") for tensor in folder.shapes):
        yield Finding(READER, f"`{name}` is true, but there are no biases: random ones are added.", "set it to false")


def rope_base(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The base is written where SGLang reads it."""
    new = folder.config.get("rope_parameters")
    base = folder.config.get("rope_theta") if new is None else new.get("rope_theta", folder.config.get("rope_theta"))

    if base is None:
        yield Finding(
            READER,
            "no RoPE base is written: 10000 is used silently.",
            "write `rope_theta`, the base of training, at top level and in `rope_parameters`",
        )


def _stretched(rope: dict[str, Any]) -> float:
    """The factor by which this RoPE extends the context beyond `max_position_embeddings`."""
    own = "original_max_position_embeddings" in rope or rope.get("rope_type") == "llama3"
    return 1 if own else rope.get("factor") or 1


def needed_positions(config: dict, target: TargetFacts) -> int:
    """The smallest `max_position_embeddings` that gives a draft with this RoPE the target's context."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return math.ceil(int(target.max_positions * _stretched(target.rope)) / _stretched(rope))


def context(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The draft's context is as long as the target's."""
    positions = folder.config.get("max_position_embeddings")
    if positions is None:
        yield Finding(READER, "`max_position_embeddings` is missing.", "set it to the target's")
    elif not isinstance(positions, int):
        yield Finding(READER, f"`max_position_embeddings` is {positions!r}, no whole number.", "set it to the target's")
    elif target is not None and positions < needed_positions(folder.config, target):
        yield Finding(
            READER,
            f"`max_position_embeddings` of {positions} gives a shorter context than the target's, and the draft is "
            "refused.",
            f"set it to {needed_positions(folder.config, target)}",
        )


def dtype(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """A dtype is written, and the server keeps it."""
    said = folder.config.get("dtype") or folder.config.get("torch_dtype")
    if said is None:
        yield Finding(
            READER, "neither `dtype` nor `torch_dtype` is written: float16 is taken.", "write the dtype of the tensors"
        )
    elif said == "float32":
        yield Finding(
            READER,
            "a float32 draft runs in float16 by default.",
            "start the server with `--dtype bfloat16`, or save the draft in bfloat16, if that matters",
            level="note",
        )


# ---- the tensors ----


def tensors(folder: DraftFolder, wanted: Mapping[str, Shape], places: Mapping[str, str]) -> Iterator[Finding]:
    """Every parameter has its tensor, and every tensor its parameter.

    Args:
        folder: the draft.
        wanted: names of SGLang's parameters in a checkpoint -> their shapes.
        places: name of a tensor -> the parameter that the loader looks for.
    """
    given, dropped = {}, []
    for name, place in places.items():
        if place in wanted:
            given[place] = folder.shapes[name]
        elif place != "embed_tokens.weight":
            dropped.append(name)

    if dropped:
        yield Finding(
            READER,
            f"{named(dropped)} has no parameter of that name and is silently dropped.",
            "remove it, or give it the name that it was meant to have",
        )

    missing = [folder.spelt(name) for name in wanted if name not in given]
    if missing:
        fix = "restore the tensors from the checkpoint that was trained; nothing can replace them"
        if folder.prefixed:
            fix = "take `model.` off the names"
        elif missing == ["fc.bias"]:
            fix = "save zeros as `fc.bias`"
        yield Finding(READER, f"{named(missing)} is missing: it silently stays random.", fix)

    yield from shape_findings(READER, folder, wanted, given)
