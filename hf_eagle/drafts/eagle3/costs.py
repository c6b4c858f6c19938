"""What a training step of an EAGLE-3 draft costs, with Llama's attention or with latent attention."""

from ..costs_base import FLOAT32, AttentionMemory, AttentionProducts, DraftCosts, RunShapes, chunked_loss, seen_pairs
from ..unroll_plan import UnrollPlan
from .configuration import EagleConfig
from .configuration_latent import EagleMLAConfig


# rows whose full logits a target makes at a time, see `FrozenTarget.distribution`
_TEACHER_ROWS = 256


class Eagle3Costs(DraftCosts):
    """See [`DraftCosts`]."""

    config: EagleConfig

    def teacher(self, shapes: RunShapes) -> tuple[str, int]:
        config, rows = self.config, shapes.supervised
        # full logits of a chunk, as the target makes them and in float32
        logits = min(_TEACHER_ROWS, rows) * config.vocab_size * (shapes.target_dtype.itemsize + FLOAT32)
        held = rows * config.draft_vocab_size * shapes.width + logits
        return f"the target's probabilities of {config.draft_vocab_size:,} tokens", held

    def kept_by_unroll(self, shapes: RunShapes) -> int:
        config, steps, attention = self.config, shapes.ttt_steps, _memory(self.config, shapes.accelerator)
        hidden, own = config.hidden_size, attention.key_value

        if shapes.checkpointing:  # only what each step gets
            per_row = steps * (hidden + own)
        else:
            per_row = steps * (attention.with_layer(config) + own + attention.merged) - own - attention.merged
            per_row += steps * (steps - 1) // 2 * attention.again  # every step stores those of earlier steps again

        keys, window = shapes.tokens, config.draft_sliding_window
        if None not in (window, shapes.loss_window):
            keys = min(keys, shapes.rows * (shapes.loss_window + window))

        taps = config.num_taps * config.target_hidden_size
        per_key = taps + 2 * hidden + own + attention.rotation + 2 * hidden
        # the concatenated weights on the layer's input
        products = _products(config)
        weights = 2 * hidden * (products.query + products.key_value)
        activations = shapes.width * (shapes.supervised * per_row + keys * per_key + weights)

        # embeddings, and taps before their norms
        in_float32 = hidden + (taps if config.fc_norm else 0)
        return activations + FLOAT32 * keys * in_float32

    def beside_unroll(self, shapes: RunShapes) -> int:
        config, rows = self.config, shapes.supervised * shapes.ttt_steps
        # made in the forward pass: gradients of the head's input, and of the head
        gradients = rows * config.hidden_size * shapes.width + config.draft_vocab_size * config.hidden_size * FLOAT32
        loss = chunked_loss(rows, config, shapes)
        if not shapes.checkpointing:
            return gradients + loss

        attention = _memory(config, shapes.accelerator)
        step = attention.with_layer(config) + attention.key_value + attention.merged
        step += (shapes.ttt_steps - 1) * attention.again
        return gradients + max(loss, shapes.supervised * step * shapes.width)

    def needed_flops(self, plan: UnrollPlan) -> dict[str, float]:
        config, steps, attention = self.config, plan.num_steps, _products(self.config)
        hidden, rows, keys = config.hidden_size, len(plan.layout.rows), len(plan.layout.keys)

        projections = 3 * rows * steps * attention.per_row(config)
        projections += 3 * rows * (steps - 1) * (hidden * attention.key_value + attention.key_value_behind)

        # step 0 projects the tokens' halves apart from those of the features
        projections += 3 * keys * (2 * hidden * attention.key_value + attention.key_value_behind)
        projections += 3 * rows * hidden * attention.query
        # the features are given, so `fc` has no gradient to pass on
        projections += 2 * keys * config.num_taps * config.target_hidden_size * hidden

        return {
            "projections": 2.0 * projections,
            "head": 2.0 * 3 * int(plan.counts.sum()) * hidden * config.draft_vocab_size,
            "attention": 2.0 * 3 * steps * seen_pairs(plan.layout) * attention.scores_and_sums,
        }


def costs_of(config: EagleConfig) -> Eagle3Costs:
    """The costs of a draft with this config."""
    return Eagle3Costs(config)


# ---- either attention ----


def _memory(config: EagleConfig, accelerator: bool) -> AttentionMemory:
    if not isinstance(config, EagleMLAConfig):
        return AttentionMemory.of_llama(config, accelerator)

    heads = config.num_attention_heads
    key, value = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim), heads * config.v_head_dim
    rank, latent = config.q_lora_rank or 0, config.kv_lora_rank + config.qk_rope_head_dim
    # a value is kept with the part of a key that was projected together with it; the CPU kernel takes one width
    with_value, wide = heads * config.qk_nope_head_dim + value, max(key, value)
    return AttentionMemory(
        query=key + 2 * rank,
        key_value=(key + with_value if accelerator else 2 * wide) + latent + config.kv_lora_rank,
        output=value if accelerator else wide + value,
        rotation=2 * config.head_dim,
        merged=value if accelerator else 0,
        again=0 if accelerator else wide,
    )


def _products(config: EagleConfig) -> AttentionProducts:
    if not isinstance(config, EagleMLAConfig):
        return AttentionProducts.of_llama(config)

    heads, rank, latent = config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    values = heads * config.v_head_dim
    return AttentionProducts(
        query=rank or queries,
        key_value=latent + config.qk_rope_head_dim,
        query_behind=(rank or 0) * queries,
        key_value_behind=latent * (heads * config.qk_nope_head_dim + values),
        output=values,
        scores_and_sums=queries + values,
    )
