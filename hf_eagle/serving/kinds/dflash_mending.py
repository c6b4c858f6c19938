"""Mend a DFlash draft: fields that follow from others or from the tensors, and names."""

from ...door.config_readings import FULL, SECOND_TYPE, SLIDING, nested, shown_dspark, slides_by_default
from .. import mending
from ..mending import Draft
from . import dflash_fields as fields


# fields that change what one reader computes, and that no draft was trained with
_UNREAD = ("eagle_config", "eagle_aux_hidden_state_layer_ids", "use_aux_hidden_state")


def _names(draft: Draft) -> None:
    """Name tensors as the folder's own form does."""
    second = draft.config.get("model_type") == SECOND_TYPE
    theirs = {"fc.": "encoder.fc.", "hidden_norm.": "encoder.output_norm_enc."} if second else {}

    def new_name(name: str) -> str:
        name = fields.place(name)
        start = next((start for start in theirs if name.startswith(start)), "")
        return theirs.get(start, "") + name.removeprefix(start)

    mending.rename(draft, new_name, f"tensors are named as in a folder of type {draft.config.get('model_type')}")


def _surplus(draft: Draft) -> None:
    """Remove copies of the target's embeddings, a map of the whole vocabulary, and biases of zeros."""
    whole = draft.config.get("draft_vocab_size") in (None, draft.config["vocab_size"])
    for name in list(draft.tensors):
        if name == "embed_tokens.weight" or (whole and name in ("d2t", "t2d")):
            why = "servers use the target's" if "embed" in name else "the draft has the whole vocabulary"
        elif name.endswith(".bias") and not draft.tensors[name].any():
            why = "it is zero"
        else:
            continue
        del draft.tensors[name]
        draft.done.append(f"`{name}` was removed: {why}")


def _classes(draft: Draft) -> None:
    """Name the class, unless the draft is of another kind."""
    if shown_dspark(draft.config, draft.tensors) is None:
        mending.classes(draft, (fields.ARCHITECTURE,), fields.MODEL_TYPES)


def _sizes(draft: Draft) -> None:
    """Write the sizes of attention that the tensors have."""
    widths = {name.split(".")[-2]: tensor.shape[0] for name, tensor in draft.tensors.items() if ".self_attn." in name}
    width, keys = widths.get("k_norm"), widths.get("k_proj")
    if width and keys:
        draft.write("head_dim", width)
        draft.write("num_key_value_heads", keys // width)


def _places(draft: Draft) -> None:
    """Write taps, mask token and block where each reader looks, if all places agree."""
    config, second = draft.config, draft.config.get("model_type") == SECOND_TYPE
    for name in ("target_layer_ids", "mask_token_id", "block_size"):
        said = [place[name] for place in (nested(config), config) if place.get(name) is not None]
        if not said or said.count(said[0]) != len(said):
            continue  # it is not known which was trained

        if name != "block_size":
            draft.write("dflash_config", {**nested(config), name: said[0]})
        if second or name == "block_size":
            draft.write(name, said[0])


def _taps(draft: Draft) -> None:
    """Remove other statements of the taps; without `target_layer_ids` they may be the only one."""
    if fields.layer_ids(draft.config) is None:
        return
    for name in _UNREAD:
        if name in draft.config:
            del draft.config[name]
            draft.done.append(f"`{name}` was removed: `target_layer_ids` names the taps")
    if draft.target is not None:
        draft.write("num_target_layers", draft.target.num_layers)


def _attention(draft: Draft) -> None:
    """Write full attention for each layer, unless the folder asks for another one."""
    config, types = draft.config, draft.config.get("layer_types")
    written = isinstance(types, list) and SLIDING in types
    if written or nested(config).get("use_swa") or slides_by_default(config, draft.num_layers):
        return
    draft.write("layer_types", [FULL] * draft.num_layers)
    if config.get("model_type") == SECOND_TYPE and not isinstance(config.get("sliding_window"), int):
        draft.write("sliding_window", 2048)  # a number is needed there, and not used


MENDING = (
    mending.names,
    _names,
    _surplus,
    _classes,
    mending.layers_and_context,
    _sizes,
    _places,
    _taps,
    _attention,
    mending.rope,
    mending.dtypes,
    mending.fields,
)
