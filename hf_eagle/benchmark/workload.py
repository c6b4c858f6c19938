"""A draft, its target and a batch of known shapes, and one training step of them in parts that can be timed."""

from dataclasses import dataclass, fields

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..drafts.build import new_draft
from ..drafts.eagle3.configuration import EagleConfig
from ..drafts.eagle3.configuration_latent import EagleMLAConfig
from ..drafts.modeling_base import EagleOutput
from ..drafts.vocabulary import VocabularyMapping
from ..losses.objectives import DraftObjective
from ..losses.supervision import SupervisionPlan, supervised_steps
from ..targets.distribution import TargetDistribution
from ..targets.latent import LATENT_SIZES
from ..targets.target import FrozenTarget


@dataclass
class Shapes:
    """Sizes of a target and of the draft for it."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    num_hidden_layers: int  # the target's
    # of a draft with latent attention
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None


PRESETS = {
    "smollm2": Shapes(576, 1536, 9, 3, 64, 49152, 8192, 30),
    "llama3-8b": Shapes(4096, 14336, 32, 8, 128, 128256, 32000, 32),
    "qwen3-30b-a3b": Shapes(2048, 6144, 32, 4, 128, 151936, 32000, 48),
    "kimi-mla": Shapes(7168, 18432, 64, 64, 112, 163840, 32000, 61, 1536, 512, 128, 64, 128),
}


def build_draft(shapes: Shapes, device: torch.device, embedding: torch.Tensor | None = None):
    """A random draft in training mode, for a target of these shapes."""
    latent = shapes.kv_lora_rank is not None
    left_out = {"num_hidden_layers", *(("num_key_value_heads", "head_dim") if latent else LATENT_SIZES)}
    sizes = {f.name: getattr(shapes, f.name) for f in fields(shapes) if f.name not in left_out}
    n = shapes.num_hidden_layers
    config_class = EagleMLAConfig if latent else EagleConfig
    config = config_class(**sizes, eagle_aux_hidden_state_layer_ids=[2, n // 2, n - 3], max_position_embeddings=2**17)
    mapping = None
    if shapes.draft_vocab_size < shapes.vocab_size:
        kept = torch.randperm(shapes.vocab_size)[: shapes.draft_vocab_size]
        mapping = VocabularyMapping.from_token_ids(kept, shapes.vocab_size)
    if embedding is None:
        embedding = 0.02 * torch.randn(shapes.vocab_size, shapes.hidden_size)
    return new_draft(config, embedding, mapping).to(device).train()


def random_target(shapes: Shapes, dtype: torch.dtype, device: torch.device, tap_ids: list[int]) -> FrozenTarget:
    """A Llama of these shapes with random weights: what it says is noise, what it costs is not."""
    left_out = {"draft_vocab_size", *LATENT_SIZES}
    sizes = {f.name: getattr(shapes, f.name) for f in fields(shapes) if f.name not in left_out}
    config = LlamaConfig(**sizes, max_position_embeddings=2**17, tie_word_embeddings=True)
    return FrozenTarget(LlamaForCausalLM(config).to(device=device, dtype=dtype), tap_ids)


def chat_batch(shapes: Shapes, batch_size: int, length: int, supervised_share: float, turns: int, device) -> dict:
    """Conversations of `turns` turns, the last `supervised_share` of each turn being an answer."""
    place = torch.arange(length) % (length // turns) / (length // turns)
    ids = torch.randint(0, shapes.vocab_size, (batch_size, length))
    batch = {
        "input_ids": ids,
        "loss_mask": (place >= 1 - supervised_share).long().expand(batch_size, -1),
        "attention_mask": torch.ones_like(ids),
    }
    return {name: x.to(device) for name, x in batch.items()}


class Step:
    """One training step: target features and distribution, unroll, backward.

    Args:
        draft, target: the pair; without a target, features and distributions are random and made once.
        num_steps: TTT steps.
        autocast: dtype of mixed precision, `None` for float32.
        whole: the plain way to compare with: every row of the batch is unrolled with `eager` attention, and the logits
            of every row at every step are made, kept, and masked in the end.
    """

    def __init__(self, draft, target: FrozenTarget | None, num_steps: int, autocast=None, whole: bool = False):
        self.draft, self.target, self.num_steps, self.autocast, self.whole = draft, target, num_steps, autocast, whole
        self.attention = "eager" if whole else "sdpa"
        self.factors = torch.tensor([0.8**s for s in range(num_steps)])
        self.taps = self.teacher = None

    def look(self, batch: dict) -> None:
        """Which rows count, and what the target says of them; the target's part of a step."""
        documents = batch.get("documents", batch["attention_mask"] - 1)
        self.supervised = counted = supervised_steps(batch["loss_mask"], documents, self.num_steps)
        self.counts = counted.sum((1, 2))
        if self.whole:
            counted = torch.ones_like(counted)
            for s in range(self.num_steps):
                counted[s, :, counted.shape[2] - 1 - s :] = False  # what they predict lies behind the row's end
        self.plan = SupervisionPlan.of(counted)
        if self.target is not None:
            names = ("input_ids", "attention_mask", "position_ids", "documents")
            inputs = {name: batch[name] for name in names if name in batch}
            if "full_mask" in batch:
                inputs["attention_mask"] = batch["full_mask"]
            features = self.target(**inputs)
            self.taps = features.taps
            self.teacher = self.target.distribution(
                features.last_hidden.flatten(0, 1)[self.plan.positions], self.draft.draft_ids, self._resting_dtype()
            )
        elif self.taps is None:
            config = self.draft.config
            shape = (*batch["input_ids"].shape, config.num_taps * config.hidden_size)
            self.taps = torch.randn(shape, device=documents.device)
            rows = (len(self.plan.positions), config.draft_vocab_size)
            probs = torch.empty(rows, dtype=self._resting_dtype(), device=documents.device)
            for part in probs.split(256):
                part.copy_(torch.randn(part.shape, device=part.device).mul_(3).softmax(-1))
            every = torch.ones(rows[0], dtype=torch.bool, device=documents.device)
            self.teacher = TargetDistribution(probs, torch.randint_like(self.plan.positions, rows[1]), every)

    def forward(self, batch: dict) -> torch.Tensor:
        """The draft's loss on what `look` saw."""
        self.draft.set_attn_implementation(self.attention)
        factors = (self.factors.to(self.counts.device) / self.counts.clamp_min(1)).float()
        if self.whole:
            objective = self._whole_objective(factors)
        else:
            objective = DraftObjective().bind(self.plan, self.teacher, factors)
        with torch.autocast(self.taps.device.type, self.autocast, enabled=self.autocast is not None):
            return self.draft(
                batch["input_ids"],
                self.taps,
                rows=None if self.whole else self.plan.rows,
                num_steps=self.num_steps,
                objective=objective,
                attention_mask=batch["attention_mask"],
                position_ids=batch.get("position_ids"),
                documents=batch.get("documents"),
            ).loss

    def _resting_dtype(self) -> torch.dtype:
        return torch.float32 if self.autocast is None else torch.bfloat16

    def _whole_objective(self, factors: torch.Tensor):
        supervised = self.supervised.flatten(1)
        places = torch.full((supervised.shape[1] + self.num_steps + 1,), 0, device=supervised.device)
        places[self.plan.positions] = torch.arange(len(self.plan.positions), device=places.device)

        def objective(normed, head):
            losses, hits = [], []
            for step, hidden in enumerate(normed):
                where = places[torch.arange(len(hidden), device=hidden.device) + 1 + step]
                logits = head(hidden).float()
                row_losses = -(self.teacher.probs[where].float() * logits.log_softmax(-1)).sum(-1)
                losses.append((row_losses * supervised[step]).sum())
                hits.append(((logits.argmax(-1) == self.teacher.argmax[where]) & supervised[step]).sum())
            losses = torch.stack(losses)
            return EagleOutput((factors * losses).sum(), losses.detach(), torch.stack(hits))

        return objective
