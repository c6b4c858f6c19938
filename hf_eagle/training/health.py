"""Stop a run before anything broken is kept: values that are NaN or infinite, and steps that train on nothing.

No step waits for what is checked. A batch's loss, the norm of the last step's gradient and the count of supervised rows
are sent to the host together, and read before the next batch, or where a run logs, evaluates, saves or ends. On a CPU
there is nothing to wait for, so they are read at once. A save also checks the weights, before it touches a file.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..door.writing import write_atomically
from ..targets.weights import all_numbers
from .checkpoints import last_complete_checkpoint
from .totals import StepTotals
from .watch import Fetch, Seen, StepWatch


logger = logging.getLogger(__name__)


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
        watch, training = self.watch, self.model.training
        watch.pending = seen = Seen(self.state.global_step, training)
        values = {"loss": loss.detach()}
        if training:
            watch.saw(seen.step, batch)
            values |= {} if rows is None else {"rows": rows.sum()}
            values |= {} if watch.norm is None else {"norm": watch.norm}
            seen.norm_step, watch.norm = watch.norm_step, None

        seen.fetch = Fetch({name: value.to(loss.device, torch.float32) for name, value in values.items()})
        if not seen.fetch.is_late:
            self.catch_up()

    def catch_up(self) -> None:
        """Check what the last batch sent to the host; call it before the next one, and before anything is kept.

        Raises:
            FloatingPointError: if its loss, or the gradient before it, is not a number.
            ValueError: if a stream gave no supervised row for too long.
        """
        seen, self.watch.pending = self.watch.pending, None
        if seen is None:
            return

        fetched = seen.fetch.read()
        if "norm" in fetched:
            self._check_gradient(fetched["norm"], seen.norm_step)  # first: it is why the loss after it is broken
        if not math.isfinite(fetched["loss"]):
            self._refuse_loss(fetched["loss"], seen)
        if "rows" in fetched:
            self.watch.counted(seen.step, fetched["rows"])
            self._check_stream(seen.step)

    def _refuse_loss(self, loss: float, seen: Seen) -> None:
        """`FloatingPointError` about a loss; on several ranks, all raise it after the step or the evaluation."""
        step, training = seen.step, seen.training
        if not training and self.args.world_size > 1:
            self.watch.held_out_loss = loss  # the others wait for this rank's batches
            return

        if training and self.args.world_size > 1:
            # the others wait for this rank's gradient. It tells them, if it is broken too and no loss scaler takes that
            # for an overflow; otherwise a flag does, see `StoppingMixin`
            self.watch.loss, self.watch.loss_step = loss, step
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
        self.catch_up()
        own, self.watch.held_out_loss = self.watch.held_out_loss, None
        if own is not None:
            totals.add(loss=torch.full_like(totals.sums["loss"], math.nan))

        metrics = totals.metrics(self.accelerator, self.step.training)
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

    def _check_newest_gradient(self) -> None:
        """As `_check_gradient`, for a step after which no batch came; waits for it."""
        norm, self.watch.norm = self.watch.norm, None
        if norm is not None:
            self._check_gradient(float(norm), self.watch.norm_step)

    def _check_gradient(self, norm: float, step: int) -> None:
        """`FloatingPointError` if the norm of a step's gradient is not a number."""
        self.watch.saw_norm(norm, step)
        if math.isfinite(norm):
            return

        rank = self.args.process_index
        raise FloatingPointError(
            f"The norm of the gradient of step {step + 1} is {norm}"
            + (f" and rank {rank} had a loss of {self.watch.loss}" if self.watch.loss is not None else "")
            + ", so the weights after it are broken: lower `learning_rate`, leave out records, or look for NaN in the "
            f"target's features.{self._leave_records(step)}{self._last_good()}"
        )

    def refuse_ranks_loss(self) -> NoReturn:
        """`FloatingPointError` about a loss of any rank; call this on all at once."""
        loss, rank = self.watch.loss, self.args.process_index
        where = "of another rank" if loss is None else f"of step {self.watch.loss_step + 1}"
        raise FloatingPointError(
            f"The loss {where} is {'NaN or infinite' if loss is None else loss} (this is rank {rank}), so no rank goes "
            f"on after step {self.state.global_step}: lower `learning_rate`, leave out records, or look for NaN in the "
            f"target's features.{'' if loss is None else self._leave_records(self.watch.loss_step)}{self._last_good()}"
        )

    def share_loss(self) -> None:
        """Let all ranks know of a loss that is not a number, where no step follows that would tell; call it on all.

        Raises:
            FloatingPointError: on all ranks, if one of them had such a loss.
        """
        self.catch_up()
        if self.args.world_size == 1:
            return
        flag = torch.tensor([self.watch.loss is not None], dtype=torch.long, device=self.args.device)
        if self.accelerator.reduce(flag, reduction="sum").any():
            self.refuse_ranks_loss()

    def _check_stream(self, step: int) -> None:
        """`ValueError` if a stream, which may be endless, gave no supervised row for too many steps up to this one."""
        limit, without = self.args.max_unsupervised_steps, step - self.watch.supervised_step
        if without >= limit and isinstance(self.train_dataset, IterableDataset):
            self.refuse_unsupervised(step + 1, f", in {without} steps one after the other (`max_unsupervised_steps`)")

    # ---- where a run logs, saves and ends ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, but count windows and steps that taught nothing, and check the gradient of the window."""
        self.catch_up()
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
            self.watch.norm = None
            self._check_gradient(logs["grad_norm"], self.watch.norm_step)

    def _tell_untaught(self, logs: dict[str, float]) -> None:
        """Log new steps in which no row lay in the draft's vocabulary, as a warning and in `logs`."""
        if self.watch.norm is not None:
            self.watch.saw_norm(float(self.watch.norm), self.watch.norm_step)
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
        self.catch_up()
        self._check_newest_gradient()

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
        self.catch_up()
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
        self.trainer.catch_up()
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
