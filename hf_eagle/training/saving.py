"""Everything that a training run writes and reads: checkpoints, the draft's folder, and the repository on the Hub.

A checkpoint is complete or absent, and is resumed from only when complete. Every folder that holds a draft is one that
the servers load.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints
from transformers.utils import PushInProgress

from ..drafts.adapters import AdaptedDraft
from ..hub.model_card import facts_of_card, render_model_card
from ..hub.publish import CARD, publish_draft
from ..hub.run_facts import run_facts
from ..serving.check import require_servable, serves
from .checkpoints import (
    check_rows_per_step,
    check_tensors,
    clear_run,
    explain_write_errors,
    refuse_other_run,
    remove_incomplete,
    resolve_resume,
    write_manifest,
)
from .distributed import set_optimizer_state, set_weights, whole_optimizer_state


logger = logging.getLogger(__name__)


class SavingMixin:
    """Saves, resumes and publishes; to be placed before `Trainer`, as in `class EagleTrainer(SavingMixin, Trainer)`.

    * A manifest finishes each checkpoint, and only a finished one is resumed from.
    * A checkpoint of a draft under FSDP2 is the same as a replicated draft's.
    * The Hub gets what servers and readers need; optimizer states only where `hub_strategy` asks for them.

    Attributes:
        target ([`FrozenTarget`]): set by the trainer; a saved draft is checked against its config.
        card_facts (`dict`): fields of [`CardFacts`] that whoever starts the run knows better than the trainer.
        resumed (`bool`): whether training continued from a checkpoint.
    """

    card_facts: Mapping[str, object] = MappingProxyType({})
    resumed = False
    _told_unserved = False

    # ---- start or resume ----

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
            self._claim_output_dir()

        self.resumed = resume is not None
        return super().train(resume_from_checkpoint=None if resume is None else str(resume), **kwargs)

    def _claim_output_dir(self) -> None:
        """Refuse another run's folder, or clear it where `overwrite` is set."""
        refuse_other_run(self.args.output_dir, self.args.overwrite)

        # all ranks have looked before one deletes, and it has deleted before any of them writes
        self.accelerator.wait_for_everyone()
        if self.args.overwrite and self.args.should_save:
            clear_run(self.args.output_dir)
        self.accelerator.wait_for_everyone()

    @property
    def _rows_per_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _adapter(self) -> AdaptedDraft | None:
        """The draft with the adapter that is trained on it, if there is one: it loads its own weights."""
        draft = self.accelerator.unwrap_model(self.model)
        return draft if isinstance(draft, AdaptedDraft) else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapter = self._adapter()
        if adapter is not None:
            adapter.load_adapter_from(resume_from_checkpoint)
            return

        draft = self.accelerator.unwrap_model(model or self.model)
        check_tensors(draft, resume_from_checkpoint)
        if self.is_fsdp_enabled:
            set_weights(model or self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        draft.check_vocabulary()

    def _load_best_model(self) -> None:
        best, adapter = self.state.best_model_checkpoint, self._adapter()
        if adapter is not None:
            adapter.load_adapter_from(best)
        elif self.is_fsdp_enabled:
            set_weights(self.model, best)
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        set_optimizer_state(self.model, self.optimizer.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    # ---- save ----

    def _checkpoint_folder(self, trial) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _save_checkpoint(self, model, trial) -> None:
        folder = self._checkpoint_folder(trial)
        if self.args.should_save:
            remove_incomplete(folder)  # left by a killed run; its files must not mix with the new ones
        self.accelerator.wait_for_everyone()

        # Trainer itself deletes no older checkpoint: this one is not complete yet
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with explain_write_errors(folder, remove=True):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()

        # every rank has written its files: finish the checkpoint, then delete older ones
        if self.args.should_save:
            write_manifest(folder, self._rows_per_step)
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

        # pushed from here and not from `_push_from_checkpoint`, so that the manifest goes along
        if self.args.push_to_hub and self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self._push_checkpoint(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As in `Trainer`: the folder is what the servers load."""
        if _internal_call:  # the caller explains errors itself
            return super().save_model(output_dir, _internal_call)
        with explain_write_errors(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.is_fsdp_enabled and not self.args.should_save:
            return  # all ranks have gathered the weights, one writes them

        super()._save(output_dir, state_dict)
        if self.args.should_save:
            kind = self.accelerator.unwrap_model(self.model).kind.name
            if serves(kind) or not self._told_unserved:  # told once a run, not at every checkpoint
                require_servable(output_dir or self.args.output_dir, self.target.config, kind)
            self._told_unserved = True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole_optimizer_state(self.model, self.optimizer.optimizer)  # all ranks gather, one writes
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    # ---- publish ----

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the card from what this run knows so far; a card that somebody edited is left alone."""
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero() and (not (folder / CARD).exists() or facts_of_card(folder) is not None):
            render_model_card(folder, run_facts(self))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """As in `Trainer`, without `training_args.bin`; `kwargs` are for `create_model_card`."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)  # on all ranks
        if not self.is_world_process_zero():
            return None

        self.create_model_card(**kwargs)
        self._finish_current_push()
        return self._publish(self.args.output_dir, commit_message, token, revision, run_as_future=not blocking)

    def _publish(self, folder, message: str, token=None, revision=None, run_as_future=False):
        return publish_draft(
            folder,
            self.hub_model_id,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=message,
            run_as_future=run_as_future,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: `Trainer` calls this before the checkpoint has the manifest without which it is not resumed."""

    def _push_checkpoint(self, checkpoint_folder: Path) -> None:
        """Publish a checkpoint's draft while training continues; with its states where `hub_strategy` says so."""
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            return
        self._tell_failed_pushes()

        # send a copy: the checkpoint may be rotated away before it has been sent
        folder, message = self.args.output_dir, f"Training in progress, step {self.state.global_step}"
        for path in (x for name in ("config.json", "*.safetensors") for x in checkpoint_folder.glob(name)):
            shutil.copy(path, folder)
        self.create_model_card()

        jobs = [self._publish(folder, message, run_as_future=True)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            jobs.append(self._push_states(checkpoint_folder, f"{message}, checkpoint"))
        if running:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _push_states(self, checkpoint_folder: Path, message: str):
        """Upload the whole checkpoint, to resume from, into a folder of the repository."""
        from huggingface_hub import HfApi

        last = self.args.hub_strategy == HubStrategy.CHECKPOINT
        return HfApi(token=self.args.hub_token).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=checkpoint_folder,
            path_in_repo="last-checkpoint" if last else checkpoint_folder.name,
            commit_message=message,
            run_as_future=True,
            revision=self.args.hub_revision,
        )

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._tell_failed_pushes()

    def _tell_failed_pushes(self) -> None:
        """Log the errors of pushes that ran in the background, each once; nothing else reports them."""
        if getattr(self, "push_in_progress", None) is None:
            return
        done = [job for job in self.push_in_progress.jobs if job.done()]
        self.push_in_progress.jobs = [job for job in self.push_in_progress.jobs if job not in done]
        for problem in filter(None, (job.exception() for job in done)):
            logger.warning("A push to %s while training went on failed: %s", self.hub_model_id, problem)
