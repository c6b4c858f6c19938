"""Save and resume: all that a training run writes to its folder and reads again, checkpoints and the draft.

A checkpoint is complete or absent; runs resume only from a complete one. Servers load every folder that holds a
draft.
"""

import logging
import math
from pathlib import Path

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput, rotate_checkpoints

from ..drafts.adapters import AdaptedDraft
from ..serving.check import require_servable, serves
from .checkpoints import (
    begin_checkpoint,
    checkpoints,
    explain_write_errors,
    missing_states,
    read_state,
    why_incomplete,
    write_manifest,
)
from .distributed import set_optimizer_state, set_weights, whole_optimizer_state
from .publishing import PublishingMixin
from .resuming import check_step, check_tensors, clear_run, is_last, refuse_other_run, resolve_resume, states_begun_anew
from .stream_place import StreamPlace, check_reading
from .totals import logged_loss
from .watch import StepWatch


logger = logging.getLogger(__name__)


class SavingMixin(PublishingMixin):
    """Saves and resumes; place it before [`HealthMixin`] and `Trainer`.

    * A manifest finishes each checkpoint, and runs resume only from a finished one.
    * Nothing is saved after NaN or infinity, or before the first supervised row; see [`HealthMixin`].
    * A checkpoint of a draft under FSDP2 is the same as a replicated draft's.

    Attributes:
        target ([`FrozenTarget`]): set by the trainer; a saved draft is checked against its config.
        resumed (`bool`): whether training continued from a checkpoint.
        nothing_to_do (`bool`): whether that checkpoint already had all steps, so that none was taken.
        stream_place ([`StreamPlace`], *optional*): updated by the trainer; `None` if the data are no stream.
    """

    resumed = False
    nothing_to_do = False
    stream_place: StreamPlace | None = None
    _told_unserved = False

    # ---- start or resume ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As in `Trainer`; `"last"` or `True` resumes from the newest COMPLETE checkpoint, if there is one.

        A run that has all its steps is not trained: load its state and its draft, and set `nothing_to_do`.

        Raises:
            FileExistsError: if `output_dir` holds another run and this one does not continue it.
            FloatingPointError: if a loss, a gradient or the weights are NaN or infinite.
            ValueError: if the checkpoint is not complete, or does not fit the draft or the batch; if no step could be
                taken, or no supervised row was seen.
        """
        args, last = self.args, is_last(resume_from_checkpoint)
        self.refuse_no_batch()
        resume = resolve_resume(args.output_dir, resume_from_checkpoint, args.ignore_missing_state)
        begun_at = 0 if resume is None else read_state(resume).global_step

        self.resumed = resume is not None
        steps = self._steps_to_take() if self.resumed else 0
        self.nothing_to_do = self.resumed and begun_at >= steps
        if self.nothing_to_do:
            return self._take_as_finished(resume)

        if resume is None:
            self._claim_output_dir(last)
        else:
            if not args.ignore_data_skip:
                check_reading(resume, stream=self.stream_place is not None)
            if not (args.ignore_data_skip or args.auto_find_batch_size):
                check_step(resume, self._rows_per_step, self.stream_place)
            self._say_what_is_resumed(resume, last)
            logger.info("Continuing from %s: step %d of %d.", resume, begun_at, steps)

        self.watch = StepWatch() if resume is None else StepWatch.resumed(begun_at)
        result = super().train(resume_from_checkpoint=None if resume is None else str(resume), **kwargs)

        self.refuse_run_of_nothing(begun_at)
        self.refuse_broken()
        self.share_loss()
        return result

    def _steps_to_take(self) -> int:
        """Optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _take_as_finished(self, checkpoint: Path) -> TrainOutput:
        """Load state and draft of a run that has all its steps, and log it."""
        self.state = read_state(checkpoint)
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.is_local_process_zero = self.is_local_process_zero()

        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and Path(best).is_dir():
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(checkpoint))

        step = self.state.global_step
        logger.warning("%s already has all %d steps of this run: there is nothing to train.", checkpoint, step)
        loss = logged_loss(self.state.log_history)
        return TrainOutput(step, math.nan if loss is None else loss, {} if loss is None else {"train_loss": loss})

    def _say_what_is_resumed(self, checkpoint: Path, last: bool) -> None:
        """Log which checkpoints are skipped, and which states start anew."""
        there = checkpoints(checkpoint.parent)
        for newer in there[there.index(checkpoint) + 1 :] if last else ():
            logger.warning("%s is skipped: %s.", newer, why_incomplete(newer))

        anew = states_begun_anew(checkpoint)
        if anew:
            logger.warning("%s", anew)

    def _claim_output_dir(self, last: bool) -> None:
        """Refuse another run's folder, or clear it if `overwrite` is set."""
        refuse_other_run(self.args.output_dir, self.args.overwrite, last)

        # all ranks must have looked before one deletes, and it must have deleted before any of them writes
        self.accelerator.wait_for_everyone()
        if self.args.overwrite and self.args.should_save:
            clear_run(self.args.output_dir)
        self.accelerator.wait_for_everyone()

    @property
    def _rows_per_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _adapter(self) -> AdaptedDraft | None:
        """The draft with the adapter trained on it, if any: it loads its own weights."""
        draft = self.accelerator.unwrap_model(self.model)
        return draft if isinstance(draft, AdaptedDraft) else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapter = self._adapter()
        if adapter is not None:
            adapter.load_adapter_from(resume_from_checkpoint)
            return

        draft = self.accelerator.unwrap_model(model or self.model)
        check_tensors(draft, resume_from_checkpoint)
        # `Trainer` reads the config without its kind: it warns of RoPE in two spellings, and fails on those of llama3
        # and yarn (transformers 5.24)
        set_weights(draft, resume_from_checkpoint)
        draft.check_vocabulary()

    def _load_best_model(self) -> None:
        best, adapter = self.state.best_model_checkpoint, self._adapter()
        if adapter is not None:
            adapter.load_adapter_from(best)
        else:
            set_weights(self.model, best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and missing_states(checkpoint):
            return  # both start anew, as `train` has logged
        on_cpu = self.args.device.type == "cpu"
        if checkpoint is None or not (self.is_fsdp_enabled or on_cpu):
            return super()._load_optimizer_and_scheduler(checkpoint)

        # accelerate numbers CPUs, and PyTorch before 2.10 loads nothing onto a numbered one
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        if self.is_fsdp_enabled:
            set_optimizer_state(self.model, self.optimizer.optimizer, state)
        else:
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    # ---- save ----

    def _checkpoint_folder(self, trial) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def weights_to_save(self) -> dict[str, torch.Tensor]:
        """The draft's tensors that a save writes, by its names; under FSDP2, this rank's part of them."""
        adapter = self._adapter()
        draft = self.accelerator.unwrap_model(self.model) if adapter is None else adapter.get_base_model()
        tensors = draft.state_dict() if adapter is None else adapter.merged_state_dict()
        return {name: x for name, x in tensors.items() if name not in (draft._keys_to_ignore_on_save or ())}

    def _save_checkpoint(self, model, trial) -> None:
        folder = self._checkpoint_folder(trial)
        self.catch_up()
        if not self.watch.supervised:
            return logger.warning("%s is not written: there was no supervised row yet.", folder)

        self.refuse_broken()  # before a file is touched
        self.share_loss()
        if self.args.should_save:
            begin_checkpoint(folder)  # files of a killed run must not mix with the new ones
        self.accelerator.wait_for_everyone()

        # keep Trainer from deleting older checkpoints: this one is not complete yet
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with explain_write_errors(folder, remove=True):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()

        # every rank has written its files: finish the checkpoint, then delete older ones
        if self.args.should_save:
            write_manifest(folder, self._rows_per_step, self.stream_place)
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

        # push from here and not from `_push_from_checkpoint`, so that the manifest is included
        if self.args.push_to_hub and self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self._push_checkpoint(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As in `Trainer`: servers load the folder.

        Raises:
            FloatingPointError: if the weights hold NaN or infinity; the folder then stays as it is.
        """
        if _internal_call:  # the caller has checked the weights, and explains errors itself
            return super().save_model(output_dir, _internal_call)

        self.refuse_broken()
        with explain_write_errors(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub:  # as `Trainer` does, but outside the block: a failing Hub is not a full disk
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.is_fsdp_enabled and not self.args.should_save:
            return  # all ranks gather the weights, one writes them

        # arguments are pickled beside the weights, in folders that people pass on
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

        if self.args.should_save:
            kind = self.accelerator.unwrap_model(self.model).kind.name
            if serves(kind) or not self._told_unserved:  # warn once a run, not at every checkpoint
                require_servable(output_dir or self.args.output_dir, self.target.config, kind)
            self._told_unserved = True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)

        state = whole_optimizer_state(self.model, self.optimizer.optimizer)  # all ranks gather, one writes
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
