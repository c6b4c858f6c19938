"""Publish a training run to the Hub, while it runs and at its end."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..door.writing import link_or_copy, replaced
from ..hub.model_card import is_edited, render_model_card
from ..hub.publish import publish_draft
from ..hub.reach import reaching_hub
from ..hub.run_facts import run_facts


logger = logging.getLogger(__name__)

# holds, in the run's folder, what uploads in the background read: training replaces and deletes the originals
PUSHING = ".pushing"


class PublishingMixin:
    """Publishes what servers and readers need; optimizer states only if `hub_strategy` asks for them.

    Attributes:
        card_facts (`dict`): fields of [`CardFacts`] that the run's script knows better than the trainer.
    """

    card_facts: Mapping[str, object] = MappingProxyType({})

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in `Trainer`; `OSError` if the Hub cannot be reached."""
        if private is not None:
            self.args.hub_private_repo = private  # `Trainer` takes it as an argument only since transformers 5.23
        with reaching_hub(self.args.hub_model_id or Path(self.args.output_dir).absolute().name):
            super().init_hf_repo(token=token)
        self._forget_pushed()  # of a killed run

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the card from what this run knows so far; keep a card that a person edited."""
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero() and not is_edited(folder):
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
        self.refuse_broken()
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()  # it reads what is saved next
        self.save_model(_internal_call=True)  # on all ranks
        if not self.is_world_process_zero():
            return None

        self.create_model_card(**kwargs)
        return self._publish(self.args.output_dir, commit_message, token, revision, run_as_future=not blocking)

    def _publish(self, folder, message: str, token=None, revision=None, **how):
        return publish_draft(
            folder,
            self.hub_model_id,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=message,
            **how,
            leave_out_broken=True,  # a stray file in this folder must not end training
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: `Trainer` calls this before the checkpoint has its manifest, and cannot be resumed from yet."""

    def _push_checkpoint(self, checkpoint_folder: Path) -> None:
        """Publish a checkpoint's draft while training continues; with its states if `hub_strategy` says so."""
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            return
        self._tell_failed_pushes()

        folder, message = Path(self.args.output_dir), f"Training in progress, step {self.state.global_step}"
        for path in (x for name in ("config.json", "*.safetensors") for x in checkpoint_folder.glob(name)):
            with replaced(folder / path.name) as part:  # an upload may still read the old one
                shutil.copy(path, part)
        self.create_model_card()

        pushing = folder / PUSHING / checkpoint_folder.name
        jobs = [self._publish(folder, message, run_as_future=True, frozen_in=pushing / "draft")]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            jobs.append(self._push_states(checkpoint_folder, pushing / "states", f"{message}, checkpoint"))

        if running:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _push_states(self, checkpoint_folder: Path, frozen: Path, message: str):
        """Upload the whole checkpoint, to resume from, into a folder of the repository."""
        from huggingface_hub import HfApi

        last = self.args.hub_strategy == HubStrategy.CHECKPOINT
        shutil.copytree(checkpoint_folder, frozen, copy_function=link_or_copy)
        job = HfApi(token=self.args.hub_token).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=frozen,
            path_in_repo="last-checkpoint" if last else checkpoint_folder.name,
            commit_message=message,
            run_as_future=True,
            revision=self.args.hub_revision,
        )
        job.add_done_callback(lambda _: shutil.rmtree(frozen, ignore_errors=True))
        return job

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._tell_failed_pushes()
        self._forget_pushed()

    def _forget_pushed(self) -> None:
        if self.is_world_process_zero():
            shutil.rmtree(Path(self.args.output_dir) / PUSHING, ignore_errors=True)

    def _tell_failed_pushes(self) -> None:
        """Log the errors of pushes in the background, each once; nothing else reports them."""
        if getattr(self, "push_in_progress", None) is None:
            return

        done = [job for job in self.push_in_progress.jobs if job.done()]
        self.push_in_progress.jobs = [job for job in self.push_in_progress.jobs if job not in done]

        for problem in filter(None, (job.exception() for job in done)):
            logger.warning("A push to %s while training went on failed: %s", self.hub_model_id, problem)
