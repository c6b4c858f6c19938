"""Attention in a draft's layer: its interface, decoding with a cache, and grouped-query attention."""

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache

from .configuration_base import DraftConfig
from .layers import Rotation


class DraftAttention(nn.Module, ABC):
    """Attention in the two parts that an unroll separates: projections of the layer's input, and what follows them.

    The projections are linear, so the unroll projects the token's half of the input once for all steps.

    Attributes:
        scaling: factor on the scores.
        o_proj: `(..., heads * value_dim)` -> `(..., hidden)`.
    """

    scaling: float
    o_proj: nn.Module

    @property
    @abstractmethod
    def query_projections(self) -> list[nn.Module]:
        """Projections of the layer's input; their results, concatenated, are the input of `query`."""

    @property
    @abstractmethod
    def key_value_projections(self) -> list[nn.Module]:
        """Projections of the layer's input; their results, concatenated, are the input of `key_value`."""

    @abstractmethod
    def query(self, projected: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotated queries `(..., heads, key_dim)`."""

    @abstractmethod
    def key_value(
        self, projected: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys `(..., kv_heads, key_dim)` and values `(..., kv_heads, value_dim)`."""

    def project_query(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., input_size)` -> the input of `query`."""
        return side_by_side(self.query_projections, x)

    def project_key_value(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., input_size)` -> the input of `key_value`."""
        return side_by_side(self.key_value_projections, x)

    def behind_cache(
        self,
        x: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Serving: rows attend to those in the cache and to each other, and their keys join the cache.

        Args:
            x: `(batch, n, input_size)`.
            cos_sin: RoPE tables `(batch, n, rotated width)`.
            past_key_values: cache of one layer.
            attention_mask: bool `(batch, 1, n, past + n)`; causal when `None`.

        Returns:
            `(batch, n, heads, value_dim)`, before `o_proj`.
        """
        query = self.query(self.project_query(x), cos_sin).transpose(1, 2)
        key, value = self.key_value(self.project_key_value(x), cos_sin)
        key, value = past_key_values.update(key.transpose(1, 2), value.transpose(1, 2), 0)

        if attention_mask is None and query.shape[2] > 1:
            past = key.shape[2] - query.shape[2]
            attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=x.device).tril(past)

        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=self.scaling, enable_gqa=True
        )
        return attended.transpose(1, 2)


def side_by_side(projections: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Several projections of one input, concatenated: `(..., sum of their widths)`."""
    return torch.cat([projection(x) for projection in projections], dim=-1)


class EagleAttention(DraftAttention):
    """Llama's attention over inputs of any width.

    Args:
        config: the draft's.
        input_size: `2 * hidden` in EAGLE-3, which attends over `cat(embedding, hidden)`; `hidden` in EAGLE-1.
    """

    def __init__(self, config: DraftConfig, input_size: int):
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

    def query(self, projected, cos_sin):
        return self._rotate(projected.unflatten(-1, (-1, self.head_dim)), cos_sin)

    def key_value(self, projected, cos_sin):
        key, value = projected.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=-2)
        return self._rotate(key, cos_sin), value

    def _rotate(self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        cos, sin = (part.unsqueeze(-2) for part in cos_sin)  # (..., 1, head_dim)
        return Rotation.apply(x, cos, sin, self.training)
