"""A recipe: the YAML file and the command line of a run, as argument groups, and what of them is refused at once."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments.groups import AdapterArguments, DataArguments, DraftArguments, DryRunArguments, TargetArguments
from ..arguments.objective import EagleArguments, refuse_other_methods
from ..arguments.parser import EagleArgumentParser


if TYPE_CHECKING:
    from ..arguments.training import EagleTrainingArguments

_OURS = (TargetArguments, DraftArguments, AdapterArguments, DataArguments, DryRunArguments)


@dataclass
class Recipe:
    """The arguments of scripts/train_eagle.py, a field a group.

    Example:
        >>> Recipe.parse(["--config", "training_args/smollm2-135m-eagle3.yaml"]).draft.draft_vocab_size
        4096
    """

    target: TargetArguments
    draft: DraftArguments
    adapter: AdapterArguments
    data: DataArguments
    dry_run: DryRunArguments
    training: "EagleTrainingArguments"

    @classmethod
    def parse(cls, args: list[str] | None = None, description: str | None = None) -> "Recipe":
        """Read a command line, its `--config` file included; `--help` is answered without loading torch.

        Args:
            args: words of the command line, the process's own when `None`.
            description: of `--help`.
        """
        args = sys.argv[1:] if args is None else args
        if "--help_all" in args:
            args = ["--help"]
        elif "--help" in args or "-h" in args:
            return EagleArgumentParser((*_OURS, EagleArguments), description=description).parse_args_and_config(args)
        from ..arguments.training import EagleTrainingArguments

        parser = EagleArgumentParser((*_OURS, EagleTrainingArguments), description=description)
        return cls(*parser.parse_args_and_config(args))

    def refuse_before_loading(self) -> Path | None:
        """Refuse what can be refused before anything is loaded or written.

        Returns:
            The checkpoint to resume from, `None` for a new run.

        Raises:
            FileExistsError: if `output_dir` holds another run.
            ValueError: for arguments that do not fit each other, or a checkpoint that cannot be resumed from.
        """
        from ..drafts.build import draft_class_of
        from .resuming import is_last, refuse_other_run, resolve_resume

        training, init_from = self.training, self.draft.init_from
        resume = resolve_resume(training.output_dir, training.resume_from_checkpoint, training.ignore_missing_state)
        if resume is None:
            refuse_other_run(training.output_dir, training.overwrite, is_last(training.resume_from_checkpoint))
        if self.data.streaming:
            self._refuse_with_streaming(resume)
        if init_from is not None:
            draft_class_of(init_from)
        elif self.adapter.use_peft:
            raise ValueError("`use_peft` trains an adapter on a draft that is there already: name it with `init_from`.")
        if self.adapter.use_peft and Path(init_from).resolve() == Path(training.output_dir).resolve():
            raise ValueError(
                f"`output_dir` {training.output_dir} is the draft that `init_from` names, which the adapter is added "
                "to whenever training goes on: choose another folder."
            )
        return resume

    def refuse_other_methods(self) -> None:
        """`ValueError` for an argument that means nothing to the kind of draft."""
        refuse_other_methods(self.draft.kind, self.target, self.draft, self.training)

    def _refuse_with_streaming(self, resume: Path | None) -> None:
        """`ValueError` for what needs the whole data at hand."""
        training, draft = self.training, self.draft
        if training.max_steps <= 0:
            raise ValueError("`streaming` data have no length: say with `max_steps` how long to train.")
        if training.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise ValueError(
                f"`train_sampling_strategy` is {training.train_sampling_strategy}, which needs every conversation's "
                "length: set it to random, or leave out `streaming`."
            )
        if draft.draft_vocab_size is not None and resume is None:
            raise ValueError(
                f"`draft_vocab_size` is {draft.draft_vocab_size}, but tokens of `streaming` data cannot be counted "
                "first: leave it out and prune the draft afterwards (scripts/prune_draft.py), or leave out `streaming`."
            )
