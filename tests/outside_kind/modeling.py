"""A small block draft: behind the newest token stand mask slots, and one layer fills all of them at once."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_eagle.drafts.attention import EagleAttention
from hf_eagle.drafts.layers import DraftLayer, EagleRMSNorm
from hf_eagle.drafts.modeling_base import EaglePreTrainedModel
from hf_eagle.losses.output import EagleOutput

from .configuration import BlockConfig
from .proposal import BlockProposer


class OutsideBlockDraft(EaglePreTrainedModel):
    """Slots `0 .. block_size - 1` stand at an anchor and behind it; slot 0 embeds the anchor, all others the mask.

    They attend to each other, in both directions, and to keys that are made of the target's taps at the tokens before
    the anchor. Slot k predicts the token k places behind the anchor.

    Example:
        >>> draft = new_draft(config_for(target.config, options), target.embedding_weight())
    """

    config_class = BlockConfig
    supports_gradient_checkpointing = False  # it is one layer, once

    def __init__(self, config: BlockConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mask = nn.Embedding(1, config.hidden_size)
        self.see = nn.Linear(config.num_taps * config.target_hidden_size, config.hidden_size, bias=False)
        self.see_norm = EagleRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layer = DraftLayer(config, EagleAttention(config, config.hidden_size))
        self.norm = EagleRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.register_vocabulary(config)
        self.post_init()
        self.freeze()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    @torch.no_grad()
    def take_target_head(self, weight: torch.Tensor) -> None:
        """Start with the rows of the target's head, `(vocab_size, hidden)`."""
        self.lm_head.weight.copy_(weight if self.d2t is None else weight[self.draft_ids.to(weight.device)])

    def select_features(self, features) -> torch.Tensor:
        """The target's taps, `(batch, length, taps * hidden)`."""
        return features.taps

    def forward(self, input_ids, features, plan, objective=None) -> EagleOutput:
        """All blocks of a batch, in one forward.

        Args:
            input_ids: `(batch, length)`.
            features: the target's, of every token.
            plan ([`BlockPlan`]): where the blocks stand.
            objective: takes hidden states `(block_size - 1, N, hidden)` and the head.
        """
        if plan.real.shape[1]:
            hidden = self._blocks(input_ids, self.select_features(features), plan)
        else:
            hidden = self.norm.weight.new_empty(self.config.block_size - 1, 0, self.config.hidden_size) + self.nothing()
        return EagleOutput(hidden_states=hidden) if objective is None else objective(hidden, self.lm_head)

    def _blocks(self, input_ids: torch.Tensor, taps: torch.Tensor, plan) -> torch.Tensor:
        """What the head takes of each slot behind the `N` anchors, `(block_size - 1, N, hidden)`."""
        size, anchors = self.config.block_size, plan.anchors
        key, value = self.context(taps, plan.positions)

        # a block sees what stands before its anchor in the same document, and itself
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        same = plan.documents[:, None] == plan.documents.gather(1, anchors)[..., None]
        before = (same & (columns < anchors[..., None])).repeat_interleave(size, dim=1)
        own = torch.eye(anchors.shape[1], dtype=torch.bool, device=input_ids.device)
        own = own.repeat_interleave(size, dim=0).repeat_interleave(size, dim=1).expand(len(anchors), -1, -1)

        tokens, first = input_ids.gather(1, anchors), plan.positions.gather(1, anchors)
        hidden = self.fill(tokens, first, key, value, torch.cat([before, own], dim=-1))
        return hidden[plan.real][:, 1:].transpose(0, 1)

    def context(self, taps: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(rows, n, kv_heads, head_dim)` of tokens, from their taps `(rows, n, taps * hidden)`."""
        attention, seen = self.layer.self_attn, self.see_norm(self.see(taps.to(self.see.weight.dtype)))
        projected = attention.project_key_value(seen)
        return attention.key_value(projected, self.cos_sin(projected, positions))

    def fill(self, tokens, positions, key, value, visible) -> torch.Tensor:
        """The blocks behind some tokens.

        Args:
            tokens, positions: `(rows, A)`, of the anchors.
            key, value: `(rows, n, kv_heads, head_dim)` of the context.
            visible: bool `(rows, A * block_size, n + A * block_size)`: which keys each slot sees.

        Returns:
            `(rows, A, block_size, hidden)`, as the head takes them.
        """
        size, attention = self.config.block_size, self.layer.self_attn
        masks = self.mask.weight.expand(*tokens.shape, size - 1, -1)
        x = torch.cat([self.embed_tokens(tokens)[..., None, :], masks], dim=-2).flatten(1, 2)
        places = (positions[..., None] + torch.arange(size, device=tokens.device)).flatten(1)

        projected = attention.project_query(x)
        cos_sin = self.cos_sin(projected, places)
        query = attention.query(projected, cos_sin)
        own_key, own_value = attention.key_value(attention.project_key_value(x), cos_sin)
        key, value = torch.cat([key, own_key], dim=1), torch.cat([value, own_value], dim=1)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = scaled_dot_product_attention(
            query, key, value, visible[:, None], scale=attention.scaling, enable_gqa=True
        )
        hidden = self.norm(self.layer.finish(x, attended.transpose(1, 2)))
        return hidden.unflatten(1, (-1, size))

    def proposer(self, shape, prompts) -> BlockProposer:
        """See [`EaglePreTrainedModel.proposer`]."""
        return BlockProposer(self, shape, prompts)
