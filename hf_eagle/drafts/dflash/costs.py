"""What a training step of a DFlash draft costs. Its rows are those of blocks, at most a fixed number a document."""

from ..costs_base import (
    FLOAT32,
    AttentionMemory,
    AttentionProducts,
    DraftCosts,
    RunShapes,
    chunked_logits,
    chunked_loss,
)
from .configuration import DFlashConfig
from .plan import BlockPlan


class DFlashCosts(DraftCosts):
    """See [`DraftCosts`]."""

    config: DFlashConfig

    def _rows(self, shapes: RunShapes) -> int:
        """Rows that go through the layers, at most."""
        return self.config.block_size * min(shapes.supervised, shapes.rows * shapes.num_anchors)

    def teacher(self, shapes: RunShapes) -> tuple[str, int]:
        # the loss makes and drops its distributions a chunk at a time
        held = shapes.supervised * self.config.hidden_size * shapes.target_dtype.itemsize
        return "the target's last hidden states of supervised rows", held

    def _layer(self, shapes: RunShapes) -> int:
        """Elements that one layer keeps for the backward pass."""
        attention = AttentionMemory.of_llama(self.config, shapes.accelerator)
        # queries and keys are normed before they are rotated, so each is kept once more
        per_row = attention.with_layer(self.config) + 2 * attention.query + attention.key_value
        return self._rows(shapes) * per_row + shapes.tokens * 2 * attention.key_value

    def kept_by_unroll(self, shapes: RunShapes) -> int:
        config, hidden = self.config, self.config.hidden_size
        # the taps in the draft's dtype, and the output of `fc` before and after its norm
        context = shapes.tokens * (config.num_taps * hidden + 2 * hidden)
        layer = self._rows(shapes) * hidden if shapes.checkpointing else self._layer(shapes)
        return shapes.width * (context + config.num_hidden_layers * layer) + FLOAT32 * config.num_taps * shapes.tokens

    def beside_unroll(self, shapes: RunShapes) -> int:
        rows = self._rows(shapes)
        gradients = 2 * rows * self.config.hidden_size * shapes.width
        distributions = chunked_logits(rows, self.config, shapes) * shapes.width
        loss = chunked_loss(rows, self.config, shapes) + distributions
        repeated = self._layer(shapes) * shapes.width if shapes.checkpointing else 0
        return gradients + max(loss, repeated)

    def needed_flops(self, plan: BlockPlan) -> dict[str, float]:
        config, attention, layout = self.config, AttentionProducts.of_llama(self.config), plan.layout
        hidden, rows, keys = config.hidden_size, layout.rows, len(layout.keys)

        per_layer = 3 * rows * attention.per_row(config) + 3 * (rows + keys) * hidden * attention.key_value
        # the taps need no gradient, so the backward pass of `fc` is only that of its weight
        projections = config.num_hidden_layers * per_layer + 2 * keys * config.num_taps * hidden * hidden

        pairs = layout.size * int((layout.end - layout.begin).sum()) + rows * layout.size
        # the head's weight needs no gradient, but the head also makes the target's distribution at each position
        head = (2 * len(plan.labels) + len(plan.supervised.positions)) * hidden * config.vocab_size
        return {
            "projections": 2.0 * projections,
            "head": 2.0 * head,
            "attention": 2.0 * 3 * config.num_hidden_layers * pairs * attention.scores_and_sums,
        }


def costs_of(config: DFlashConfig) -> DFlashCosts:
    """The costs of a draft with this config."""
    return DFlashCosts(config)
