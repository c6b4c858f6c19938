"""How much memory the unroll of a draft takes: what autograd keeps for the backward pass, and what exists beside it.

Counted tensor by tensor, as the draft's layers, attention and loss are written; tests compare both with real steps.
"""

from dataclasses import dataclass

import torch

from ..drafts.eagle3.configuration import Eagle1Config, EagleConfig
from ..drafts.eagle3.configuration_latent import EagleMLAConfig
from ..losses.fused_head import BLOCK_ELEMENTS, CHUNK_ELEMENTS


FLOAT32 = 4


@dataclass(frozen=True)
class RunShapes:
    """What of a run decides how much a rank holds.

    Attributes:
        world_size: ranks.
        rows: sequences of a rank's batch.
        length: tokens of each, padding included.
        ttt_steps: steps of the training-time test.
        supervised_share: share of the tokens that are an answer's; 1 is the most there can be.
        bf16: mixed precision.
        checkpointing: gradient checkpointing, one checkpoint a TTT step.
        draft_sharded: the draft under FSDP instead of DDP.
        target_dtype: the target runs in.
        target_sharding: `"none"`, `"fsdp2"`, `"tensor"` or `"expert"`.
        target_shard_size: ranks that hold one whole target between them; all of them when `None`.
        accelerator: the draft's attention is `flex_attention`, which keeps a row's own keys once a query head and later
            step; a CPU's kernel reads them in place.
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

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def supervised(self) -> int:
        return round(self.tokens * self.supervised_share)

    @property
    def width(self) -> int:
        """Bytes of a number in the draft's activations."""
        return 2 if self.bf16 else FLOAT32


def kept_by_unroll(config: EagleConfig, shapes: RunShapes) -> int:
    """Bytes of activations that the backward pass of the unroll needs, the head's and the loss's not among them."""
    hidden, attention = config.hidden_size, _AttentionWidths.of(config, shapes.accelerator)
    rows, keys, width, steps = shapes.supervised, shapes.tokens, shapes.width, shapes.ttt_steps
    # residual streams before and behind attention, each of them normed; gate and up; attention
    step = 4 * hidden + 2 * config.intermediate_size + attention.query + attention.output + attention.rotation
    own = attention.key_value
    if isinstance(config, Eagle1Config):  # cat(embedding, feature) in both precisions, and what `fc` makes of it
        return width * (keys * (3 * hidden + own) + rows * (step - hidden)) + FLOAT32 * 2 * hidden * keys
    if shapes.checkpointing:  # what a step is given
        per_row = steps * (hidden + own)
    else:
        per_row = steps * (step + own) - own + steps * (steps - 1) // 2 * attention.again
    taps = config.num_taps * config.target_hidden_size
    per_key = taps + 2 * hidden + own + attention.rotation + 2 * hidden
    in_float32 = hidden + (taps if config.fc_norm else 0)  # embeddings, and taps in front of their norms
    weights = 2 * hidden * attention.projections
    return width * (rows * per_row + keys * per_key + weights) + FLOAT32 * keys * in_float32


def beside_unroll(config: EagleConfig, shapes: RunShapes) -> int:
    """Bytes that head and loss take beside that, or the one step that a checkpointed unroll makes again, at most."""
    of_features = isinstance(config, Eagle1Config)
    width, rows = shapes.width, shapes.supervised * (1 if of_features else shapes.ttt_steps)
    # made in the forward pass: gradients of what the head takes, and of the head
    gradients = rows * config.hidden_size * width
    gradients += 0 if of_features else config.draft_vocab_size * config.hidden_size * FLOAT32
    logits = rows * config.draft_vocab_size
    block = CHUNK_ELEMENTS if shapes.accelerator else BLOCK_ELEMENTS
    # two chunks of logits when there are several; of a block both distributions and their product
    loss = min(2 * CHUNK_ELEMENTS, logits) * width + min(block, logits) * (2 * width + FLOAT32)
    loss += 2 * rows * config.hidden_size * width  # what the head takes, of all steps and of those that count
    if of_features:  # the target's distributions are made as the draft's are, and features compared in float32
        loss += min(2 * CHUNK_ELEMENTS, logits) * width + 2 * rows * config.hidden_size * FLOAT32
    if not shapes.checkpointing:
        return gradients + loss
    attention = _AttentionWidths.of(config, shapes.accelerator)
    step = 4 * config.hidden_size + 2 * config.intermediate_size + attention.query + attention.output
    step += attention.rotation + attention.key_value + (shapes.ttt_steps - 1) * attention.again
    return gradients + max(loss, shapes.supervised * step * width)


@dataclass(frozen=True)
class _AttentionWidths:
    """Numbers that attention keeps of a row.

    Attributes:
        query, key_value, output: of its query, of its key and value, and of what it attended to.
        rotation: of its cosines and sines.
        projections: width of all projections of the layer's input, whose weights are put side by side.
        again: of its key and value, once more at every later step.
    """

    query: int
    key_value: int
    output: int
    rotation: int
    projections: int
    again: int

    @classmethod
    def of(cls, config: EagleConfig, accelerator: bool) -> "_AttentionWidths":
        heads, rotation = config.num_attention_heads, 2 * config.head_dim
        if not isinstance(config, EagleMLAConfig):
            query, key = heads * config.head_dim, config.num_key_value_heads * config.head_dim
            # a value is kept with the key that it was projected beside
            return cls(query, 3 * key, query, rotation, query + 2 * key, 2 * query if accelerator else 0)
        key, value = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim), heads * config.v_head_dim
        rank, latent = config.q_lora_rank or 0, config.kv_lora_rank + config.qk_rope_head_dim
        wide = max(key, value)  # a CPU's kernel takes one width
        return cls(
            query=key + 2 * rank,
            key_value=(key + value if accelerator else 2 * wide) + latent + config.kv_lora_rank,
            output=value if accelerator else wide + value,
            rotation=rotation,
            projections=(rank or key) + latent,
            again=key + value if accelerator else wide,
        )
