"""The EAGLE-3 / 3.1 draft with DeepSeek's multi-head latent attention (docs/contract.md, section 4)."""

import math

import torch
from torch import nn

from ..attention import DraftAttention
from ..layers import EagleRMSNorm
from .configuration_latent import EagleMLAConfig
from .modeling import Eagle3Draft


class EagleLatentAttention(DraftAttention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over inputs of any width.

    Each head projects its keys and values from one narrow latent; the part of a key that RoPE rotates is the same for
    all heads. Training computes keys and values explicitly. Servers cache only the latent and the rotated part, with
    the same result.

    Args:
        config: config of the draft.
        input_size: `2 * hidden` in EAGLE-3, which attends over `cat(embedding, hidden)`.
    """

    def __init__(self, config: EagleMLAConfig, input_size: int):
        super().__init__()
        heads, eps = config.num_attention_heads, config.rms_norm_eps
        self.key_widths = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        self.latent_widths = [config.kv_lora_rank, config.qk_rope_head_dim]
        self.value_width = config.v_head_dim
        self.scaling = score_scale(config)

        # names and layout are those of DeepSeek's checkpoints: `*_a_*` goes into a latent, `*_b_*` out of it
        key_dim = sum(self.key_widths)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(input_size, heads * key_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(input_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = EagleRMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * key_dim, bias=False)

        self.kv_a_proj_with_mqa = nn.Linear(input_size, sum(self.latent_widths), bias=False)
        self.kv_a_layernorm = EagleRMSNorm(config.kv_lora_rank, eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )

        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=False)

    @property
    def query_projections(self) -> list[nn.Module]:
        return [self.q_a_proj if hasattr(self, "q_a_proj") else self.q_proj]

    @property
    def key_value_projections(self) -> list[nn.Module]:
        return [self.kv_a_proj_with_mqa]

    def query(self, projected, cos_sin):
        if hasattr(self, "q_a_proj"):
            projected = self.q_b_proj(self.q_a_layernorm(projected))
        nope, rope = projected.unflatten(-1, (-1, sum(self.key_widths))).split(self.key_widths, dim=-1)
        return torch.cat([nope, _rotate_pairs(rope, cos_sin)], dim=-1)

    def key_value(self, projected, cos_sin):
        latent, rope = projected.split(self.latent_widths, dim=-1)
        widths = [self.key_widths[0], self.value_width]
        nope, value = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (-1, sum(widths))).split(widths, -1)

        rope = _rotate_pairs(rope.unsqueeze(-2), cos_sin).to(nope.dtype)  # (..., 1, dim): one for all heads
        return torch.cat([nope, rope.expand(*nope.shape[:-1], -1)], dim=-1), value


def score_scale(config: EagleMLAConfig) -> float:
    """Return the factor on the scores: `1 / sqrt(key width)`, times YaRN's temperature if RoPE is scaled by YaRN."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    if rope.get("rope_type", "default") == "yarn" and rope["factor"] > 1:
        scale *= (0.1 * (rope.get("mscale_all_dim") or 0.0) * math.log(rope["factor"]) + 1.0) ** 2
    return scale


def _rotate_pairs(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the pairs `(0, 1), (2, 3), ...` of `(..., heads, dim)`.

    The result holds the first members of all pairs, then the second ones. Queries and keys are reordered alike, so
    their products do not change.
    """
    # the tables hold every angle twice, in two equal halves
    cos, sin = (part.chunk(2, dim=-1)[0].unsqueeze(-2) for part in cos_sin)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Eagle3DeepseekV2ForCausalLM(Eagle3Draft):
    """The EAGLE-3 draft with multi-head latent attention, for DeepSeek, Kimi or any other target."""

    config_class = EagleMLAConfig
    attention_class = EagleLatentAttention
