"""The kinds of draft that can be imported: one row per kind, with all their differences.

| row | our class | how it differs |
|---|---|---|
| `eagle1` | `LlamaForCausalLMEagle` | no taps, the target's vocabulary and head, `fc` with a bias that must be zero |
| `eagle3` | `LlamaForCausalLMEagle3` | taps, a vocabulary and a head of its own |
| `latent` | `Eagle3DeepseekV2ForCausalLM` | as `eagle3`, with multi-head latent attention |

Everything else is imported in the same way for all kinds. A [`Form`] names the rows that its folders may have.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..drafts.configuration_base import DraftConfig
from ..drafts.eagle1.configuration import Eagle1Config
from ..drafts.eagle3.configuration import EagleConfig
from ..drafts.eagle3.configuration_latent import EagleMLAConfig
from ..targets.latent import LATENT_SIZES
from .forms import Form
from .tensors import drop_biases, sort_vocabulary


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


def kind_of(form: Form, config: dict[str, Any]) -> ForeignKind:
    """Return the kind of a draft: its form's first kind whose marks are all in the config."""
    rows = [KINDS[name] for name in form.kinds]
    return next(row for row in rows if all(mark in config for mark in row.marks))


# ---- attention ----


def _grouped_heads(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    heads = fields["num_attention_heads"]
    return {
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or fields["hidden_size"] // heads,
    }


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


def _eagle3_fields(config: dict[str, Any], draft_vocab_size: int, tap_ids: list[int] | None) -> dict[str, Any]:
    return {
        "draft_vocab_size": draft_vocab_size,
        "tap_ids": tap_ids,
        "fc_norm": bool(config.get("fc_norm")),
        "norm_output": bool(config.get("norm_output")),
    }


def _no_biases(tensors: dict[str, torch.Tensor], drop_fc_bias: bool) -> None:
    drop_biases(tensors)


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
    meaningless={
        "drop_fc_bias": "`drop_fc_bias` is for EAGLE-1 drafts, and this one is in the form `{form}`: leave it out."
    },
)

_LATENT = replace(
    _EAGLE3,
    name="latent",
    config_class=EagleMLAConfig,
    attention_fields=_latent_sizes,
    marks=LATENT_SIZES,
    trained_otherwise={
        "nemo": {"mscale_all_dim": "NeMo trains latent attention without YaRN's temperature, which both servers apply"}
    },
)

KINDS = {row.name: row for row in (_EAGLE1, _EAGLE3, _LATENT)}
