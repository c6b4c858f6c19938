"""EAGLE-3 with latent attention (MLA), for DeepSeek, Kimi and any other target."""

from collections.abc import Iterator
from functools import partial

import torch

from .. import rules_folder, rules_sglang, rules_vllm
from ..draft_folder import DraftFolder, Finding, Shape, TargetFacts
from ..served_math import mscale, rope_of, rotation
from . import taps_mending, taps_sglang, taps_vllm
from .eagle3 import CITATION, ServedEagle3, label
from .row import Served, ServedKind


ARCHITECTURES = ("Eagle3DeepseekV2ForCausalLM",)
MODEL_TYPES = ("kimi_k2", "deepseek_v2")


def tells(folder: DraftFolder) -> bool:
    """Whether keys and values come from a latent, or the config names a DeepSeek class."""
    if any(".kv_a_proj_with_mqa." in name or ".kv_b_proj." in name for name in folder.shapes):
        return True
    return any("Deepseek" in str(name) for name in folder.config.get("architectures") or [])


def _rope_type(reader: str, rope_type: str) -> Iterator[Finding]:
    """Both servers run any scaling as YaRN."""
    if rope_type not in ("default", "yarn"):
        yield Finding(
            reader,
            f"RoPE of type {rope_type!r} is run as YaRN in latent attention.",
            "train the draft with plain RoPE or YaRN",
        )


# ---- vLLM ----


def _vllm_rope_type(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    rope = rules_vllm.rope_of(folder)
    yield from _rope_type(rules_vllm.READER, rope.get("rope_type") or rope.get("type") or "default")


def _vllm_bottleneck(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    if folder.config.get("q_lora_rank") is None:
        yield Finding(
            rules_vllm.READER,
            "`q_lora_rank` is null: its loader joins `kv_a_proj_with_mqa` with a `q_a_proj` that is not there.",
            "train the draft with a `q_lora_rank`",
            level="limit",
        )


def _vllm_window(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """Latent attention has no window, whatever the config or the target has."""
    if "sliding_attention" in (folder.config.get("layer_types") or []):
        yield Finding(
            rules_vllm.READER,
            "`layer_types` asks for sliding attention, which latent attention does not do.",
            "leave `layer_types` out",
        )


def _vllm_attention(config: dict, width: int) -> dict[str, Shape]:
    """Latent attention over rows of this width, with or without a bottleneck for queries."""
    heads, latent = config["num_attention_heads"], config.get("kv_lora_rank", 0)
    nope, rope, value = (config.get(name, 0) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    rank = config.get("q_lora_rank")

    queries = {"q_proj": (heads * (nope + rope), width)}
    if rank is not None:
        queries = {"q_a_proj": (rank, width), "q_a_layernorm": (rank,), "q_b_proj": (heads * (nope + rope), rank)}
    return queries | {
        "kv_a_proj_with_mqa": (latent + rope, width),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (nope + value), latent),
        "o_proj": (config["hidden_size"], heads * value),
    }


vllm_parameters = partial(taps_vllm.parameters, attention=_vllm_attention)

VLLM = Served(
    name="eagle3",
    rules=(
        partial(
            rules_vllm.architecture,
            resolve=taps_vllm.resolve,
            classes=(*ARCHITECTURES, "Eagle3DeepseekV3ForCausalLM"),
            model_types=MODEL_TYPES,
        ),
        rules_vllm.layers,
        rules_vllm.vocab_size,
        taps_vllm.draft_vocabulary,
        rules_vllm.hidden_size,
        taps_vllm.tap_width,
        taps_vllm.taps,
        taps_vllm.norm_before_residual,
        rules_vllm.activation,
        _vllm_window,
        _vllm_bottleneck,
        rules_vllm.rope_base,
        _vllm_rope_type,
        rules_vllm.rotated_part,
        rules_vllm.assumed_base,
        rules_vllm.context,
        rules_vllm.yarn_table,
        partial(taps_vllm.tensors, own=vllm_parameters),
    ),
)


# ---- SGLang ----


def _model_type(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    model_type = folder.config.get("model_type")
    if model_type not in (*MODEL_TYPES, "deepseek_v3"):
        yield Finding(
            rules_sglang.READER, f"`model_type` {model_type!r} has no latent attention.", "set it to 'kimi_k2'"
        )


def _one_layer(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    said = folder.config.get("num_hidden_layers")
    if said == 1:
        yield from rules_sglang.layers(folder, target)
        return
    yield Finding(
        rules_sglang.READER,
        f"`num_hidden_layers` is {said}: a latent draft has exactly one, or is refused.",
        "set it to 1",
    )


def _num_taps(config: dict) -> int:
    """Number of taps that `fc` takes: as many as are named, whatever `num_aux_hidden_states` says."""
    return len(taps_vllm.nested(config).get(taps_vllm.TAPS) or config.get(taps_vllm.TAPS) or [0, 0, 0])


def _sglang_bottleneck(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    if folder.config.get("q_lora_rank") is None:
        yield Finding(
            rules_sglang.READER,
            "`q_lora_rank` is null, which the latent draft class refuses.",
            "train the draft with a `q_lora_rank`",
            level="limit",
        )


def _sglang_rope(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    yield from _rope_type(rules_sglang.READER, (folder.config.get("rope_parameters") or {}).get("rope_type", "default"))
    if not folder.config.get("rope_interleave", True):
        yield Finding(
            rules_sglang.READER, "`rope_interleave` is false: halves are rotated, not pairs.", "set it to true"
        )


def _sglang_attention(config: dict, width: int) -> dict[str, Shape]:
    """As vLLM's, but without queries that lack a bottleneck; empty if a size is missing."""
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if any(config.get(name) is None for name in sizes):
        return {}
    return {name: shape for name, shape in _vllm_attention(config, width).items() if name != "q_proj"}


def _place(name: str) -> str:
    return name.replace("midlayer", "layers.0")


sglang_parameters = partial(taps_sglang.parameters, attention=_sglang_attention, num_taps=_num_taps)

SGLANG = Served(
    name="EAGLE3",
    rules=(
        partial(rules_sglang.architecture, wanted=ARCHITECTURES[0]),
        _model_type,
        _one_layer,
        rules_sglang.tied,
        taps_sglang.draft_vocabulary,
        rules_sglang.hidden_size,
        partial(taps_sglang.taps, num_taps=_num_taps),
        partial(rules_sglang.bias, name="bias"),
        _sglang_bottleneck,
        rules_sglang.rope_base,
        _sglang_rope,
        rules_sglang.context,
        rules_sglang.dtype,
        # `_sglang_bottleneck` reports queries without a bottleneck
        partial(taps_sglang.tensors, own=sglang_parameters, place=_place, passed_over=(".q_proj.weight",)),
    ),
)


# ---- what is computed ----


class ServedLatent(ServedEagle3):
    """Keys and values come from a latent; a part of each head is rotated in pairs, with one key for all heads."""

    def _attention(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        config, name = self.config, "layers.0.self_attn"
        nope, rope, value = (config[field] for field in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))

        queries = self._norm(self._linear(x, f"{name}.q_a_proj"), f"{name}.q_a_layernorm")
        queries = self._linear(queries, f"{name}.q_b_proj").unflatten(-1, (-1, nope + rope))
        latent, shared = self._linear(x, f"{name}.kv_a_proj_with_mqa").split([config["kv_lora_rank"], rope], -1)
        made = self._linear(self._norm(latent, f"{name}.kv_a_layernorm"), f"{name}.kv_b_proj")
        keys, values = made.unflatten(-1, (-1, nope + value)).split([nope, value], -1)

        cos, sin = rotation(config, rope, positions, _yarn_size)
        queries = torch.cat([queries[..., :nope], _rotate_pairs(queries[..., nope:], cos, sin)], -1)
        shared = _rotate_pairs(shared[:, None], cos, sin).expand(-1, keys.shape[1], -1)
        keys = torch.cat([keys, shared], -1)

        scale = (nope + rope) ** -0.5 * _score_factor(rope_of(config))
        return self._linear(self._mix(queries, keys, values, scale), f"{name}.o_proj")


def _rotate_pairs(pairs: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs, not halves; `(rows, heads, rope)`."""
    even, odd = pairs[..., 0::2], pairs[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def _yarn_size(rope: dict) -> float:
    """YaRN's factor on cosines and sines."""
    return mscale(rope["factor"], rope.get("mscale", 1.0)) / mscale(rope["factor"], rope.get("mscale_all_dim", 0.0))


def _score_factor(rope: dict) -> float:
    """YaRN's factor on the scores."""
    if rope.get("rope_type", "default") != "yarn":
        return 1.0
    return mscale(rope["factor"], rope.get("mscale_all_dim", 0.0)) ** 2


ROW = ServedKind(
    name="mla",
    kind="eagle3",
    tells=tells,
    vllm=VLLM,
    sglang=SGLANG,
    folder_rules=(rules_folder.spellings, rules_folder.dtypes, rules_folder.leftovers, rules_folder.vocabulary),
    value_rules=(rules_folder.numbers,),
    mathematics=ServedLatent,
    mending=taps_mending.steps((vllm_parameters, sglang_parameters), ARCHITECTURES, MODEL_TYPES),
    label=label,
    citation=CITATION,
)
