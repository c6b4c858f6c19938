"""What vLLM 0.32 requires of a DFlash draft, restated from its source.

Sources: `models/qwen3_dflash.py`, `v1/spec_decode/dflash.py` and `llm_base_proposer.py`, `config/speculative.py`,
`transformers_utils/configs/{eagle,muse_glimmer}.py`, `v1/worker/gpu_model_runner.py`.
"""

from collections.abc import Iterator
from functools import partial

import torch

from ...door.config_readings import MAIN_TYPE, SECOND_TYPE, head_width, kv_heads, named, nested, slides_by_default
from .. import rules_vllm
from ..draft_folder import DraftFolder, Finding, TargetFacts
from ..rules_folder import DTYPES
from ..rules_vllm import READER
from . import dflash_fields as fields
from .row import Served


_ENTRIES = "eagle_aux_hidden_state_layer_ids"
# registered for `models/qwen3_dflash.py`, after `_resolve`
_CLASSES = (fields.ARCHITECTURE, "DFlashMuseGlimmerAssistantModel")


# ---- the config ----


def _resolve(name: str) -> str:
    """The name that vLLM with method `dflash` looks up for one in `architectures`."""
    # its registry first has to know the name as it is written, and does not know `DraftModel`
    name = str(name)
    whole = name.startswith("DFlash") or name.endswith("DFlash") or name == "DraftModel"
    return name if whole else f"DFlash{name}"


def _read_as(config: dict) -> str | None:
    """The model type whose class vLLM takes: that of the second form is its own, made from Qwen3's."""
    return MAIN_TYPE if config.get("model_type") == SECOND_TYPE else None


def _sizes(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """Sizes of attention are written; the config's class has defaults that do not depend on other sizes."""
    config = folder.config
    rows = {name.split(".")[-2]: shape[0] for name, shape in folder.shapes.items() if ".self_attn." in name}
    width, keys = rows.get("k_norm"), rows.get("k_proj")
    taken = kv_heads(config, _read_as(config))

    if "head_dim" not in config and width not in (None, head_width(config)):
        yield Finding(
            READER,
            f"`head_dim` is missing: {head_width(config)} is taken, but the tensors have {width}, and loading fails.",
            f"set it to {width}",
        )
    if "num_key_value_heads" not in config and width and keys not in (None, taken * width):
        yield Finding(
            READER,
            f"`num_key_value_heads` is missing: {taken} are taken, and loading fails.",
            f"set it to {keys // width}",
        )
    if config.get("target_hidden_size") not in (None, config["hidden_size"]):
        yield Finding(
            READER,
            f"`target_hidden_size` is {config['target_hidden_size']}, `hidden_size` {config['hidden_size']}: such a "
            "draft needs its own embeddings and head, which SGLang does not load.",
            "leave the field out, and train for a target of the draft's width",
        )
    if "rms_norm_eps" not in config:
        yield Finding(
            READER,
            "`rms_norm_eps` is missing: vLLM and SGLang take 1e-6, transformers 1e-5.",
            "write the one of training",
        )


def _taps(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The layers that vLLM records are those that are written, in their order."""
    config, ids = folder.config, fields.layer_ids(folder.config)
    if ids is None:
        return

    if "target_layer_ids" not in nested(config):
        yield Finding(
            READER,
            "`target_layer_ids` is at top level only: loading fails.",
            "write it in `dflash_config`",
        )
    if ids != sorted(set(ids)):
        yield Finding(
            READER,
            f"`target_layer_ids` {ids} is recorded in the order of layers, where transformers joins as written: the "
            "columns of `fc` silently meet other taps.",
            "write ascending unique ids and order the columns of `fc` by them",
        )

    entries = config.get(_ENTRIES)
    if entries and entries != [i + 1 for i in ids]:
        yield Finding(
            READER,
            f"the top-level `{_ENTRIES}` {entries} wins over `target_layer_ids` {ids}: the INPUTS of those layers are "
            "recorded, silently.",
            "leave the former out",
        )
    if config.get("eagle_config"):
        yield Finding(
            READER,
            "`eagle_config` replaces the taps in `dflash_config`, and the server crashes.",
            "leave `eagle_config` out",
        )
    if named(config, "use_aux_hidden_state") not in (None, True):
        yield Finding(
            READER,
            "`use_aux_hidden_state` is false: the draft gets the last hidden state instead of its taps.",
            "leave the field out",
        )


def _mask(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The mask token is a row of the target's table, and the same for every reader."""
    config, mask = folder.config, named(folder.config, "mask_token_id")
    vocab = config["vocab_size"] if target is None else target.vocab_size
    fix = "write the id of training as `dflash_config.mask_token_id`"

    if "mask_token_id" not in {**nested(config), **config}:
        yield Finding(READER, "`dflash_config.mask_token_id` is missing: the draft is refused.", fix)
    elif not isinstance(mask, int) or isinstance(mask, bool) or mask < 0:
        yield Finding(READER, f"`mask_token_id` is {mask!r}, no token: the server crashes.", fix)
    elif mask >= vocab:
        yield Finding(
            READER,
            f"`mask_token_id` is {mask}, but the table has {vocab} rows: vLLM on a CPU silently reads behind it, and "
            "SGLang refuses the draft.",
            fix,
        )
    elif config.get("mask_token_id", mask) != mask:
        yield Finding(
            READER,
            f"`mask_token_id` is {config['mask_token_id']} at top level, where transformers reads it, and {mask} in "
            "`dflash_config`, where the servers do.",
            "write the id of training in both",
        )

    if (folder.path / "mask_embedding.pt").exists():
        yield Finding(
            READER,
            "`mask_embedding.pt` replaces the embedding of the mask token: SGLang writes it into the target's table, "
            "and transformers does not read it.",
            "remove the file, and train with the target's own embedding",
        )


def _causal(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """Rows of a block see each other. `is_causal` wins, then `dflash_config.causal`."""
    yield from fields.causal(folder, target, READER)
    if folder.config.get("is_causal") is None and nested(folder.config).get("causal"):
        yield Finding(
            READER,
            "`dflash_config.causal` is true: a slot does not see the later slots of its block, which training showed. "
            "SGLang does not read it.",
            "leave the field out",
        )


def _windows(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    yield from fields.windows(folder, target, READER)
    config = folder.config
    if nested(config).get("use_swa") or slides_by_default(config, folder.num_layers):
        yield Finding(
            READER,
            "`dflash_config.use_swa`, or `use_sliding_window` without `layer_types`, asks for sliding attention, which "
            "hides keys that training showed.",
            "leave these fields out, and write `layer_types`",
        )
    # `Attention` of a layer without a window takes that of the cache, which is the target's if all its layers slide
    if target is not None and target.window is not None:
        yield Finding(
            READER,
            f"all layers of the target slide, and vLLM gives its window of {target.window} tokens to the draft too: "
            "beyond them the draft does not see keys that training showed, and fewer of its tokens are accepted.",
            f"serve at most {target.window} tokens (`--max-model-len`), or train an EAGLE-3 draft",
            level="limit",
        )


def _vocabulary(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """A draft without a vocabulary of its own proposes with the target's head, in every reader."""
    config, has_map = folder.config, any("d2t" in name for name in folder.shapes)
    whole = fields.whole_vocabulary(config, target)
    if whole and has_map:
        yield Finding(
            READER,
            "`d2t` has no parameter where the draft has the whole vocabulary: loading fails.",
            "remove `d2t` and `t2d`",
        )
    elif not whole and not has_map:
        yield Finding(
            READER,
            f"`draft_vocab_size` is {config['draft_vocab_size']} without a `d2t`: draft tokens are silently taken for "
            "the target's first ones.",
            "leave the field out if the draft has no head of its own; else restore `d2t`",
        )

    if whole and "lm_head.weight" in folder.shapes:
        yield Finding(
            READER,
            "`lm_head.weight` is used instead of the target's head, which SGLang and transformers use.",
            "remove it if it is a copy of the target's; a draft with a head of its own cannot be served alike",
        )


def _scales(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """Fields that change the computation here, and that not every reader knows."""
    harmless = {"is_neox_style": (None, True), "attention_sink_bias": (None, False)}
    harmless |= {"attention_value_scale": (None, 1, 1.0)}
    strange = {name for name, values in harmless.items() if named(folder.config, name) not in values}
    # a positive factor leaves the most probable token where it was
    scale = folder.config.get("logit_scale", 1)
    if not isinstance(scale, (int, float)) or scale <= 0:
        strange.add("logit_scale")

    for name in sorted(strange):
        yield Finding(
            READER,
            f"`{name}` is {named(folder.config, name)!r}: vLLM computes with it, and other readers do not all know it.",
            "leave the field out",
        )


def _context(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The draft's context is as long as the target's."""
    positions = folder.config.get("max_position_embeddings")
    if not isinstance(positions, int) or isinstance(positions, bool):
        seen = "is missing" if positions is None else f"is {positions!r}, no whole number"
        yield Finding(READER, f"`max_position_embeddings` {seen}.", "set it to the target's")
    elif target is not None and positions < target.max_positions:
        yield Finding(
            READER,
            f"`max_position_embeddings` is {positions}, less than the target's {target.max_positions}: where a block "
            "would pass it, vLLM 0.32 silently drafts zeros, and SGLang's table of RoPE ends.",
            "set it to the target's",
        )


# ---- the tensors ----


def _tensors(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    wanted = fields.parameters(folder.config, folder.num_layers, _read_as(folder.config))
    if not fields.whole_vocabulary(folder.config, target):
        wanted["lm_head.weight"] = (folder.config["draft_vocab_size"], folder.config["hidden_size"])

    # `_vocabulary` reports mapping and head
    places = {name: fields.place(name) for name in folder.shapes if "t2d" not in name and "d2t" not in name}
    yield from rules_vllm.tensors(folder, wanted, places, elsewhere=("lm_head.weight",))


def _key_norms(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """On a CPU the context's keys of every layer get the first layer's norm (vllm#46761)."""
    names = sorted(name for name in folder.shapes if name.endswith(".self_attn.k_norm.weight"))
    if not all(folder.dtypes[name] in DTYPES and folder.shapes[name] == folder.shapes[names[0]] for name in names):
        return  # reported elsewhere

    norms = [folder.tensor(name) for name in names]
    if not all(torch.equal(norms[0], norm) for norm in norms[1:]):
        yield Finding(
            READER,
            f"on a CPU alone, the context's keys of all {len(names)} layers are normed by the first layer's `k_norm`, "
            "and less is accepted than on a GPU.",
            "measure on a GPU, or train with one layer or with `--share_k_norm`",
            level="note",
        )


VLLM = Served(
    name="dflash",
    rules=(
        partial(rules_vllm.architecture, resolve=_resolve, classes=_CLASSES, model_types=fields.MODEL_TYPES),
        rules_vllm.layers,
        rules_vllm.vocab_size,
        _vocabulary,
        rules_vllm.hidden_size,
        _sizes,
        partial(fields.taps_known, reader=READER),
        _taps,
        _mask,
        _causal,
        _windows,
        rules_vllm.biases,
        rules_vllm.activation,
        _scales,
        rules_vllm.rope_base,
        rules_vllm.rotated_part,
        rules_vllm.assumed_base,
        _context,
        partial(fields.embedding_factor, reader=READER),
        _tensors,
        _key_norms,
    ),
)


# ---- a folder in the form of vLLM's speculators ----


def converted_causal(folder: DraftFolder) -> Iterator[Finding]:
    """vLLM takes `causal` from a field that is about windows."""
    if folder.config.get("sliding_window_non_causal", True) is False:
        yield Finding(
            READER,
            "`sliding_window_non_causal` is false, as speculators' trainer writes by default: vLLM makes ALL layers "
            "causal of it, those with full attention too, which were not trained so.",
            "import the draft with `hf-eagle import`, or set the field to true if its layers have full attention",
        )
