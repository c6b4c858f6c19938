"""Stop a run before anything broken is kept: values that are NaN or infinite, and steps that train on nothing.

Training checks when a value is fetched anyway, so that no step waits for it: fetching a batch's loss also fetches the
norm of the last step's gradient and the count of supervised rows. A save also checks the weights, before it touches a
file.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..door.writing import write_atomically
from ..targets.weights import all_numbers
from .checkpoints import last_complete_checkpoint
from .totals import StepTotals


logger = logging.getLogger(__name__)

_KEPT = ("input_ids", "attention_mask", "loss_mask")  # enough of a batch to identify its records; the rest may be large


@dataclass
class StepWatch:
    """What is known of the steps of a run, and what must still be fetched.

    Attributes:
        supervised: whether any step had a supervised row, including those before a checkpoint.
        supervised_step: the last step that had one, counted from 0.
        supervised_pass: whether this pass over the data had one, or began before this run resumed.
        untaught: steps since the start whose supervised rows all lay outside the draft's vocabulary.
        untaught_step: the last of them.
        norm: of the gradient of step `norm_step`, until it is checked.
        loss: of this rank in that step, if it was not a number.
        held_out_loss: of this rank in an evaluation on several ranks, if it was not a number.
        batches: of the newest two steps, by step.
    """

    supervised: bool = False
    supervised_step: int = -1
    supervised_pass: bool = False
    untaught: int = 0
    untaught_step: int = -1
    norm: torch.Tensor | None = None
    norm_step: int = -1
    loss: float | None = None
    held_out_loss: float | None = None
    batches: dict[int, list[dict[str, torch.Tensor]]] = field(default_factory=dict)

    @classmethod
    def resumed(cls, step: int) -> "StepWatch":
        """For a resumed run: a run without a supervised row leaves no checkpoint."""
        return cls(supervised=True, supervised_step=step - 1, supervised_pass=True)

    def saw(self, step: int, batch: Mapping[str, Any]) -> None:
        """Keep what identifies the records of a batch."""
        self.batches = {known: batches for known, batches in self.batches.items() if known >= step - 1}
        self.batches.setdefault(step, []).append({name: batch[name] for name in _KEPT if name in batch})

    def counted(self, step: int, rows: float) -> None:
        """Note the supervised rows of a step."""
        if rows:
            self.supervised = self.supervised_pass = True
            self.supervised_step = step

    def saw_norm(self, norm: float) -> None:
        """Count the step of this norm if it had supervised rows, but a zero gradient on all ranks."""
        if norm == 0 and self.norm_step == self.supervised_step != self.untaught_step:
            self.untaught += 1
            self.untaught_step = self.norm_step


class HealthMixin:
    """Checks a run's numbers and rows; place it before `Trainer`.

    Attributes:
        tokenizer_of_records (`PreTrainedTokenizerBase`, *optional*): the target's, for the text of records.
    """

    tokenizer_of_records: PreTrainedTokenizerBase | None = None

    def __init__(self, *args, **kwargs):
        self.watch = StepWatch()
        super().__init__(*args, **kwargs)
        self.add_callback(WholePasses(self))

    # ---- in every step ----

    def look_at(self, loss: torch.Tensor, batch: Mapping[str, Any], rows: torch.Tensor | None) -> None:
        """Check a batch's loss and, in training, the last step's gradient and the rows of this step.

        Args:
            loss: of the batch.
            batch: what the collator made.
            rows: `(steps,)`, of the whole accumulated global batch.

        Raises:
            FloatingPointError: if the loss or the gradient is not a number.
            ValueError: if a stream gave no supervised row for too long.
        """
        step, values = self.state.global_step, [loss.detach()]
        if self.model.training:
            self.watch.saw(step, batch)
            values += [] if rows is None else [rows.sum()]
            values += [] if self.watch.norm is None else [self.watch.norm]

        fetched = torch.stack([value.to(loss.device, torch.float32) for value in values]).tolist()

        if self.model.training and self.watch.norm is not None:
            self._check_gradient(fetched.pop())  # first: a broken gradient is why the loss after it is broken
        if not math.isfinite(fetched[0]):
            self._refuse_loss(fetched[0])
        if self.model.training and rows is not None:
            self.watch.counted(step, fetched[1])
            self._check_stream(step)

    def _refuse_loss(self, loss: float) -> None:
        """`FloatingPointError` about a loss; on several ranks, all raise it after the step or the evaluation."""
        step, training = self.state.global_step, self.model.training
        if not training and self.args.world_size > 1:
            self.watch.held_out_loss = loss  # the others wait for this rank's batches
            return

        if training and self.args.world_size > 1 and self.accelerator.scaler is None:
            self.watch.loss = loss  # the others wait for this rank's gradient, which breaks theirs
            return

        raise FloatingPointError(
            f"The loss is {loss} at step {step}: lower `learning_rate`, or look for NaN in the target's features."
            + (self._leave_records(step) if training else "")
        )

    def held_out_metrics(self, totals: StepTotals) -> dict[str, float]:
        """What an evaluation found, from the sums of all ranks, which also spread a loss that is not a number.

        Raises:
            FloatingPointError: on all ranks, if one of them had such a loss.
        """
        own, self.watch.held_out_loss = self.watch.held_out_loss, None
        if own is not None:
            totals.add(loss=torch.full_like(totals.sums["loss"], math.nan))

        metrics = totals.metrics(self.accelerator, self.step.training.step_weights)
        if not math.isfinite(metrics.get("loss", 0.0)):
            raise FloatingPointError(
                f"The loss on held-out data is {metrics['loss'] if own is None else own} at step "
                f"{self.state.global_step}, by batches of {'another' if own is None else 'this'} rank "
                f"(this is rank {self.args.process_index}): lower `learning_rate`, or look for NaN in the target's "
                "features."
            )

        return metrics

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # in half precision an overflow is no error: its step is skipped and the scale lowered
        if isinstance(norm, torch.Tensor) and self.accelerator.scaler is None:
            self.watch.norm, self.watch.norm_step = norm.detach(), self.state.global_step
        return norm

    def _check_gradient(self, norm: float) -> None:
        """`FloatingPointError` if the norm of the newest gradient, which was just fetched, is not a number."""
        self.watch.saw_norm(norm)
        self.watch.norm = None
        if math.isfinite(norm) and self.watch.loss is None:
            return

        step, rank = self.watch.norm_step, self.args.process_index
        raise FloatingPointError(
            f"The norm of the gradient of step {step + 1} is {norm}"
            + (f" and rank {rank} had a loss of {self.watch.loss}" if self.watch.loss is not None else "")
            + ", so the weights after it are broken: lower `learning_rate`, leave out records, or look for NaN in the "
            f"target's features.{self._leave_records(step)}{self._last_good()}"
        )

    def _check_stream(self, step: int) -> None:
        """`ValueError` if a stream, which may be endless, gave no supervised row for too many steps up to this one."""
        limit, without = self.args.max_unsupervised_steps, step - self.watch.supervised_step
        if without >= limit and isinstance(self.train_dataset, IterableDataset):
            self.refuse_unsupervised(step + 1, f", in {without} steps one after the other (`max_unsupervised_steps`)")

    # ---- where a run logs, saves and ends ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, but count windows and steps that taught nothing, and check the gradient of the window."""
        if "loss" in logs and logs.get("supervised_rows_per_second") == 0:
            del logs["loss"]  # the mean of no rows
            logs["windows_without_rows"] = 1 + next(
                (x["windows_without_rows"] for x in reversed(self.state.log_history) if "windows_without_rows" in x), 0
            )
            logger.warning(
                "No supervised row in the window up to step %d (windows without one so far: %d).",
                self.state.global_step,
                logs["windows_without_rows"],
            )

        if "grad_norm" in logs or "train_runtime" in logs:  # a window, or the end of the run
            self._tell_untaught(logs)
        super().log(logs, start_time)

        if "grad_norm" in logs and self.watch.norm is not None:
            self._check_gradient(logs["grad_norm"])

    def _tell_untaught(self, logs: dict[str, float]) -> None:
        """Log new steps in which no row lay in the draft's vocabulary, as a warning and in `logs`."""
        if self.watch.norm is not None:
            self.watch.saw_norm(float(self.watch.norm))
        if not self.watch.untaught:
            return

        name, new, self.watch.untaught = "steps_outside_vocabulary", self.watch.untaught, 0
        logs[name] = new + next((x[name] for x in reversed(self.state.log_history) if name in x), 0)

        logger.warning(
            "In %d of the steps up to step %d no row taught anything, as the target's tokens all lie outside the "
            "draft's vocabulary (so far: %d): raise `draft_vocab_size`, or set `oov_rows` to renormalize.",
            new,
            self.state.global_step,
            logs[name],
        )

    def refuse_broken(self) -> None:
        """Check the newest gradient and all weights; under FSDP2 every rank must call this.

        Raises:
            FloatingPointError: if one of them is not a number.
        """
        step = self.state.global_step
        if self.watch.norm is not None:
            self._check_gradient(float(self.watch.norm))

        broken = self._broken_weights()
        if broken:
            raise FloatingPointError(
                f"The weights hold NaN or infinity after step {step} ({', '.join(broken[:3])}"
                + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
                + f"), so they are not saved: lower `learning_rate`.{self._leave_records(step - 1)}{self._last_good()}"
            )

    def _broken_weights(self) -> list[str]:
        """Names of the tensors to save that hold NaN or infinity, the same on all ranks."""
        weights = {name: x for name, x in self.weights_to_save().items() if x.is_floating_point()}
        flags = torch.tensor([not all_numbers(x) for x in weights.values()], dtype=torch.long)
        if self.is_fsdp_enabled:  # each rank has checked its own part
            flags = self.accelerator.reduce(flags.to(self.args.device), reduction="sum").cpu()
        return [name for name, flag in zip(weights, flags.tolist(), strict=True) if flag]

    def refuse_run_of_nothing(self, begun_at: int) -> None:
        """`ValueError` if a run that ends took no step, or never saw a supervised row."""
        step = self.state.global_step
        if step == begun_at:
            raise ValueError(
                f"`train_dataset` gave no batch, so no step was taken after step {step} and nothing is saved: give it "
                "conversations that have an answer, or more of them."
            )
        if not self.watch.supervised:
            self.refuse_unsupervised(step)

    def refuse_no_batch(self) -> None:
        """`ValueError` for a data set with fewer rows than the first batch takes, before anything is deleted."""
        if isinstance(self.train_dataset, IterableDataset) or self.args.accelerator_config.split_batches:
            return  # known only after the run

        rows, wanted = len(self.train_dataset), self._train_batch_size * self.args.world_size
        if not rows:
            raise ValueError("`train_dataset` has no rows, so no step could be taken: use other data.")
        if self.args.dataloader_drop_last and rows < wanted:
            raise ValueError(
                f"`dataloader_drop_last` drops all {rows} rows of `train_dataset`, since `per_device_train_batch_size` "
                f"x processes is {wanted}: leave it out, or use more data or a smaller batch."
            )

    def refuse_unsupervised(self, step: int, where: str = "") -> None:
        """`ValueError` about data without a supervised row."""
        raise ValueError(
            f"`train_dataset` gave no supervised row in the steps up to {step}{where}: every `loss_mask` is empty, or "
            "holds answers of one token only, which leave nothing to draft."
        )

    # ---- for error messages ----

    def _last_good(self) -> str:
        last = last_complete_checkpoint(self.args.output_dir)
        return f" {last} is complete, and stays." if last else " There is no complete checkpoint yet."

    def _leave_records(self, step: int) -> str:
        """Write what this rank trained on in a step to a file, and say where; nothing if no such step was taken."""
        rank = self.args.process_index
        records = list(records_of(self.watch.batches.get(step, []), self.tokenizer_of_records))
        if not records:
            return f" Rank {rank} had no supervised row in that step." if step in self.watch.batches else ""

        path = Path(self.args.output_dir) / f"broken-step-{step + 1}-rank-{rank}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, map(json.dumps, records))
        except OSError as problem:
            return f" Its records could not be written ({problem})."
        return f" The {len(records)} records that rank {rank} had in that step are in {path}."


class WholePasses(TrainerCallback):
    """Stops a run without a supervised row in a whole pass over its data, before that pass is saved."""

    def __init__(self, trainer: HealthMixin):
        self.trainer, self.first = trainer, True

    def on_train_begin(self, args, state, control, **kwargs):
        self.first = True

    def on_epoch_begin(self, args, state, control, **kwargs):
        if not self.first:
            self.trainer.watch.supervised_pass = False
        self.first = False

    def on_epoch_end(self, args, state, control, **kwargs):
        cut = control.should_training_stop  # perhaps within the pass, so the end of the run decides
        if not cut and not self.trainer.watch.supervised_pass:
            self.trainer.refuse_unsupervised(state.global_step)


def records_of(
    batches: Iterable[Mapping[str, torch.Tensor]], tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterable[dict[str, Any]]:
    """The rows of batches that are trained on, without padding: `input_ids`, `loss_mask` and, with a tokenizer, text.

    Args:
        batches: `input_ids`, `loss_mask` and maybe `attention_mask`, each `(batch, length)`.
        tokenizer: turns ids into text.
    """
    for batch in batches:
        seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().cpu()
        masks = batch.get("loss_mask", seen).cpu()

        for ids, mask, kept in zip(batch["input_ids"].cpu(), masks, seen, strict=True):
            record = {"input_ids": ids[kept].tolist(), "loss_mask": mask[kept].long().tolist()}
            if any(record["loss_mask"]):
                yield record | ({"text": tokenizer.decode(record["input_ids"])} if tokenizer is not None else {})
