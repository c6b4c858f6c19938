"""Of the trainer, what goes to the Hub: the draft's folder as `publish_draft` sends it, with its own card."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..hub.model_card import facts_of_card, render_model_card
from ..hub.publish import CARD, publish_draft
from ..hub.run_facts import run_facts
from .checkpointed_trainer import CheckpointedTrainer


logger = logging.getLogger(__name__)


class PublishedTrainer(CheckpointedTrainer):
    """A `Trainer` that pushes what servers and readers need, and states only where `hub_strategy` asks for them.

    Attributes:
        card_facts (`dict`): fields of [`CardFacts`] that whoever starts the run knows better than the trainer.
    """

    card_facts: Mapping[str, object] = MappingProxyType({})

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the card of what this run knows by now; one that somebody edited is left alone."""
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

    def _publish(self, folder, message: str, token=None, revision=None, include=(), run_as_future=False):
        return publish_draft(
            folder,
            self.hub_model_id,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=message,
            include=include,
            run_as_future=run_as_future,
        )

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.push_to_hub and self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self._push_checkpoint(self._checkpoint_folder(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: `Trainer` calls this while the checkpoint's manifest, without which none resumes, is missing."""

    def _push_checkpoint(self, checkpoint_folder: Path) -> None:
        """Publish a checkpoint's draft while training goes on; with its states where the strategy says so."""
        strategy = self.args.hub_strategy
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            return
        self._tell_failed_pushes()
        folder, message = self.args.output_dir, f"Training in progress, step {self.state.global_step}"
        for path in (x for name in ("config.json", "*.safetensors") for x in checkpoint_folder.glob(name)):
            shutil.copy(path, folder)  # the checkpoint may be rotated away before it has been sent
        self.create_model_card()
        jobs = [self._publish(folder, message, run_as_future=True)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            jobs.append(self._push_states(checkpoint_folder, f"{message}, checkpoint"))
        if running:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._tell_failed_pushes()

    def _tell_failed_pushes(self) -> None:
        """Pushes run in the background, where nobody else would hear of an error."""
        if getattr(self, "push_in_progress", None) is None:
            return
        done = [job for job in self.push_in_progress.jobs if job.done()]
        self.push_in_progress.jobs = [job for job in self.push_in_progress.jobs if job not in done]
        for problem in filter(None, (job.exception() for job in done)):
            logger.warning("A push to %s while training went on failed: %s", self.hub_model_id, problem)

    def _push_states(self, checkpoint_folder: Path, message: str):
        """The whole checkpoint, to resume from, in a folder of the repository."""
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
