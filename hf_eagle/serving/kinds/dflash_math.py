"""What vLLM computes with a DFlash draft, from `models/qwen3_dflash.py`: one block after a context."""

import torch

from ...door.config_readings import named
from ..served_math import ServedDraft, rotated
from . import dflash_fields as fields


_BLOCKS = 3  # blocks that are compared


class ServedDFlash(ServedDraft):
    """Slots of one block see the target's features before the block, and one another."""

    def __init__(self, config: dict, tensors, embedding: torch.Tensor, head: torch.Tensor):
        super().__init__(config, {fields.place(name): tensor for name, tensor in tensors.items()}, embedding, head)

    @property
    def feature_width(self) -> int:
        return self.tensors["fc.weight"].shape[1]

    def drafted_logits(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Of the masked slots of blocks after each of the last three rows, `(3 * (block_size - 1), vocab)`."""
        ends = range(len(features) - _BLOCKS + 1, len(features) + 1)
        return torch.cat([self._block(int(ids[end - 1]), features[:end]) for end in ends])

    def _block(self, newest: int, features: torch.Tensor) -> torch.Tensor:
        """Logits of what is drafted after the token `newest`, whose own features are not known yet."""
        slots, start = int(named(self.config, "block_size")), len(features)
        tokens = torch.full((slots,), int(named(self.config, "mask_token_id")))
        tokens[0] = newest

        context = self._norm(features @ self.tensors["fc.weight"].T, "hidden_norm")
        x, places = self.embedding[tokens], torch.arange(start, start + slots)
        for index in range(self.config["num_hidden_layers"]):
            name = f"layers.{index}"
            x = x + self._attention(self._norm(x, f"{name}.input_layernorm"), places, context, f"{name}.self_attn")
            x = x + self._mlp(self._norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        return (self._norm(x[1:], "norm") @ self.head.T) * (self.config.get("logit_scale") or 1.0)

    def as_trained(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the target's soft cap, which vLLM leaves out."""
        cap = self.config.get("final_logit_softcapping")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _attention(self, x: torch.Tensor, places: torch.Tensor, context: torch.Tensor, name: str) -> torch.Tensor:
        """`(slots, hidden)`: nothing is hidden from a slot."""
        width = self.tensors[f"{name}.q_norm.weight"].shape[0]
        queries = self._heads(x, f"{name}.q_proj", width)
        queries = rotated(self.config, self._norm(queries, f"{name}.q_norm"), places)

        # context and block go through the same matrices, but only the block was normed before
        rows, at = torch.cat([context, x]), torch.cat([torch.arange(len(context)), places])
        keys = rotated(self.config, self._norm(self._heads(rows, f"{name}.k_proj", width), f"{name}.k_norm"), at)
        values = self._heads(rows, f"{name}.v_proj", width)

        groups = queries.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
        weights = (torch.einsum("qhd,khd->hqk", queries, keys) * width**-0.5).softmax(-1)
        return self._linear(torch.einsum("hqk,khd->qhd", weights, values).flatten(1), f"{name}.o_proj")

    def _heads(self, rows: torch.Tensor, name: str, width: int) -> torch.Tensor:
        """`(rows, heads, width)`."""
        return self._linear(rows, name).unflatten(-1, (-1, width))
