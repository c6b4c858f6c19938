"""The training-time test of a one-layer draft, with all that can be shared by its steps computed once."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear

from ..attention import side_by_side
from ..row_layout import RowLayout
from ..ttt_attention import ttt_attention


Projection = Callable[[torch.Tensor], torch.Tensor]


class TTTUnroll:
    """One batch's unroll: what the steps share, and the step itself.

    The layer's input is `cat(embedding, hidden)`. A projection of it is the sum of one of each half, and the half of
    the token belongs to the token and not to the step: it is made once for every token.

    Args:
        draft: the draft, of one layer.
        input_ids: `(batch * length,)`.
        position_ids: `(batch * length,)`, with m-RoPE `(3, batch * length)`.
        layout: which rows are unrolled, and which keys they need.
        num_steps: TTT steps.
        embeddings: `(batch * length, hidden)` in the place of the tokens' own; `None` for these.
    """

    def __init__(
        self,
        draft,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        layout: RowLayout,
        num_steps: int,
        embeddings: torch.Tensor | None = None,
    ):
        self.draft, self.layer, self.layout = draft, draft.midlayer, layout
        self.attention = self.layer.self_attn
        self.attend = ttt_attention(draft.config._attn_implementation, input_ids.device)
        self.key_positions, self.row_positions = position_ids[..., layout.keys], position_ids[..., layout.rows]

        # row i meets the embedding of token i + 1 + s at step s
        steps = torch.arange(num_steps, device=input_ids.device)[:, None]
        last = input_ids.numel() - 1
        key_tokens, row_tokens = (layout.keys + 1).clamp_max(last), (layout.rows + 1 + steps).clamp_max(last)
        token_query, self.hidden_query = halves(self.attention.query_projections, draft.config.hidden_size)
        token_key_value, self.hidden_key_value = halves(self.attention.key_value_projections, draft.config.hidden_size)

        tokens, self.key_token_of_row = _distinct(row_tokens, key_tokens)
        embeds = self.layer.input_layernorm(draft.embed(input_ids[tokens], embeddings, tokens))
        self.key_value_of_token = token_key_value(embeds)
        self.key_value_of_key = self.key_value_of_token[torch.searchsorted(tokens, key_tokens)]
        row_only, self.query_token_of_row = _distinct(row_tokens)
        self.query_of_token = token_query(embeds[torch.searchsorted(tokens, row_only)])

    def context(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Step-0 keys and values `(K, kv_heads, dim)` of the rows `layout.keys`, from their features `(K, hidden)`."""
        projected = self.key_value_of_key + self.hidden_key_value(self.layer.hidden_norm(hidden))
        return self.attention.key_value(projected, self.draft.cos_sin(projected, self.key_positions))

    def step(self, step: int, hidden: torch.Tensor, key, value, own_keys: list, own_values: list):
        """One step of every row.

        Args:
            hidden: `(N, hidden)`, fed back by the step before.
            key, value: of step 0.
            own_keys, own_values: of the steps before this one, without step 0.

        Returns:
            Normed hidden states for the head, hidden states to feed back, and this step's own keys and values.
        """
        normed = self.layer.hidden_norm(hidden)
        projected = self.query_of_token.index_select(0, self.query_token_of_row[step]) + self.hidden_query(normed)
        cos_sin = self.draft.cos_sin(projected, self.row_positions + step)
        query = self.attention.query(projected, cos_sin)
        own_key = own_value = None
        if step:
            projected = self.key_value_of_token.index_select(0, self.key_token_of_row[step])
            own_key, own_value = self.attention.key_value(projected + self.hidden_key_value(normed), cos_sin)
            own_keys, own_values = [*own_keys, own_key], [*own_values, own_value]
        attended = self.attend(query, key, value, own_keys, own_values, self.layout, self.attention.scaling)
        return *self.draft.feedback(self.layer.finish(hidden, attended)), own_key, own_value


def halves(projections: list[nn.Module], width: int) -> tuple[Projection, Projection]:
    """The projections of `cat(first, second)`, side by side, as one function of each half; the two results add up."""
    if not all(type(projection) is nn.Linear for projection in projections):  # an adapter is more than its weight
        return (
            lambda first: side_by_side(projections, torch.cat([first, torch.zeros_like(first)], dim=-1)),
            lambda second: side_by_side(projections, torch.cat([torch.zeros_like(second), second], dim=-1)),
        )
    weight = torch.cat([projection.weight for projection in projections])
    if torch.is_autocast_enabled(weight.device.type):  # autocast would cast a part of a weight at every use
        weight = weight.to(torch.get_autocast_dtype(weight.device.type))
    first, second = weight.split(width, dim=1)
    return lambda x: linear(x, first), lambda x: linear(x, second)


def _distinct(wanted: torch.Tensor, *more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct ids in all arguments, ascending, and the place of each of `wanted` among them."""
    ids = torch.unique(torch.cat([x.flatten() for x in (wanted, *more)]))
    return ids, torch.searchsorted(ids, wanted)
