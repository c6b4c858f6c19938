"""The kinds of draft that can be imported: one row per kind, with all their differences.

| row | our class | how it differs |
|---|---|---|
| `eagle1` | `LlamaForCausalLMEagle` | no taps, the target's vocabulary and head, `fc` with a bias that must be zero |
| `eagle3` | `LlamaForCausalLMEagle3` | taps, a vocabulary and a head of its own |
| `latent` | `Eagle3DeepseekV2ForCausalLM` | as `eagle3`, with multi-head latent attention |
| `dflash` | `DFlashDraftModel` | taps, any number of layers, the target's vocabulary and head, a mask token |

Everything else is imported in the same way for all kinds. A [`Form`] names the rows that its folders may have.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..door.config_readings import FULL, SLIDING, head_width, kv_heads, named, slides_by_default
from ..drafts.configuration_base import DraftConfig
from ..drafts.dflash import configuration as dflash
from ..drafts.eagle1.configuration import Eagle1Config
from ..drafts.eagle3.configuration import EagleConfig
from ..drafts.eagle3.configuration_latent import EagleMLAConfig
from ..targets.latent import LATENT_SIZES
from .forms import Form, stored_tap_ids
from .tensors import drop_biases, sort_vocabulary


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForeignKind:
    """How drafts of one kind are imported.

    Attributes:
        name: name of the row.
        config_class: config class of our drafts of this kind.
        layer: prefix of the layer's tensor names in our drafts.
        attention_fields: `(config, fields)` -> sizes of attention in our config, besides those in `fields`.
        own_fields: `(config, draft_vocab_size, tap_ids)` -> the other fields of our config of this kind.
        take_biases: `(tensors, drop_fc_bias)`: leave out biases or refuse them, in place.
        take_vocabulary: `(tensors, vocab_size)` -> number of draft tokens; sorts mapping and head in place.
        marks: fields that only a config of this kind has, among the kinds of the same form.
        meaningless: option of `from_foreign` -> why it is refused, with `{value}` and `{form}` to be filled in.
        trained_otherwise: form -> flag -> how the project's training differs from decoding in both servers.
        layer_types: model types that a layer of such a draft may have in the form `speculators`.
        attention_types: what its `layer_types` may name there.
        assumed: fields that readers of that form assume where they are missing.
        flags: flag -> values that change nothing, and why no other value can be kept, as for all kinds in `fields.py`.
        several_layers: whether servers run more than one layer of it.
        lent_head: whether a head in the file must be the target's.
        stored_taps: `(form, config, tensors, num_target_layers)` -> entry ids of the taps, `None` if none are named.
        check: raises `ValueError` for a flat config whose draft servers run differently; warns of what one may do.
        new_config: `(target_config, fields)` -> our config.
    """

    name: str
    config_class: type[DraftConfig]
    layer: str
    attention_fields: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    own_fields: Callable[[dict[str, Any], int, list[int] | None], dict[str, Any]]
    take_biases: Callable[[dict[str, torch.Tensor], bool], None]
    take_vocabulary: Callable[[dict[str, torch.Tensor], int], int]
    marks: tuple[str, ...] = ()
    meaningless: Mapping[str, str] = field(default_factory=dict)
    trained_otherwise: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    layer_types: tuple[str, ...] = ("llama",)
    attention_types: tuple[str, ...] = (FULL,)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, tuple[tuple, str]] = field(default_factory=dict)
    several_layers: bool = False
    lent_head: bool = False
    stored_taps: Callable[[Form, dict[str, Any], Iterable[str], int], list[int] | None] = stored_tap_ids
    check: Callable[[dict[str, Any]], None] = lambda config: None
    new_config: Callable[[PreTrainedConfig, dict[str, Any]], DraftConfig] | None = None

    def config(self, target_config: PreTrainedConfig, fields: dict[str, Any]) -> DraftConfig:
        """Our config of such a draft for its target, with these fields."""
        if self.new_config is not None:
            return self.new_config(target_config, fields)
        return self.config_class.from_target(target_config, **fields)


def kind_of(form: Form, config: dict[str, Any]) -> ForeignKind:
    """Return the kind of a draft: the one that its config names, else its form's first one with all marks in it."""
    rows = [KINDS[name] for name in form.kinds]
    named = [row for row in rows if row.name == config.get("speculators_model_type")]
    return next((row for row in [*named, *rows] if row in named or all(m in config for m in row.marks)), rows[-1])


# ---- attention ----


def _grouped_heads(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    heads = fields["num_attention_heads"]
    return {
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or fields["hidden_size"] // heads,
    }


def check_attention(config: dict[str, Any], types: tuple[str, ...] = (FULL,)) -> None:
    """Raise a `ValueError` for a type of layer that is none of those `types` which our drafts of a kind may have."""
    strange = [name for name in config.get("layer_types") or () if name not in types]
    if strange:
        raise ValueError(
            f"`layer_types` of this draft has {str(strange[0]).replace('_', ' ')}, which the servers run differently: "
            f"only {' and '.join(types).replace('_', ' ')} can be imported."
        )


def _latent_sizes(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in LATENT_SIZES}


# ---- EAGLE-1 ----


def _eagle1_fields(config: dict[str, Any], draft_vocab_size: int, tap_ids: list[int] | None) -> dict[str, Any]:
    return {}


def _zero_fc_bias(tensors: dict[str, torch.Tensor], drop_fc_bias: bool) -> None:
    """Store the bias of `fc` as zeros: SGLang would leave a missing one random."""
    trained = (
        "`fc.bias` of this draft was trained: vLLM drops it and SGLang adds it, so the two run different drafts. "
        "`drop_fc_bias` imports the draft that vLLM runs."
    )

    drop_biases(tensors, {"fc.bias": None if drop_fc_bias else trained})
    if "fc.weight" in tensors:
        tensors["fc.bias"] = tensors["fc.weight"].new_zeros(tensors["fc.weight"].shape[0])


def _whole_vocabulary(tensors: dict[str, torch.Tensor], vocab_size: int) -> int:
    return vocab_size


# ---- EAGLE-3 ----


def _window(config: dict[str, Any]) -> int | None:
    """The window that a draft was trained with. Only speculators trains with one."""
    if "speculators_model_type" not in config:
        return config.get("draft_sliding_window")
    if SLIDING not in (config.get("layer_types") or ()):
        return None

    window = config.get("sliding_window")
    if window is None:
        raise ValueError("`layer_types` of this draft has sliding attention, but it has no `sliding_window`.")
    logger.warning(
        "This draft was trained with a window of %d tokens, which is kept. At step s of the unroll speculators shows s "
        "keys more than servers and hf_eagle do: it moves the row, and not the window.",
        window,
    )
    return window


def _eagle3_fields(config: dict[str, Any], draft_vocab_size: int, tap_ids: list[int] | None) -> dict[str, Any]:
    return {
        "draft_sliding_window": _window(config),
        "draft_vocab_size": draft_vocab_size,
        "tap_ids": tap_ids,
        "fc_norm": bool(config.get("fc_norm")),
        "norm_output": bool(config.get("norm_output")),
    }


def _no_biases(tensors: dict[str, torch.Tensor], drop_fc_bias: bool) -> None:
    drop_biases(tensors)


# ---- DFlash ----


def _output_ids(form: Form, config: dict[str, Any], tensors: Iterable[str], num_target_layers: int) -> list[int] | None:
    """Entry ids of the taps. Speculators writes these; all others write the layers whose OUTPUTS are tapped."""
    entries = config.get("aux_hidden_state_layer_ids")
    if entries:
        return list(entries)
    outputs = named(config, "target_layer_ids")
    return [i + 1 for i in outputs] if outputs else None


def _block_fields(config: dict[str, Any], draft_vocab_size: int, tap_ids: list[int] | None) -> dict[str, Any]:
    found = {name: named(config, name) for name in ("block_size", "mask_token_id")}
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"`{name}` of this draft is {value!r}, without which no block can be made.")
    return {**found, "num_hidden_layers": config.get("num_hidden_layers", 1), "tap_ids": tap_ids}


def _new_block_config(target_config: PreTrainedConfig, fields: dict[str, Any]) -> DraftConfig:
    asked = {"share_k_norm": False, "served_form": "servers", "draft_num_layers": fields["num_hidden_layers"]}
    asked |= {name: fields.pop(name) for name in ("tap_ids", "block_size", "mask_token_id")}
    return dflash.config_for(target_config.get_text_config(), asked, **fields)


def _check_block(config: dict[str, Any]) -> None:
    """Refuse windows, and warn of what vLLM makes of a folder in the form of its speculators."""
    check_attention(config)
    if slides_by_default(config, config.get("num_hidden_layers", 1)):
        raise ValueError(
            "`use_sliding_window` of this draft is set and `layer_types` is not, which Qwen3's config class takes for "
            "sliding attention: only full attention can be imported."
        )

    if config.get("sliding_window_non_causal") is False:
        logger.warning(
            "`sliding_window_non_causal` is false, of which vLLM makes causal attention in ALL layers of the folder "
            "that was published. It has full attention, which speculators trains without an order inside a block: the "
            "imported draft is served as it was trained."
        )


def _target_vocabulary(tensors: dict[str, torch.Tensor], vocab_size: int) -> int:
    """Leave out a mapping of all tokens; refuse one of some, which SGLang and transformers do not read."""
    d2t = tensors.pop("d2t", None)
    tensors.pop("t2d", None)
    if d2t is not None and (d2t.numel() != vocab_size or d2t.any()):
        raise ValueError(
            f"`d2t` of this draft maps {d2t.numel()} draft tokens to {vocab_size} of the target: SGLang and "
            "transformers know no DFlash draft with a vocabulary of its own."
        )
    return vocab_size


def _block_heads(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """As `_grouped_heads`, with what the config's class assumes where none are written."""
    sizes = config | fields
    return {"num_key_value_heads": kv_heads(sizes), "head_dim": head_width(sizes)}


_CAUSAL = "its slots would not see the later slots of their block, as our drafts' do"
_BLOCK_FLAGS = {
    "is_causal": ((None, False), _CAUSAL),
    "causal": ((None, False), _CAUSAL),
    "use_swa": ((None, False), "only full attention can be imported"),
    "sample_from_anchor": ((None, False), "its slots predict one token further, as DSpark's do"),
    "conv_kernel_size": ((None, 0), "it is a DFlash2 draft, with a convolution that ours lack"),
    "selector_rank": ((None, 0), "it is a DFlash2 draft, with a selector that ours lack"),
    "attention_value_scale": ((None, 1, 1.0), "only vLLM scales values"),
    "attention_sink_bias": ((None, False), "only vLLM adds such a bias"),
    "is_neox_style": ((None, True), "halves of a head are rotated"),
}


# ---- the table ----

_EAGLE1 = ForeignKind(
    name="eagle1",
    config_class=Eagle1Config,
    layer="layers.0.",
    attention_fields=_grouped_heads,
    own_fields=_eagle1_fields,
    take_biases=_zero_fc_bias,
    take_vocabulary=_whole_vocabulary,
    meaningless={"tap_ids": "`tap_ids` is {value}, but an EAGLE-1 draft has no taps: leave it out."},
)

_EAGLE3 = ForeignKind(
    name="eagle3",
    config_class=EagleConfig,
    layer="midlayer.",
    attention_fields=_grouped_heads,
    own_fields=_eagle3_fields,
    take_biases=_no_biases,
    take_vocabulary=sort_vocabulary,
    attention_types=(FULL, SLIDING),
    assumed={"norm_before_residual": True},  # by vLLM
    meaningless={
        "drop_fc_bias": "`drop_fc_bias` is for EAGLE-1 drafts, and this one is in the form `{form}`: leave it out."
    },
)

_LATENT = replace(
    _EAGLE3,
    name="latent",
    config_class=EagleMLAConfig,
    attention_fields=_latent_sizes,
    attention_types=(FULL,),
    marks=LATENT_SIZES,
    trained_otherwise={
        "nemo": {"mscale_all_dim": "NeMo trains latent attention without YaRN's temperature, which both servers apply"}
    },
)

_DFLASH = ForeignKind(
    name="dflash",
    config_class=dflash.DFlashConfig,
    layer="layers.0.",
    attention_fields=_block_heads,
    own_fields=_block_fields,
    take_biases=_no_biases,
    take_vocabulary=_target_vocabulary,
    marks=("dflash_config",),
    meaningless=_EAGLE3.meaningless,
    layer_types=("qwen3", "llama"),
    flags=_BLOCK_FLAGS,
    several_layers=True,
    lent_head=True,
    stored_taps=_output_ids,
    check=_check_block,
    new_config=_new_block_config,
)

KINDS = {row.name: row for row in (_EAGLE1, _EAGLE3, _LATENT, _DFLASH)}
