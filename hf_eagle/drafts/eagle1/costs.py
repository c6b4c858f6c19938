"""What a training step of an EAGLE-1/2 draft costs: one step, with the target's head and vocabulary."""

from ..costs_base import (
    FLOAT32,
    AttentionMemory,
    AttentionProducts,
    DraftCosts,
    RunShapes,
    chunked_logits,
    chunked_loss,
    seen_pairs,
)
from ..unroll_plan import UnrollPlan
from .configuration import Eagle1Config


class Eagle1Costs(DraftCosts):
    """See [`DraftCosts`]."""

    config: Eagle1Config

    def teacher(self, shapes: RunShapes) -> tuple[str, int]:
        # the loss makes and drops its distributions a chunk at a time
        held = shapes.supervised * self.config.hidden_size * shapes.target_dtype.itemsize
        return "the target's last hidden states of supervised rows", held

    def kept_by_unroll(self, shapes: RunShapes) -> int:
        hidden, attention = self.config.hidden_size, AttentionMemory.of_llama(self.config, shapes.accelerator)

        # `fc` makes the layer's input, which has no norm before it: one width less than a layer usually keeps
        per_row = attention.with_layer(self.config) - hidden
        per_key = 3 * hidden + attention.key_value
        activations = shapes.width * (shapes.tokens * per_key + shapes.supervised * per_row)

        # the input of `fc`, cat(embedding, feature), is in float32 first
        return activations + FLOAT32 * 2 * hidden * shapes.tokens

    def beside_unroll(self, shapes: RunShapes) -> int:
        hidden, rows = self.config.hidden_size, shapes.supervised
        # made in the forward pass; the head is the target's and not trained
        gradients = rows * hidden * shapes.width

        # the target's distributions are made like the draft's, and features are compared in float32
        distributions = chunked_logits(rows, self.config, shapes) * shapes.width
        loss = chunked_loss(rows, self.config, shapes) + distributions + 2 * rows * hidden * FLOAT32
        if not shapes.checkpointing:
            return gradients + loss

        attention = AttentionMemory.of_llama(self.config, shapes.accelerator)
        repeated = rows * (attention.with_layer(self.config) + attention.key_value) * shapes.width
        return gradients + max(loss, repeated)

    def needed_flops(self, plan: UnrollPlan) -> dict[str, float]:
        config, attention = self.config, AttentionProducts.of_llama(self.config)
        hidden, rows, keys = config.hidden_size, len(plan.layout.rows), len(plan.layout.keys)

        projections = 3 * rows * attention.per_row(config) + 3 * keys * hidden * attention.key_value
        # embeddings and features are given, so `fc` has no gradient to pass on
        projections += 2 * keys * 2 * hidden * hidden

        # the head has no gradient either, but also makes the target's distribution of a row
        head = 3 * int(plan.counts.sum()) * hidden * config.vocab_size
        return {
            "projections": 2.0 * projections,
            "head": 2.0 * head,
            "attention": 2.0 * 3 * seen_pairs(plan.layout) * attention.scores_and_sums,
        }


def costs_of(config: Eagle1Config) -> Eagle1Costs:
    """The costs of a draft with this config."""
    return Eagle1Costs(config)
