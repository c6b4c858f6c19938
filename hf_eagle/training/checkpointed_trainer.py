"""Of the trainer, what is written and read: checkpoints that are whole or not there, and drafts that are servable."""

import shutil
from pathlib import Path

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..drafts.adapters import AdaptedDraft
from ..drafts.vocabulary import check_mapping
from ..serving.check import require_servable
from .checkpoints import (
    WRITE_ERRORS,
    check_rows_per_step,
    check_tensors,
    clear_run,
    refuse_other_run,
    resolve_resume,
    why_incomplete,
    write_failure,
    write_manifest,
)
from .distributed import DistributedDraft


class CheckpointedTrainer(DistributedDraft):
    """A `Trainer` whose checkpoints are finished by a manifest, resumed from only then, and loadable by the servers.

    Attributes:
        target ([`FrozenTarget`]): set by the subclass; what is saved is checked against it.
        resumed (`bool`): whether training went on from a checkpoint.
    """

    resumed = False

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As in `Trainer`; `"last"` or `True` resumes from the newest COMPLETE checkpoint, if there is one.

        Raises:
            FileExistsError: if `output_dir` holds another run and this one does not continue it.
            ValueError: if the checkpoint is half-written, or fits neither the draft nor the batch.
        """
        resume = resolve_resume(self.args.output_dir, resume_from_checkpoint)
        if resume is not None and not (self.args.ignore_data_skip or self.args.auto_find_batch_size):
            check_rows_per_step(resume, self._rows_per_step)
        if resume is None and resume_from_checkpoint in (None, False):
            refuse_other_run(self.args.output_dir, self.args.overwrite)
            self.accelerator.wait_for_everyone()
            if self.args.overwrite and self.args.should_save:
                clear_run(self.args.output_dir)
            self.accelerator.wait_for_everyone()
        self.resumed = resume is not None
        return super().train(resume_from_checkpoint=None if resume is None else str(resume), **kwargs)

    @property
    def _rows_per_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _checkpoint_folder(self, trial) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _save_checkpoint(self, model, trial) -> None:
        folder = self._checkpoint_folder(trial)
        if self.args.should_save and folder.exists() and why_incomplete(folder):
            shutil.rmtree(folder)  # a killed run's; its files must not mix with the new ones
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except WRITE_ERRORS as problem:
            shutil.rmtree(folder, ignore_errors=True)
            raise write_failure(folder, problem) from problem
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder, self._rows_per_step)
            # older ones go only now that this one is whole
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As in `Trainer`: the folder is what the servers load."""
        if _internal_call:  # _save_checkpoint handles its own errors
            return super().save_model(output_dir, _internal_call)
        try:
            super().save_model(output_dir, _internal_call)
        except WRITE_ERRORS as problem:
            raise write_failure(output_dir or self.args.output_dir, problem) from problem

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # a sharded draft is saved by all ranks together, and written by one
            require_servable(output_dir or self.args.output_dir, self.target.config)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        draft = self.accelerator.unwrap_model(model or self.model)
        if isinstance(draft, AdaptedDraft):
            draft.load_adapter_from(resume_from_checkpoint)
            return
        check_tensors(draft, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if draft.d2t is not None:
            check_mapping(draft.d2t, draft.t2d)

    def _load_best_model(self) -> None:
        draft = self.accelerator.unwrap_model(self.model)
        if isinstance(draft, AdaptedDraft):
            draft.load_adapter_from(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
