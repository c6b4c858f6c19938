"""A draft, a target and a batch of known shapes, and one training step in parts that can be timed."""

from dataclasses import fields
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..arguments.blocks import BlockDraftArguments
from ..arguments.objective import EagleArguments
from ..data.columns import read_batch
from ..drafts.build import new_draft
from ..drafts.dflash.configuration import config_for as block_config_for
from ..drafts.eagle3.configuration import EagleConfig
from ..drafts.eagle3.configuration_latent import EagleMLAConfig
from ..drafts.training_base import Draw
from ..drafts.vocabulary import VocabularyMapping
from ..targets.features import TargetDistribution, TargetFeatures
from ..targets.latent import LATENT_SIZES
from ..targets.target import FrozenTarget
from ..training.step import TrainingStep
from .plain import PlainTraining
from .shapes import LONGEST, Shapes


def build_draft(shapes: Shapes, device: torch.device, embedding: torch.Tensor | None = None, window: int | None = None):
    """A random draft in training mode, for a target of these shapes; `window` is its `draft_sliding_window`."""
    latent = shapes.kv_lora_rank is not None
    left_out = {"num_hidden_layers", *(("num_key_value_heads", "head_dim") if latent else LATENT_SIZES)}
    sizes = {f.name: getattr(shapes, f.name) for f in fields(shapes) if f.name not in left_out}

    config_class = EagleMLAConfig if latent else EagleConfig
    taps = _taps(shapes)
    sizes |= {"eagle_aux_hidden_state_layer_ids": taps, "draft_sliding_window": window}
    config = config_class(**sizes, max_position_embeddings=LONGEST)

    mapping = None
    with torch.device(device):  # a GPU makes a billion weights at once, a CPU needs many seconds
        if shapes.draft_vocab_size < shapes.vocab_size:
            kept = torch.randperm(shapes.vocab_size)[: shapes.draft_vocab_size]
            mapping = VocabularyMapping.from_token_ids(kept, shapes.vocab_size)
        if embedding is None:
            embedding = 0.02 * torch.randn(shapes.vocab_size, shapes.hidden_size)
        return new_draft(config, embedding, mapping).to(device).train()


def build_block_draft(shapes: Shapes, device: torch.device, draft_num_layers: int = 1, block_size: int = 8):
    """A random DFlash draft in training mode, for a target of these shapes, with the taps of [`build_draft`]."""
    options = BlockDraftArguments(draft_num_layers, block_size, mask_token_id=shapes.vocab_size - 1)
    config = block_config_for(_target_config(shapes), {**vars(options), "tap_ids": _taps(shapes)})
    with torch.device(device):
        table = 0.02 * torch.randn(shapes.vocab_size, shapes.hidden_size)
        return new_draft(config, table, head_weight=table).to(device).train()


def _taps(shapes: Shapes) -> list[int]:
    n = shapes.num_hidden_layers
    return [2, n // 2, n - 3]


def _target_config(shapes: Shapes, tied: bool = True) -> LlamaConfig:
    left_out = {"draft_vocab_size", *LATENT_SIZES}
    sizes = {f.name: getattr(shapes, f.name) for f in fields(shapes) if f.name not in left_out}
    return LlamaConfig(**sizes, max_position_embeddings=LONGEST, tie_word_embeddings=tied)


def random_target(
    shapes: Shapes, dtype: torch.dtype, device: torch.device, tap_ids: list[int], says: torch.Tensor | None = None
) -> FrozenTarget:
    """A Llama of these shapes with random weights: its answers are noise, its costs are real.

    Args:
        shapes, dtype, device: of the target.
        tap_ids: its taps.
        says: the only token ids that it finds most probable, for instance a draft's vocabulary; any if `None`.
    """
    config = _target_config(shapes, tied=says is None)
    with torch.device(device):  # in their own dtype and place, since making 8 billion weights elsewhere takes minutes
        model = LlamaForCausalLM._from_config(config, dtype=dtype)

    if says is not None:
        # a logit of 0 is below the largest of many random ones
        silent = torch.ones(shapes.vocab_size, dtype=torch.bool, device=device).index_fill_(0, says.to(device), False)
        with torch.no_grad():
            model.lm_head.weight.masked_fill_(silent[:, None], 0)
    return FrozenTarget(model, tap_ids)


def chat_batch(shapes: Shapes, batch_size: int, length: int, supervised_share: float, turns: int, device) -> dict:
    """Conversations of `turns` turns; the last `supervised_share` of each turn is an answer.

    None holds the last token of the vocabulary, with which blocks are masked.
    """
    place = torch.arange(length) % (length // turns) / (length // turns)
    ids = torch.randint(0, shapes.vocab_size - 1, (batch_size, length))
    batch = {
        "input_ids": ids,
        "loss_mask": (place >= 1 - supervised_share).long().expand(batch_size, -1),
        "attention_mask": torch.ones_like(ids),
    }
    return {name: x.to(device) for name, x in batch.items()}


class NoTarget:
    """Stand-in for a target if only the draft's side matters: its answers are random, and made once.

    Args:
        draft: whose target it stands for.

    Attributes:
        features, teacher: its answers, `None` until the first call.
    """

    def __init__(self, draft):
        self.draft, self.config = draft, draft.config
        self.features = self.teacher = None

    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> TargetFeatures:
        """As [`FrozenTarget`], the same for every batch."""
        if self.features is None:
            width = self.config.num_taps * self.config.target_hidden_size
            taps = torch.randn(*input_ids.shape, width, device=input_ids.device)
            self.features = TargetFeatures(taps=taps, last_hidden=taps[..., : self.config.target_hidden_size])
        return self.features

    def teacher_head(self):
        """As [`FrozenTarget.teacher_head`]: a head of the same size, the draft's own."""
        return self.draft.compute_logits

    def distribution(
        self, hidden: torch.Tensor, draft_ids: torch.Tensor | None, dtype: torch.dtype, **options: Any
    ) -> TargetDistribution:
        """As [`FrozenTarget.distribution`], the same for every batch."""
        if self.teacher is None:
            rows, device = len(hidden), hidden.device
            probs = torch.empty(rows, self.config.draft_vocab_size, dtype=dtype, device=device)
            for part in probs.split(256):  # in float32 only a few rows at a time
                part.copy_(torch.randn(part.shape, device=device).mul_(3).softmax(-1))
            argmax = torch.randint(probs.shape[1], (rows,), device=device)
            self.teacher = TargetDistribution(probs, argmax, torch.ones(rows, dtype=torch.bool, device=device))
        return self.teacher


class Step:
    """The [`TrainingStep`] that the Trainer runs, in two parts that can be timed: the target's and the draft's.

    `run_target` asks the target for features and distributions, and moves the batch's plan to the device. `forward` is
    the draft's unroll and loss; the caller runs `backward` on its result. Neither part makes the plan: a run plans a
    batch on the CPU where it collates it, so call `planned` before the clock starts.

    Args:
        draft, target: the pair; without a target, features and distributions are random and made once.
        num_steps: TTT steps.
        autocast: dtype of mixed precision, `None` for float32.
        whole: run the plain way instead, for comparison, see [`PlainTraining`]; with `eager` attention.
        num_anchors: blocks of a row at most, of a draft that is trained on blocks.
    """

    def __init__(
        self,
        draft,
        target: FrozenTarget | None,
        num_steps: int,
        autocast=None,
        whole: bool = False,
        num_anchors: int = 512,
    ):
        self.draft, self.autocast, self.whole = draft, autocast, whole
        self.attention = "eager" if whole else "sdpa"
        self.target = NoTarget(draft) if target is None else target

        if whole:
            training = PlainTraining(num_steps, draft.config.draft_sliding_window)
        else:
            asked = EagleArguments(ttt_steps=num_steps, num_anchors=num_anchors)
            training = draft.kind.part("training").training_for(asked, draft.config)
        self.training_step = TrainingStep(self.target, training, torch.float32 if autocast is None else torch.bfloat16)

    def planned(self, batch: dict) -> dict:
        """The batch as the Trainer's loader returns it, with its plan in main memory. Padding may have any id."""
        device = batch["input_ids"].device
        on_host = read_batch({name: x.cpu() for name, x in batch.items()}, self.target.config.vocab_size)
        plan = self.training_step.training.plan(on_host, Draw())
        return {**{name: x.to(device) for name, x in on_host.items()}, "plan": plan}

    def run_target(self, batch: dict) -> None:
        """The target's part of a step. Also plans a batch that has no plan."""
        self.plan = self.training_step.plan(batch)
        self.counts = self.plan.counts
        seen = self.training_step.target_features(batch, self.plan)

        factors = self.training_step.step_factors(self.counts, total=None, processes=1)
        self.lesson = self.training_step.teach(self.draft, seen, self.plan, factors)

    def forward(self, batch: dict) -> torch.Tensor:
        """The draft's loss on what `run_target` saw."""
        self.draft.set_attn_implementation(self.attention)
        with torch.autocast(batch["input_ids"].device.type, self.autocast, enabled=self.autocast is not None):
            return self.training_step.unroll(self.draft, batch, self.plan, self.lesson).loss
