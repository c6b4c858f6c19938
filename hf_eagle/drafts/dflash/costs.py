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
        return self.config.block_size * self._blocks(shapes)

    def _blocks(self, shapes: RunShapes) -> int:
        return min(shapes.supervised, shapes.rows * shapes.num_anchors)

    def teacher(self, shapes: RunShapes) -> tuple[str, int]:
        # with `ce` the loss makes and drops its distributions a chunk at a time, the others compare with tokens
        held = shapes.supervised * self.config.hidden_size * shapes.target_dtype.itemsize if shapes.loss == "ce" else 0
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
        loss = self._loss(shapes)
        return max(loss, self._repeated(shapes)) if shapes.checkpointing else loss

    def _loss(self, shapes: RunShapes) -> int:
        """Bytes that head and loss take; D-PACE's first pass takes fewer, and drops them."""
        config, by_label = self.config, shapes.loss != "ce"
        # the last norm takes all rows, and an anchor's has no loss; gradients are made in the forward pass
        slots = (config.block_size - 1) * self._blocks(shapes)
        taken = (self._rows(shapes) + slots) * config.hidden_size * shapes.width
        taken += chunked_loss(slots, config, shapes, labels=by_label)

        # the target's head, float32 and not trained, is cast for each step
        if shapes.bf16:
            taken += shapes.width * config.vocab_size * config.hidden_size
        if by_label or not slots:
            return taken

        # the slots of a chunk that are about one token share its distribution
        shared = min(1.0, shapes.supervised / slots)
        return taken + round(shared * chunked_logits(slots, config, shapes)) * shapes.width

    def _repeated(self, shapes: RunShapes) -> int:
        """Bytes that the backward pass of a layer takes which runs again for it."""
        config, rows = self.config, self._rows(shapes)
        # the gradient of its output; what the MLP makes of gate and up, and the gradients of these and of that
        numbers = self._layer(shapes) + rows * (config.hidden_size + 4 * config.intermediate_size)
        if shapes.bf16:  # gradients of the weights that were cast wait for each other
            numbers += config.num_hidden_layers * self._layer_weights() + config.num_taps * config.hidden_size**2
        return numbers * shapes.width

    def _layer_weights(self) -> int:
        attention = AttentionProducts.of_llama(self.config)
        return attention.per_row(self.config) + self.config.hidden_size * attention.key_value

    def needed_flops(self, plan: BlockPlan, loss: str = "ce") -> dict[str, float]:
        """See [`DraftCosts.needed_flops`]; also with another `loss`."""
        config, attention, layout = self.config, AttentionProducts.of_llama(self.config), plan.layout
        hidden, rows, keys = config.hidden_size, layout.rows, len(layout.keys)

        per_layer = 3 * rows * attention.per_row(config) + 3 * (rows + keys) * hidden * attention.key_value
        # the taps need no gradient, so the backward pass of `fc` is only that of its weight
        projections = config.num_hidden_layers * per_layer + 2 * keys * config.num_taps * hidden * hidden

        pairs = layout.size * int((layout.end - layout.begin).sum()) + rows * layout.size
        # the head's weight needs no gradient, but the head also makes the target's distribution at each position, or
        # runs once more for D-PACE's weights
        again = {"ce": len(plan.supervised.positions), "dpace": len(plan.labels)}.get(loss, 0)
        head = (2 * len(plan.labels) + again) * hidden * config.vocab_size
        return {
            "projections": 2.0 * projections,
            "head": 2.0 * head,
            "attention": 2.0 * 3 * config.num_hidden_layers * pairs * attention.scores_and_sums,
        }


def costs_of(config: DFlashConfig) -> DFlashCosts:
    """The costs of a draft with this config."""
    return DFlashCosts(config)
