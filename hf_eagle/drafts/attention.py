"""Grouped-query attention of a draft with Llama's layer: the projections, RoPE, and decoding behind a cache."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache
from transformers.models.llama.modeling_llama import rotate_half

from .configuration_eagle import EagleConfig


class EagleAttention(nn.Module):
    """Llama's attention over inputs of any width.

    Args:
        config: the draft's.
        input_size: `2 * hidden` in EAGLE-3, which attends over `cat(embedding, hidden)`; `hidden` in EAGLE-1.
    """

    def __init__(self, config: EagleConfig, input_size: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(input_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    @property
    def query_projections(self) -> list[nn.Module]:
        return [self.q_proj]

    @property
    def key_value_projections(self) -> list[nn.Module]:
        return [self.k_proj, self.v_proj]

    def project_key_value(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., input_size)` -> the key and value projections side by side."""
        return torch.cat([projection(x) for projection in self.key_value_projections], dim=-1)

    def query(self, projected: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """From the query projection: rotated queries `(..., heads, head_dim)`."""
        return self._rotate(projected.unflatten(-1, (-1, self.head_dim)), cos_sin)

    def key_value(self, projected: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]):
        """From the key and value projections side by side: rotated keys and values, `(..., kv_heads, head_dim)`."""
        key, value = projected.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=-2)
        return self._rotate(key, cos_sin), value

    def _rotate(self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        cos, sin = (part.unsqueeze(-2) for part in cos_sin)  # (..., 1, head_dim)
        return x * cos + rotate_half(x) * sin

    def behind_cache(
        self,
        x: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Serving: rows attend to those in the cache and to each other; their keys are added to it.

        Args:
            x: `(batch, n, input_size)`.
            cos_sin: RoPE tables `(batch, n, head_dim)`.
            past_key_values: cache of one layer.
            attention_mask: bool `(batch, 1, n, past + n)`; causal when `None`.

        Returns:
            `(batch, n, heads, head_dim)`, in front of `o_proj`.
        """
        query = self.query(self.q_proj(x), cos_sin).transpose(1, 2)
        key, value = (part.transpose(1, 2) for part in self.key_value(self.project_key_value(x), cos_sin))
        key, value = past_key_values.update(key, value, 0)
        if attention_mask is None and query.shape[2] > 1:
            past = key.shape[2] - query.shape[2]
            attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=x.device).tril(past)
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=self.scaling, enable_gqa=True
        )
        return attended.transpose(1, 2)
