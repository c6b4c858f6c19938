"""The config of a DFlash draft, and the config.json of each of the two forms of its folder."""

import logging
from collections.abc import Mapping
from typing import Any

from torch.utils.data import IterableDataset
from transformers import LlamaConfig, PreTrainedConfig

from ...door.config_readings import scales_embeddings
from ...targets.architectures import family_of
from ...targets.config_fields import read_field
from ..configuration_base import DraftConfig, fields_of_head, fields_of_target, written_for_servers
from .mask_token import check_mask_token, choose_mask_token


logger = logging.getLogger(__name__)

ARCHITECTURE = "DFlashDraftModel"
# form of the folder -> `model_type`: the servers take both, transformers only its own
MODEL_TYPES = {"servers": "qwen3", "transformers": "muse_glimmer_assistant"}
_SLIDING = ("is_causal", "use_sliding_window", "sliding_window")
_NOT_WRITTEN = (
    *("draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids", "image_embeddings"),
    *("target_layer_ids", "mlp_bias", "served_form"),
)
_ALWAYS_WRITTEN = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "rms_norm_eps", "max_position_embeddings", "initializer_range"),
)


class DFlashConfig(DraftConfig):
    """Configuration of a DFlash draft: it has taps, and uses the target's vocabulary and head.

    Args:
        block_size (`int`, defaults to 8): slots of a block: that of the newest token, and those proposed after it.
        target_layer_ids (`list[int]`): layers whose OUTPUT is tapped, counted from 0, ascending.
        num_target_layers (`int`): layers of the target.
        mask_token_id (`int`, *optional*): token in the slots to be filled; chosen from tokenizer and data if `None`.
        share_k_norm (`bool`, defaults to `False`): whether layers share one `k_norm`; the folder has a copy for each.
        served_form (`str`, defaults to `"servers"`): form of the folder, `"servers"` or `"transformers"`.
        logit_scale, final_logit_softcapping (`float`, *optional*): what the target does to its logits, if anything.
        kwargs: as for [`DraftConfig`], and what config.json holds beside these.

    Raises:
        ValueError: for what readers run differently: sliding or causal attention, biases, a draft vocabulary.
    """

    model_type = MODEL_TYPES["servers"]
    free_in_warm_start = ("block_size", "served_form")

    block_size: int = 8
    target_layer_ids: list[int] | tuple[int, ...] | None = None
    num_target_layers: int | None = None
    mask_token_id: int | None = None
    share_k_norm: bool = False
    served_form: str = "servers"
    logit_scale: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self, **kwargs):
        for name, value in (kwargs.pop("dflash_config", None) or {}).items():
            if name not in ("mask_token_id", "target_layer_ids", "block_size"):
                raise ValueError(f"`dflash_config` holds `{name}` {value}, which readers treat differently: remove it.")
            setattr(self, name, value)

        kinds = set(kwargs.pop("layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"`layer_types` of a DFlash draft must all be full_attention, got {sorted(kinds)}.")
        wrong = [(name, kwargs.pop(name)) for name in _SLIDING if name in kwargs]
        for name, value in wrong:
            if value and not (name == "sliding_window" and self.served_form == "transformers"):
                raise ValueError(f"`{name}` of a DFlash draft must be unset, got {value}: it attends to all before it.")

        if self.target_layer_ids is not None:
            self.target_layer_ids = [int(number) for number in self.target_layer_ids]
        self.architectures = self.architectures or [ARCHITECTURE]
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        super()._check()
        self._require(
            "a DFlash",
            tie_word_embeddings=False,
            attention_bias=False,
            mlp_bias=False,
            hidden_act="silu",
            draft_vocab_size=self.vocab_size,
            target_hidden_size=self.hidden_size,
            eagle_aux_hidden_state_layer_ids=None,
            image_embeddings="token",
            draft_sliding_window=None,
        )

        # fields of its own
        if self.block_size < 2:
            raise ValueError(f"`block_size` of a DFlash draft must be at least 2, got {self.block_size}.")
        if self.served_form not in MODEL_TYPES:
            raise ValueError(f"`served_form` must be one of {', '.join(MODEL_TYPES)}, got {self.served_form!r}.")

        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` must be a row of the target's table, 0 to {self.vocab_size - 1}, got "
                f"{self.mask_token_id}."
            )
        # transformers compares a config with an empty one, to write what differs
        if (self.target_layer_ids, self.num_target_layers) != (None, None):
            check_layers(self.target_layer_ids or [], self.num_target_layers)

    @property
    def tap_ids(self) -> list[int] | None:
        """Entry ids of the taps: the output of layer k is the input of layer k + 1. `layers_of` is the opposite."""
        return None if self.target_layer_ids is None else [number + 1 for number in self.target_layer_ids]

    @property
    def chain_length(self) -> int:
        """A block's slots after that of the newest token."""
        return self.block_size - 1

    def as_arguments(self) -> dict[str, Any]:
        """See [`DraftConfig.as_arguments`]."""
        own = ("block_size", "mask_token_id", "share_k_norm", "served_form")
        layers = {"draft_num_layers": self.num_hidden_layers}
        return {"method": "dflash", **super().as_arguments(), **layers, **{name: getattr(self, name) for name in own}}

    def fit_to_data(self, tokenizer, data, embeddings, held: DraftConfig | None = None) -> None:
        """Choose the mask token if none was asked for, and refuse one that cannot mask.

        Args:
            tokenizer: the target's.
            data: to train on.
            embeddings: `(vocab_size, hidden)`, the target's.
            held: config of the draft that training continues or starts from: it keeps its mask token.

        Raises:
            ValueError: for a mask token that the data hold, even that of `held`, or whose row of the table is zero.
        """
        why, keeps = "as asked for", self.mask_token_id is None and held is not None
        if keeps:
            self.mask_token_id, why = held.mask_token_id, "as in the draft to start from"
        if self.mask_token_id is None:
            self.mask_token_id, why = choose_mask_token(tokenizer, data, embeddings)
        else:
            check_mask_token(self.mask_token_id, data, embeddings, keeps)

        searched = ", which the data do not hold"
        if isinstance(data, IterableDataset):
            searched = "; the stream is searched for it while it is read"
        logger.info("%s", f"The mask token of its blocks is {self.mask_token_id}{searched} ({why}).")

    def told_to_card(self) -> list[str]:
        """See [`DraftConfig.told_to_card`]."""
        # true of every run: a stream is never searched as a whole, but every batch is, where its blocks are planned
        return [f"The mask token of its blocks is {self.mask_token_id}; no block saw or predicted it in the data"]

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in `transformers`; tells the two forms of a folder apart by `model_type`."""
        found, rest = super().get_config_dict(*args, **kwargs)
        forms = {model_type: form for form, model_type in MODEL_TYPES.items()}
        form = forms.get(found.get("model_type"), "servers")
        return {**found, "model_type": cls.model_type, "served_form": form}, rest

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json: all that vLLM, SGLang and z-lab's code read, in its form also transformers."""
        written = written_for_servers(self, LlamaConfig.to_diff_dict(self))
        for name in _NOT_WRITTEN:
            written.pop(name, None)
        for name in ("logit_scale", "final_logit_softcapping", "share_k_norm"):
            if not written.get(name):  # vLLM would multiply by null
                written.pop(name, None)

        dflash = {"mask_token_id": self.mask_token_id, "target_layer_ids": self.target_layer_ids}
        written |= {name: getattr(self, name) for name in _ALWAYS_WRITTEN}
        written |= {
            "architectures": [ARCHITECTURE],
            "model_type": MODEL_TYPES[self.served_form],
            "block_size": self.block_size,
            "num_target_layers": self.num_target_layers,
            # without it, transformers makes all layers slide
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "use_sliding_window": False,
            "sliding_window": None,
            "dflash_config": dflash,
        }
        written.pop("mask_token_id", None)
        return written | self._for_transformers(dflash) if self.served_form == "transformers" else written

    def _for_transformers(self, dflash: dict[str, Any]) -> dict[str, Any]:
        """Fields that transformers reads at the top level, and of the types that it takes."""
        eos = self.eos_token_id
        if isinstance(eos, list):
            eos = eos[0] if eos else None
        return {**dflash, "eos_token_id": eos, "sliding_window": self.max_position_embeddings}


def layers_of(tap_ids: list[int]) -> list[int]:
    """Layers whose output is tapped, from the entry ids of the taps; the opposite of [`DFlashConfig.tap_ids`]."""
    return [number - 1 for number in tap_ids]


def default_layers(target_config: PreTrainedConfig, count: int) -> list[int]:
    """Layers whose output is tapped by default: `count` of them, spread evenly from layer 1 to layer N - 3.

    This is z-lab's rule, which has as many taps as the draft has layers. A family may have another first tap, see
    [`Family`]. A shallow target gets fewer.
    """
    num_layers, family = read_field(target_config.get_text_config(), "num_hidden_layers"), family_of(target_config)
    first, last = (1 if family is None else layers_of([family.first_tap])[0]), num_layers - 3
    spread = {round(first + number * (last - first) / (count - 1)) for number in range(count)}
    return sorted({min(max(number, 0), num_layers - 2) for number in spread})


def check_layers(layers: list[int], num_layers: int | None) -> None:
    """`ValueError` unless these are ascending, unique, and layers whose output all readers tap alike."""
    if num_layers is not None and num_layers < 2:
        raise ValueError(
            f"The target of a DFlash draft must have at least 2 layers, but `num_target_layers` is {num_layers}: the "
            "draft taps outputs of layers, and not the last one's; train a draft without taps, with `method` eagle1."
        )

    last = None if num_layers is None else num_layers - 2
    outside = [number for number in layers if number < 0 or (last is not None and number > last)]
    if outside or not layers:
        most = "the target's layers" if last is None else last + 1
        raise ValueError(
            f"`tap_ids` of a DFlash draft must be entry ids between 1 and {most}, got {[n + 1 for n in layers]}: it "
            "taps outputs of layers, and not the last one's, which readers norm differently."
        )

    if layers != sorted(set(layers)):
        raise ValueError(
            f"`tap_ids` of a DFlash draft must be ascending and unique, because vLLM taps in that order, got "
            f"{[n + 1 for n in layers]}."
        )


def config_for(target_config: PreTrainedConfig, options: Mapping[str, Any], **fields: Any) -> DFlashConfig:
    """The config of a new draft for a target.

    Args:
        target_config: the target's (text) config.
        options: arguments of the command line by name.
        fields: any other field of the config.

    Raises:
        ValueError: for a target that scales its embeddings, and for wrong taps.
    """
    if scales_embeddings(target_config):
        raise ValueError(
            "`method` is dflash, but the target scales its embeddings, and vLLM, SGLang and transformers each give a "
            "DFlash draft something else then: train an EAGLE-3 draft."
        )

    num_layers, count = read_field(target_config.get_text_config(), "num_hidden_layers"), options["draft_num_layers"]
    taps = options["tap_ids"]
    own = {name: options[name] for name in ("block_size", "mask_token_id", "share_k_norm", "served_form")}
    return DFlashConfig(
        **{
            **fields_of_target(
                target_config, fields.get("rope_parameters"), intermediate_size=fields.get("intermediate_size")
            ),
            **fields_of_head(target_config),
            **own,
            "num_hidden_layers": count,
            "num_target_layers": num_layers,
            "target_layer_ids": default_layers(target_config, max(3, count)) if taps is None else layers_of(taps),
            **fields,
        }
    )


def title_of(config: Mapping[str, Any]) -> str:
    """Return the name that people call this kind of draft, given its `config.json`."""
    return "DFlash"
