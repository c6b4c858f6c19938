"""What SGLang 0.5.23 requires of a DFlash draft (`--speculative-algorithm DFLASH`), restated from its source.

It was not run: DFLASH needs a GPU.
"""

from collections.abc import Iterator
from functools import partial

from ...door.config_readings import MAIN_TYPE, named
from .. import rules_sglang
from ..draft_folder import DraftFolder, Finding, TargetFacts
from ..rules_sglang import READER
from . import dflash_fields as fields
from .row import Served


_BLOCK = 16  # slots of a block where none are written


def _model_type(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    model_type = folder.config.get("model_type")
    if model_type not in fields.MODEL_TYPES:
        yield Finding(
            READER,
            f"the installed transformers has no config of type {model_type!r}, or not that of a Qwen3 layer.",
            f"set `model_type` to '{MAIN_TYPE}'",
        )


def _sizes(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The width of a head is written, unless it is the hidden size over the heads."""
    config = folder.config
    widths = {shape[0] for name, shape in folder.shapes.items() if name.endswith(".k_norm.weight")}
    taken = config["hidden_size"] // config["num_attention_heads"]
    if "head_dim" not in config and widths - {taken}:
        yield Finding(
            READER,
            f"`head_dim` is missing: {taken}, `hidden_size` over heads, is taken, but the tensors have {min(widths)}.",
            f"set it to {min(widths)}",
        )


def _vocabulary(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """Tokens are drafted with the target's head, always."""
    if not fields.whole_vocabulary(folder.config, target):
        yield Finding(
            READER,
            f"`draft_vocab_size` is {folder.config['draft_vocab_size']}: a vocabulary and a head of its own are not "
            "supported, the target's head is run.",
            "train a draft with the whole vocabulary",
            level="limit",
        )


def _taps(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """Only outputs of layers are captured, and of most targets not the last one's."""
    ids, config = fields.layer_ids(folder.config), folder.config
    count = config.get("num_target_layers") if target is None else target.num_layers
    if ids is None:
        return

    if -1 in ids:
        yield Finding(
            READER,
            "`target_layer_ids` names -1, the embeddings, which are refused.",
            "train with taps of layers",
            level="limit",
        )
    if isinstance(count, int) and max(ids) == count - 1:
        yield Finding(
            READER,
            f"`target_layer_ids` names {count - 1}, the last layer: Llama and Qwen targets never capture it, vLLM "
            "takes it before the final norm, and transformers after it.",
            f"train with taps of layers below {count - 1}",
            level="limit",
        )

    said = config.get("num_target_layers")
    if said is not None and target is not None and said != target.num_layers:
        yield Finding(
            READER,
            f"`num_target_layers` is {said}, the target has {target.num_layers} layers: taps are checked against it.",
            f"set it to {target.num_layers}",
        )


def _block_size(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The size of a block is written; without a flag the server drafts so many tokens less one."""
    config, size = folder.config, named(folder.config, "block_size")
    if size is None:
        yield Finding(
            READER,
            f"`block_size` is missing: without `--speculative-num-draft-tokens` a block has {_BLOCK} slots, whatever "
            "it was trained with.",
            "write the slots of a block of training, the newest token's included",
        )
    elif not isinstance(size, int) or isinstance(size, bool) or size < 2:
        yield Finding(READER, f"`block_size` is {size!r}, and must be a whole number of at least 2.", "correct it")
    elif config.get("block_size", size) != size:
        yield Finding(
            READER,
            f"`block_size` is {config['block_size']} at top level, where transformers reads it, and {size} in "
            "`dflash_config`.",
            "write that of training in both, or at top level alone",
        )


def _tensors(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    lent = ("lm_head.weight", "d2t", "t2d")  # vLLM's rules report these
    names = [name for name in folder.shapes if not name.endswith(lent)]
    places = {name: fields.place(name.removeprefix("model.")) for name in names}
    yield from rules_sglang.tensors(folder, fields.parameters(folder.config, folder.num_layers), places)


SGLANG = Served(
    name="DFLASH",
    rules=(
        partial(rules_sglang.architecture, wanted=fields.ARCHITECTURE),
        _model_type,
        rules_sglang.layers,
        _vocabulary,
        rules_sglang.hidden_size,
        _sizes,
        partial(fields.taps_known, reader=READER),
        _taps,
        _block_size,
        partial(fields.causal, reader=READER),
        partial(fields.windows, reader=READER),
        partial(rules_sglang.bias, name="attention_bias"),
        rules_sglang.rope_base,
        rules_sglang.dtype,
        _tensors,
    ),
    options=lambda count: f"--speculative-num-draft-tokens {count + 1}",
)
