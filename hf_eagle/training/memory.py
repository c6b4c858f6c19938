"""Out of memory: one sentence that says where, on which batch, and what saves most, by the draft's counted costs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..door.memory import ran_out_of_memory
from ..door.sentences import first_line, is_sentence
from ..drafts.costs_base import FLOAT32, DraftCosts, RunShapes
from ..targets.sharding import local_bytes
from .checkpoints import last_complete_checkpoint


GIB = 2**30
LESS_OF_TARGET = "load it with `target_dtype` bfloat16, or spread it with `target_sharding` fsdp2"
_MOST = 5  # pieces of advice in a sentence
_WORTH = 0.02  # share of the largest saving below which advice is left out


@contextmanager
def explained(doing: str | Callable[[], str], advice: str | Callable[[], str]) -> Iterator[None]:
    """Turn what is raised in the block when memory runs out into one sentence.

    Args:
        doing: what was done, as "in step 3".
        advice: what to do, without a full stop.

    Raises:
        torch.OutOfMemoryError: from the library's error, whose first line it repeats.
    """
    try:
        yield
    except Exception as problem:
        if not ran_out_of_memory(problem) or is_sentence(problem):
            raise
        where, what = (x if isinstance(x, str) else x() for x in (doing, advice))
        said = first_line(problem) or type(problem).__name__
        raise torch.OutOfMemoryError(f"Out of memory {where} ({said}): {what}.") from problem


class MemoryMixin:
    """Says what to lower when memory runs out; place it before all others and `Trainer`."""

    _batch: dict[str, torch.Tensor] | None = None  # of the step under way: its tokens, mask and, packed, documents

    def train(self, *args, **kwargs):
        """As in `Trainer`.

        Raises:
            torch.OutOfMemoryError: with what to lower, in the order in which it helps.
        """
        with explained(self._doing, lambda: _told(savings_of(self, self._batch))):
            return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        """As in `Trainer`."""
        self._batch = {name: inputs[name] for name in ("input_ids", "loss_mask", "documents") if name in inputs}
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """As in `Trainer`; raises as `train`."""
        size = self.args.per_device_eval_batch_size
        lower = "" if size == 1 else f"`per_device_eval_batch_size` ({size}), then "
        with explained(f"in the evaluation after step {self.state.global_step}", f"lower {lower}`max_length`"):
            return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As in `Trainer`; raises as `train`."""
        if _internal_call:  # of a checkpoint
            return super().save_model(output_dir, _internal_call)
        with explained("while the draft was saved", self._of_saving):
            return super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        with explained(f"while the checkpoint of step {self.state.global_step} was saved", self._of_saving):
            super()._save_checkpoint(model, trial)

    def _of_saving(self) -> str:
        states = "" if self.args.save_only_model else "; `save_only_model` needs less, and cannot be resumed exactly"
        last = last_complete_checkpoint(self.args.output_dir)
        kept = "no checkpoint was finished yet" if last is None else f"{last} is complete"
        return f"{kept}: free memory, and run again with `--resume_from_checkpoint last`{states}"

    def _doing(self) -> str:
        if self._batch is None:
            return "before the first step"
        rows, length = self._batch["input_ids"].shape
        ranks = f" of rank {self.args.process_index}" if self.args.world_size > 1 else ""
        return f"in step {self.state.global_step + 1}{ranks}, on a batch of {rows} x {length:,} tokens"


def _told(savings: list[tuple[str, float]]) -> str:
    most = max((size for _, size in savings), default=0)
    worth = sorted((x for x in savings if x[1] > _WORTH * most), key=lambda x: -x[1])[:_MOST]
    pieces = ", ".join(f"{what} ({size / GIB:.2g} GiB)" for what, size in worth)
    return f"save memory with what helps most here, by estimate: {pieces}; `--dry_run` counts what a run holds"


def savings_of(trainer, batch: dict[str, torch.Tensor] | None) -> list[tuple[str, float]]:
    """What a run can change, and about how many bytes of a rank that saves.

    Args:
        trainer ([`EagleTrainer`]): its arguments, draft and target.
        batch: `input_ids`, maybe `loss_mask` and, packed, `documents`, each `(batch, length)`; `None` for a full one of
            2,048 tokens a row.
    """
    args, target = trainer.args, trainer.target
    draft = trainer.accelerator.unwrap_model(trainer.model)
    kind, config = draft.kind, draft.config
    shapes = _shapes_of(trainer, batch)
    costs = kind.part("costs").costs_of(config)
    held, ranks = local_bytes(target.model), args.world_size

    def saved(**changed) -> float:
        return _step(costs, shapes) - _step(costs, replace(shapes, **changed))

    found = [("halve `max_length`", saved(length=max(1, shapes.length // 2)))]
    if shapes.rows > 1:
        found.append((f"`per_device_train_batch_size` 1, not {args.per_device_train_batch_size}", saved(rows=1)))
    if not shapes.checkpointing and draft.supports_gradient_checkpointing:
        found.append(("`activation_checkpointing`", saved(checkpointing=True)))
    if not shapes.bf16 and not args.fp16 and shapes.accelerator:
        found.append(("`bf16`", saved(bf16=True)))
    if "draft_vocab_size" not in kind.meaningless:
        half = copy(config)
        half.draft_vocab_size = max(1, config.draft_vocab_size // 2)
        less = _step(costs, shapes) - _step(kind.part("costs").costs_of(half), shapes)
        head = config.draft_vocab_size // 2 * config.hidden_size * 4 * FLOAT32  # weight, gradient, AdamW's moments
        head /= ranks if shapes.draft_sharded else 1
        found.append((f"`draft_vocab_size` {half.draft_vocab_size}", head + less))

    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    if ranks > 1 and not trainer.is_fsdp_enabled and trainer._adapter() is None:
        # weights, gradients and moments are shared, but the weights are gathered; and DDP's buckets go
        found.append(("the launch config `fsdp2`", 4 * trained * FLOAT32 * (ranks - 1) / ranks))
    if ranks > 1 and target.sharding is None and target.runs_here:
        found.append(("`target_sharding` fsdp2", held * (ranks - 1) / ranks))
    if trainer.feature_cache is None and config.image_embeddings == "token" and target.runs_here:
        ends = (target.model.get_input_embeddings(), target.model.get_output_embeddings())
        kept = {id(end.weight): local_bytes(end) for end in ends}
        found.append(("a `feature_store` in place of the running target", held - sum(kept.values())))
    return [(what, size) for what, size in found if size > 0]


def _shapes_of(trainer, batch: dict[str, torch.Tensor] | None) -> RunShapes:
    args, target = trainer.args, trainer.target
    rows, length = (args.per_device_train_batch_size, 2048) if batch is None else batch["input_ids"].shape
    mask = None if batch is None else batch.get("loss_mask")
    packed = batch is not None and "documents" in batch
    return RunShapes(
        world_size=args.world_size,
        rows=rows,
        length=length,
        ttt_steps=trainer.step.training.steps,
        supervised_share=1.0 if mask is None else float(mask.cpu().float().mean()),
        bf16=args.bf16 or args.fp16,
        checkpointing=bool(args.gradient_checkpointing),
        draft_sharded=trainer.is_fsdp_enabled,
        target_dtype=target.model.dtype,
        accelerator=args.device.type != "cpu",
        # a packed row holds many conversations, each with as many blocks or rows
        num_anchors=length if packed else args.num_anchors,
        loss_window=None if packed else args.loss_window,
        loss=args.loss,
    )


def _step(costs: DraftCosts, shapes: RunShapes) -> float:
    """Bytes of a step beside the weights."""
    features = shapes.tokens * costs.feature_width * shapes.target_dtype.itemsize
    return features + costs.teacher(shapes)[1] + costs.kept_by_unroll(shapes) + costs.beside_unroll(shapes)
