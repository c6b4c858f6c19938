"""What a training step of a block draft costs."""

from hf_eagle.drafts.costs_base import (
    FLOAT32,
    AttentionMemory,
    AttentionProducts,
    DraftCosts,
    RunShapes,
    chunked_loss,
)

from .configuration import BlockConfig
from .training import BlockPlan


class BlockCosts(DraftCosts):
    """See [`DraftCosts`]. A row here is a slot of a block, of which an example has a fixed number at most."""

    config: BlockConfig

    def _slots(self, shapes: RunShapes) -> int:
        return self.config.block_size * min(shapes.supervised, shapes.rows * self.config.num_anchors)

    def teacher(self, shapes: RunShapes) -> tuple[str, int]:
        held = min(shapes.supervised, self._slots(shapes)) * self.config.draft_vocab_size * shapes.width
        return "the target's distributions at the blocks' tokens", held

    def kept_by_unroll(self, shapes: RunShapes) -> int:
        attention = AttentionMemory.of_llama(self.config, shapes.accelerator)
        slots, keys = self._slots(shapes), shapes.tokens + self._slots(shapes)

        # a key's feature is normed, and then projected
        numbers = slots * attention.with_layer(self.config) + keys * (attention.key_value + 2 * self.config.hidden_size)
        pairs = slots * (shapes.length + slots // shapes.rows)  # a byte of the mask for each
        return numbers * shapes.width + pairs

    def beside_unroll(self, shapes: RunShapes) -> int:
        slots = self._slots(shapes)
        gradients = slots * self.config.hidden_size * shapes.width
        head = self.config.draft_vocab_size * self.config.hidden_size * FLOAT32
        return gradients + head + chunked_loss(slots, self.config, shapes)

    def needed_flops(self, plan: BlockPlan) -> dict[str, float]:
        config, attention = self.config, AttentionProducts.of_llama(self.config)
        slots, keys = int(plan.real.sum()) * config.block_size, int((plan.documents >= 0).sum())

        projections = 3 * slots * attention.per_row(config)
        projections += 3 * (slots + keys) * config.hidden_size * attention.key_value
        # the taps are given, so `see` has no gradient to pass on
        projections += 2 * keys * config.num_taps * config.target_hidden_size * config.hidden_size

        seen = plan.positions.gather(1, plan.anchors)[plan.real].sum()
        pairs = config.block_size * int(seen) + slots * config.block_size
        return {
            "projections": 2.0 * projections,
            "head": 2.0 * 3 * int(plan.counts.sum()) * config.hidden_size * config.draft_vocab_size,
            "attention": 2.0 * 3 * pairs * attention.scores_and_sums,
        }


def costs_of(config: BlockConfig) -> BlockCosts:
    """The costs of a draft with this config."""
    return BlockCosts(config)
