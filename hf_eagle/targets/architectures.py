"""Known properties of target families, and what a config says of taps and logits.

Targets are tapped by discovery (`decoder_parts.py`): no family needs a path, arguments or default taps of its own.
`FAMILIES` holds what the model cannot show: what the servers do with it. Tests build, tap, pack and train on each row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .config_fields import read_field
from .media_inputs import deepstack_layers


@dataclass(frozen=True)
class Family:
    """A family of targets, as vLLM 0.32 and SGLang 0.5.23 serve it (read in their source).

    Attributes:
        name: what people call it.
        model_types: of its text configs.
        servers: which of `"vllm"` and `"sglang"` take taps (EAGLE-3) from their own model of it. vLLM also takes them,
            except entry 0, from any model that it runs through transformers (`--model-impl transformers`), which it
            does not do with recurrent layers.
        recurrent: whether it has such layers.
        sglang_counts_entries: SGLang reads its tap ids as ENTRY ids unless the first is 1; else always as OUTPUT ids.
        mlp_factor: width of a draft's MLP over the hidden size, where the config names only one expert's width.
        first_tap: entry id of the first tap by default. Qwen3-VL adds image features after layers 0 to 2; from entry 4
            on, all conventions of counting layers agree.
    """

    name: str
    model_types: tuple[str, ...]
    servers: tuple[str, ...] = ("vllm", "sglang")
    recurrent: bool = False
    sglang_counts_entries: bool = False
    mlp_factor: int | None = None
    first_tap: int = 2


FAMILIES = (
    Family("Llama", ("llama",)),
    Family("Llama 4", ("llama4_text",)),
    Family("Mistral", ("mistral",)),
    Family("Mixtral", ("mixtral",), servers=()),
    Family("Qwen2", ("qwen2",)),
    Family("Qwen3", ("qwen3",)),
    Family("Qwen3-MoE", ("qwen3_moe",)),
    Family("Qwen2.5-VL", ("qwen2_5_vl_text",)),
    Family("Qwen3-VL", ("qwen3_vl_text",), first_tap=4),
    Family("Qwen3-VL-MoE", ("qwen3_vl_moe_text",), first_tap=4),
    Family("Phi-3", ("phi3",)),
    Family("gpt-oss", ("gpt_oss",), mlp_factor=6),  # as the published drafts for it: 17280 of 2880
    Family("Gemma 2", ("gemma2",), servers=()),
    Family("Gemma 3", ("gemma3_text",), servers=("sglang",)),
    Family("GLM-4", ("glm", "glm4"), servers=()),
    Family("GLM-4.5", ("glm4_moe",), servers=("sglang",)),
    Family("GLM-4.7-Flash", ("glm4_moe_lite",), servers=("sglang",), sglang_counts_entries=True),
    Family("DeepSeek-V2/V3, Kimi", ("deepseek_v2", "deepseek_v3", "kimi_k2"), sglang_counts_entries=True),
    Family("DeepSeek-V3.2", ("deepseek_v32",), servers=("sglang",), sglang_counts_entries=True),
    Family("GLM-5", ("glm_moe_dsa",), servers=("sglang",), sglang_counts_entries=True),
    Family("Gemma 4", ("gemma4_text",)),
    Family("MiniMax-M2", ("minimax_m2",)),
    Family("MiniMax-01", ("minimax",), servers=(), recurrent=True),
    Family("Qwen3-Next", ("qwen3_next",), recurrent=True),
    Family("Qwen3.5", ("qwen3_5_text",), recurrent=True),
    Family("Qwen3.5-MoE", ("qwen3_5_moe_text",), recurrent=True),
    Family("Kimi-Linear", ("kimi_linear",), servers=("vllm",), recurrent=True),  # vLLM not on AMD
    Family("Nemotron-H", ("nemotron_h",), servers=("vllm",), recurrent=True),
    Family("Falcon-H1", ("falcon_h1",), servers=(), recurrent=True),
    Family("Jamba", ("jamba",), servers=(), recurrent=True),
    Family("Bamba", ("bamba",), servers=(), recurrent=True),
    Family("LFM2", ("lfm2", "lfm2_moe"), servers=(), recurrent=True),
)


def family_of(config) -> Family | None:
    """The family of a target's config, `None` if it is none of `FAMILIES`."""
    model_type = config.get_text_config().model_type
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def check_length(config, max_length: int) -> None:
    """Refuse sequences so long that a target's output for one depends on the others in its batch (longrope).

    Raises:
        ValueError: names the length that works.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    longest = rope.get("original_max_position_embeddings")

    if rope.get("rope_type") == "longrope" and longest is not None and max_length > longest:
        raise ValueError(
            f"`max_length` is {max_length}, but beyond {longest} tokens this target rotates every sequence of a batch "
            f"differently (longrope), short ones too: set it to at most {longest}, and serve with that context at most."
        )


def longest_context(config) -> int | None:
    """Tokens that a target reads at most, `max_position_embeddings` and what its RoPE scaling adds; `None` if unknown.

    Some scaled models count that in already, others do not: the larger of both holds.
    """
    text = config.get_text_config()
    positions, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    if not isinstance(positions, int):
        return None

    ropes = [rope, *(x for x in rope.values() if isinstance(x, dict))]  # each type of layer may have its own
    scaled = ((x.get("original_max_position_embeddings") or positions) * (x.get("factor") or 1) for x in ropes)
    return max(positions, *map(int, scaled))


def window_of_all_layers(config) -> int | None:
    """The window of a target all of whose layers slide (Mistral 7B v0.1, Phi-3 mini), if shorter than its context."""
    text = config.get_text_config()
    types, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    if (types and set(types) != {"sliding_attention"}) or not isinstance(window, int) or window < 1:
        return None

    longest = longest_context(config)
    return None if longest is not None and window >= longest else window


# fields of a config that logits are multiplied by
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
# those that logits are divided by, also if the head's input is instead (Inkling)
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# families that multiply by their `logits_scaling`; all others divide by it
_MULTIPLY_BY_SCALING = ("hyperclovax",)


def logit_transform(config) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a target's `forward` does to its head's output (scaling, soft cap), read from its text config.

    [`check_teacher`] finds out whether that is all.
    """
    divide, multiply, cap = (
        next((x for name in names if (x := getattr(config, name, None)) is not None), None)
        for names in (_DIVISORS, _MULTIPLIERS, _SOFT_CAPS)
    )

    if config.model_type in _MULTIPLY_BY_SCALING:
        divide, multiply = None, divide

    def transform(logits: torch.Tensor) -> torch.Tensor:
        if divide is not None:
            logits = logits / divide
        if multiply is not None:
            logits = logits * multiply
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return transform


def default_tap_ids(config) -> list[int]:
    """Entry ids that both servers use when a draft names none: `(2, N // 2, N - 3)` for a target of `N` layers.

    A family may have another first tap, see [`Family`].

    Args:
        config: the target's.

    Raises:
        ValueError: if the target is too shallow for three different taps; the message lists usable ids.
    """
    num_layers, family = read_field(config.get_text_config(), "num_hidden_layers"), family_of(config)
    first = 2 if family is None else family.first_tap
    ids = [first, num_layers // 2, num_layers - 3]

    if ids != sorted(set(ids)):
        usable = sorted({0, num_layers // 2, num_layers})
        raise ValueError(
            f"The default taps ({first}, N // 2, N - 3) need a target of at least {max(2 * first + 2, 7)} layers, this "
            f"one has {num_layers}: "
            f"pass `tap_ids`, for example {','.join(map(str, usable))}."
        )

    return ids


def check_tap_ids(tap_ids: list[int], num_layers: int) -> list[int]:
    """Ascending, unique entry ids in `0..num_layers`, or a `ValueError` that says which one is wrong."""
    tap_ids = [int(i) for i in tap_ids]
    outside = [i for i in tap_ids if not 0 <= i <= num_layers]

    if outside or not tap_ids:
        raise ValueError(
            f"`tap_ids` must be entry ids between 0 and {num_layers} (the target has {num_layers} layers; id k is the "
            f"input of layer k, id {num_layers} the input of the final norm), got {tap_ids}."
        )

    if tap_ids != sorted(set(tap_ids)):
        raise ValueError(
            f"`tap_ids` must be ascending and unique because vLLM sorts and de-duplicates them, got {tap_ids}: "
            f"use {sorted(set(tap_ids))}."
        )

    return tap_ids


def check_returned(model: PreTrainedModel, tap_ids: list[int], num_layers: int) -> None:
    """Refuse an entry whose input a model's `output_hidden_states` does not hold, with a `ValueError`."""
    if num_layers in tap_ids:
        raise ValueError(
            f"`tap_ids` holds {num_layers}, the final norm's input, which `output_hidden_states` does not return: use "
            '`tap_method="hooks"`.'
        )

    behind = deepstack_layers(model.config)
    other = [tap_id for tap_id in tap_ids if 0 < tap_id <= behind]
    if other:
        raise ValueError(
            f"`tap_ids` holds {other[0]}, but {type(model).__name__} adds image features after its first {behind} "
            "layers, which the servers see and `output_hidden_states` does not return: use "
            f'`tap_method="hooks"`, or 0 and taps from {behind + 1} on.'
        )
