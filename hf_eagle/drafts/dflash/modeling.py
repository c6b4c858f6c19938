"""The DFlash draft, as vLLM, SGLang and transformers run it: layers over a block, which also see the target's taps."""

from functools import partial

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ...decoding.caches import Lengths, SlotCache
from ...losses.fused_head import in_autocast
from ...losses.output import EagleOutput
from ..attention import EagleAttention
from ..cast_weights import CastWeights
from ..layers import DraftLayer, EagleRMSNorm
from ..lent_head import LentHead, WithLentHead
from ..modeling_base import EaglePreTrainedModel
from ..probe import Probe
from .attention import block_attention
from .configuration import DFlashConfig, check_layers
from .mask_token import require_mask_token
from .plan import BlockPlan
from .probes import probes_of
from .proposal import DFlashProposer


# our names -> those in a folder of the form `transformers`, where they differ
_OTHER_NAMES = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}


class DFlashAttention(EagleAttention):
    """Llama's attention with a norm on each head's query and key, before RoPE, as in Qwen3."""

    def __init__(self, config: DFlashConfig):
        super().__init__(config, config.hidden_size)
        self.q_norm = EagleRMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = EagleRMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def query(self, projected, cos_sin):
        return self._rotate(self.q_norm(projected.unflatten(-1, (-1, self.head_dim))), cos_sin)

    def key_value(self, projected, cos_sin):
        key, value = projected.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=-2)
        return self._rotate(self.k_norm(key), cos_sin), value


class DFlashLayer(DraftLayer):
    """A Qwen3 layer whose keys and values come from the block's rows and, by the same matrices, from the context."""

    def __init__(self, config: DFlashConfig):
        super().__init__(config, DFlashAttention(config))
        self.input_layernorm = EagleRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def context(self, seen: torch.Tensor, cos_sin) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(..., kv_heads, head_dim)` of context `(..., hidden)`, without `input_layernorm`."""
        return self.self_attn.key_value(self.self_attn.project_key_value(seen), cos_sin)

    def block(self, x: torch.Tensor, cos_sin) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of the block's rows `(..., hidden)`."""
        normed = self.input_layernorm(x)
        query = self.self_attn.query(self.self_attn.project_query(normed), cos_sin)
        return query, *self.self_attn.key_value(self.self_attn.project_key_value(normed), cos_sin)


class DFlashDraftModel(WithLentHead, EaglePreTrainedModel):
    """DFlash draft: the newest token and masked slots after it -> layers, which see the target's taps -> head.

    Slots `0 .. block_size - 1` stand at an anchor and after it. Slot 0 embeds the anchor's token, all others the mask
    token. They attend to each other, in both directions, and to keys that each layer makes of the target's taps at the
    tokens before the anchor. Slot k predicts the token k places after the anchor. Embeddings and head are the target's
    and are never saved.

    Example:
        >>> draft = new_draft(config, target.embedding_weight(), head_weight=target.head_weight())
    """

    config_class = DFlashConfig

    def __init__(self, config: DFlashConfig):
        super().__init__(config)
        check_layers(config.target_layer_ids or [], config.num_target_layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(config.num_taps * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = EagleRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashLayer(config) for _ in range(config.num_hidden_layers))
        if config.share_k_norm:
            for layer in self.layers[1:]:
                layer.self_attn.k_norm = self.layers[0].self_attn.k_norm

        self.norm = EagleRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = LentHead(config)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False  # switched by `gradient_checkpointing_enable`: one checkpoint a layer

        self.register_vocabulary(config)
        self.post_init()
        self.freeze()

    # ---- saved and loaded ----

    def name_in_folder(self, name: str) -> str:
        """See [`EaglePreTrainedModel.name_in_folder`]."""
        return _OTHER_NAMES.get(name, name) if self.config.served_form == "transformers" else name

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in the base class; reads either form."""
        kwargs["key_mapping"] = {f"^{other}$".replace(".", r"\."): name for name, other in _OTHER_NAMES.items()}
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def attach(self, target) -> None:
        """As in the base class.

        Raises:
            ValueError: also for a draft without a mask token.
        """
        require_mask_token(self.config.mask_token_id)
        super().attach(target)

    # ---- trained ----

    def select_features(self, features) -> torch.Tensor:
        """The target's taps, `(batch, length, taps * hidden)`.

        Raises:
            ValueError: if the target returned none.
        """
        if features.taps is None:
            raise ValueError("Set `tap_ids` of the target before asking it for the features of a DFlash draft.")
        return features.taps

    def combine_features(self, taps: torch.Tensor) -> torch.Tensor:
        """What all layers see of the target: `(..., taps * hidden)` -> `(..., hidden)`."""
        return self.hidden_norm(self.fc(taps.to(self.fc.weight.dtype)))

    def embed_blocks(self, tokens: torch.Tensor) -> torch.Tensor:
        """The embeddings of a block: of the newest token, then of masked slots.

        Args:
            tokens: `(..., n)`, of which only the first, the newest, is read.

        Returns:
            `(..., n, hidden)`.
        """
        tokens = torch.full_like(tokens, self.config.mask_token_id).index_copy_(
            -1, tokens.new_zeros(1), tokens[..., :1]
        )
        return self.embed_tokens(tokens)

    def forward(self, input_ids, features, plan: BlockPlan, objective=None) -> EagleOutput:
        """Compute all blocks of a batch at once.

        Args:
            input_ids: `(batch, length)`.
            features: the target's, of every token.
            plan: where the blocks stand.
            objective: takes hidden states `(block_size - 1, A, hidden)` and the head.

        Returns:
            [`EagleOutput`].
        """
        if len(plan.layout.anchors):
            hidden = self._blocks(input_ids.flatten(), self.select_features(features).flatten(0, 1), plan)
        else:
            hidden = self.norm.weight.new_empty(self.config.block_size - 1, 0, self.config.hidden_size) + self.nothing()
        return EagleOutput(hidden_states=hidden) if objective is None else objective(hidden, self.lm_head)

    def _blocks(self, input_ids: torch.Tensor, taps: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
        """What the head takes of each slot after the anchors, `(block_size - 1, A, hidden)`.

        Args:
            input_ids: `(batch * length,)`.
            taps: `(batch * length, taps * hidden)`.
            plan: where the blocks stand.
        """
        layout, size = plan.layout, self.config.block_size
        x = in_autocast(self.embed_blocks(input_ids[layout.anchors][:, None].expand(-1, size)).flatten(0, 1))
        places = (plan.anchor_positions[:, None] + torch.arange(size, device=x.device)).flatten()

        casts = CastWeights(self.fc, self.layers)
        with casts:
            seen = self.combine_features(taps[layout.keys])

        run = casts.around(self._layer)
        if self.gradient_checkpointing and self.training:
            run = partial(self._gradient_checkpointing_func, run)

        tables = self.cos_sin(seen, plan.key_positions), self.cos_sin(x, places)
        for layer in self.layers:
            x = run(layer, x, seen, *tables, layout)
        return self.norm(x).unflatten(0, (-1, size))[:, 1:].transpose(0, 1)

    def _layer(self, layer: DFlashLayer, x, seen, seen_cos_sin, cos_sin, layout) -> torch.Tensor:
        query, own_key, own_value = layer.block(x, cos_sin)
        key, value = layer.context(seen, seen_cos_sin)
        attend = block_attention(self.config._attn_implementation, x.device)
        return layer.finish(x, attend(query, key, value, own_key, own_value, layout, layer.self_attn.scaling))

    # ---- decoded ----

    def read_context(self, taps: torch.Tensor, positions: torch.Tensor, cache) -> None:
        """Append the keys and values of verified tokens to a cache.

        Args:
            taps: `(rows, n, taps * hidden)`.
            positions: `(rows, n)`.
            cache ([`SlotCache`]): of all layers.
        """
        seen = self.combine_features(taps)
        cos_sin = self.cos_sin(seen, positions)
        for number, layer in enumerate(self.layers):
            cache.update(*(x.transpose(1, 2) for x in layer.context(seen, cos_sin)), number)

    def fill(self, tokens: torch.Tensor, positions: torch.Tensor, cache, visible: torch.Tensor | None) -> torch.Tensor:
        """Fill the slots after the newest tokens.

        Args:
            tokens: `(rows, n)`, of which only the first, the newest, is read.
            positions: `(rows, n)`.
            cache ([`SlotCache`]): holds the context; the block's own keys last until the next write.
            visible: bool `(rows, 1, n, slots)`, which slots each row sees; all when `None`.

        Returns:
            What the head takes, `(rows, n, hidden)`.
        """
        x = self.embed_blocks(tokens)
        cos_sin = self.cos_sin(x, positions)
        for number, layer in enumerate(self.layers):
            query, *own = (part.transpose(1, 2) for part in layer.block(x, cos_sin))
            key, value = cache.update(*own, number)
            attended = scaled_dot_product_attention(
                query, key, value, visible, scale=layer.self_attn.scaling, enable_gqa=True
            )
            x = layer.finish(x, attended.transpose(1, 2))
        return self.norm(x)

    def drafted_logits(self, next_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """See [`EaglePreTrainedModel.drafted_logits`]: of the blocks after each of the last three rows of features."""
        found, slots = [], self.config.block_size
        for end in range(len(features) - 2, len(features) + 1):
            lengths = Lengths([0], next_ids.new_zeros(1))
            cache = SlotCache(lengths, len(features) + slots)
            cache.place(lengths)
            self.read_context(features[None, :end], torch.arange(end, device=next_ids.device)[None], cache)

            cache.place(Lengths([end], next_ids.new_full((1,), end)))
            places = torch.arange(end, end + slots, device=next_ids.device)[None]
            found.append(self.fill(next_ids[None, end - 1].expand(1, slots), places, cache, None)[0, 1:])
        return self.compute_logits(torch.cat(found))

    def probes(self, target, bases=()) -> list[Probe]:
        """See [`EaglePreTrainedModel.probes`]."""
        return probes_of(self, target, bases)

    def proposer(self, shape, prompts) -> DFlashProposer:
        """See [`EaglePreTrainedModel.proposer`]."""
        return DFlashProposer(self, shape, prompts)
