"""What a training step of a draft costs: its memory and its operations, which each kind counts.

Memory is counted tensor by tensor, following the code of the draft's layers, attention and loss. Tests compare it with
real steps, and the operations with those that PyTorch counts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..losses.fused_head import BLOCK_ELEMENTS, chunk_rows
from .configuration_base import DraftConfig
from .row_layout import RowLayout
from .training_base import BatchPlan


# bytes of a number in float32
FLOAT32 = 4


@dataclass(frozen=True)
class RunShapes:
    """What decides how much memory a rank of a run needs.

    Attributes:
        world_size: ranks.
        rows: sequences of a rank's batch.
        length: tokens of each, padding included.
        ttt_steps: steps of the training-time test.
        supervised_share: share of the tokens that belong to answers; 1 is the most possible.
        bf16: mixed precision.
        checkpointing: gradient checkpointing, one checkpoint a TTT step.
        draft_sharded: the draft under FSDP instead of DDP.
        target_dtype: of the running target.
        target_sharding: `"none"`, `"fsdp2"`, `"tensor"` or `"expert"`.
        target_shard_size: ranks that together hold one whole target; all of them when `None`.
        accelerator: the draft's attention is `flex_attention`, which keeps what a row attends to without its own keys,
            and with them; the CPU kernel keeps the latter only.
        memory: bytes of the accelerator, by which the loss chooses how many rows it takes at once.
        num_anchors: blocks trained of each sequence at most, of a draft that is trained on blocks.
        loss_window: rows trained of each sequence at most, side by side, of a draft that is unrolled; all when `None`.
        loss: as the argument of this name; one that compares with tokens needs nothing of the target's head.
        target_served: a server runs the target, and a rank holds its embedding, final norm and head.
    """

    world_size: int = 1
    rows: int = 1
    length: int = 2048
    ttt_steps: int = 7
    supervised_share: float = 1.0
    bf16: bool = True
    checkpointing: bool = False
    draft_sharded: bool = False
    target_dtype: torch.dtype = torch.bfloat16
    target_sharding: str = "none"
    target_shard_size: int | None = None
    accelerator: bool = True
    memory: int = 80 * 2**30
    num_anchors: int = 512
    loss_window: int | None = None
    loss: str = "ce"
    target_served: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def supervised(self) -> int:
        supervised = round(self.tokens * self.supervised_share)
        return supervised if self.loss_window is None else min(supervised, self.rows * self.loss_window)

    @property
    def width(self) -> int:
        """Bytes of a number in the draft's activations."""
        return 2 if self.bf16 else FLOAT32


class DraftCosts(ABC):
    """What a training step of one kind of draft costs.

    Args:
        config: the draft's.
    """

    def __init__(self, config: DraftConfig):
        self.config = config

    @property
    def feature_width(self) -> int:
        """Numbers in a target's features of one token: its taps and its last hidden state."""
        return len(self.config.tap_ids) * self.config.target_hidden_size + self.config.hidden_size

    @abstractmethod
    def teacher(self, shapes: RunShapes) -> tuple[str, int]:
        """What is kept of the target's output while the draft runs: its name, for people, and its bytes."""

    @abstractmethod
    def kept_by_unroll(self, shapes: RunShapes) -> int:
        """Bytes of activations that the backward pass of the unroll needs, without those of the head and the loss."""

    @abstractmethod
    def beside_unroll(self, shapes: RunShapes) -> int:
        """Most bytes needed in addition: by head and loss, or by the one step that a checkpointed unroll repeats."""

    @abstractmethod
    def needed_flops(self, plan: BatchPlan) -> dict[str, float]:
        """Matrix operations of the draft's forward and backward that the supervised rows need, in FLOP, with `loss` ce.

        A product of `n` multiplications is `2 * n` FLOP. It counts three times (forward and both gradients) if both
        sides are trained or depend on something trained. What a kernel recomputes does not count.

        Args:
            plan: of the batch.

        Returns:
            FLOP of the `projections` (with the MLP), of the `head` and of `attention`.
        """


@dataclass(frozen=True)
class AttentionMemory:
    """Numbers that attention keeps for a row until the backward pass.

    Attributes:
        query, key_value, output: of its query, of its key and value, and of what it attended to.
        rotation: of its cosines and sines.
        merged: of what it attended to, once more at every step but the first.
        again: of its key and value, once more at every later step.
    """

    query: int
    key_value: int
    output: int
    rotation: int
    merged: int
    again: int

    @classmethod
    def of_llama(cls, config: DraftConfig, accelerator: bool) -> "AttentionMemory":
        """Of Llama's attention."""
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return cls(
            query=query,
            key_value=3 * key,  # a value is kept with the key that was projected together with it
            output=query,
            rotation=2 * config.head_dim,
            merged=query if accelerator else 0,
            again=0,
        )

    def with_layer(self, config: DraftConfig) -> int:
        """Numbers that a whole layer keeps for a row at one step, without keys and values."""
        # residual streams before and after attention, each also normed; gate and up
        return 4 * config.hidden_size + 2 * config.intermediate_size + self.query + self.output + self.rotation


@dataclass(frozen=True)
class AttentionProducts:
    """The products of a draft layer's attention.

    Attributes:
        query, key_value: widths of the projections of the layer's input.
        query_behind, key_value_behind: multiplications of a row that turn these into queries, and into keys and values.
        output: input width of the output projection.
        scores_and_sums: multiplications for a row and one key that it sees.
    """

    query: int
    key_value: int
    query_behind: int
    key_value_behind: int
    output: int
    scores_and_sums: int

    @classmethod
    def of_llama(cls, config: DraftConfig) -> "AttentionProducts":
        """Of Llama's attention."""
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return cls(
            query=query,
            key_value=2 * key,
            query_behind=0,
            key_value_behind=0,
            output=query,
            scores_and_sums=2 * query,
        )

    def per_row(self, config: DraftConfig) -> int:
        """Multiplications for a row in a layer, without keys, values and scores."""
        projected = config.hidden_size * (self.query + self.output) + self.query_behind
        return projected + 3 * config.hidden_size * config.intermediate_size


def chunked_loss(rows: int, config: DraftConfig, shapes: RunShapes, labels: bool = False) -> int:
    """Bytes that the fused head and loss take for this many rows, see `losses/fused_head.py`.

    Args:
        rows: that are compared.
        config: the draft's.
        shapes: the run.
        labels: whether they are compared with tokens instead of distributions.
    """
    chunk = chunked_logits(rows, config, shapes)
    block = chunk if shapes.accelerator else min(BLOCK_ELEMENTS, chunk)

    # both distributions of a block, and their product in float32; or its probabilities, and these less the token's one
    judged = block * (2 * FLOAT32 if labels else 2 * shapes.width + FLOAT32)
    # the head's inputs: of all steps, and of those that count
    return chunk * shapes.width + judged + 2 * rows * config.hidden_size * shapes.width


def chunked_logits(rows: int, config: DraftConfig, shapes: RunShapes) -> int:
    """Logits of this many rows that exist at one time, see `losses/fused_head.py`."""
    most = chunk_rows(config.draft_vocab_size, shapes.memory if shapes.accelerator else None)
    return min(most, rows) * config.draft_vocab_size


def seen_pairs(layout: RowLayout) -> int:
    """Pairs of an unrolled row and a step-0 key that it sees at step 0; at later steps a window also holds its own."""
    pairs = 0
    for rows, blocks in layout.spans_at(0):
        count = rows.stop - rows.start
        for keys, causal in blocks:
            if causal is None:
                pairs += int((~layout.hidden(rows, keys, step=0)).sum())
            else:
                pairs += count * (count + 1) // 2 if causal else count * (keys.stop - keys.start)

    return pairs
