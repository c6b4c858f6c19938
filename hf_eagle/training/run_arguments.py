"""The settings of a run, read from its YAML file and command line, and checked before anything is loaded.

Imports that load torch are inside the functions, so that `--help` does not wait for it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments.groups import AdapterArguments, DataArguments, DraftArguments, DryRunArguments, TargetArguments
from ..arguments.objective import parser_beside_trainer, refuse_other_methods
from ..arguments.parser import EagleArgumentParser, asks_for_help
from ..arguments.paths import check_data_paths, check_draft_folder, check_training_paths, paths_read
from ..door.inputs import check_folder, check_target, naming


if TYPE_CHECKING:
    from ..arguments.training import EagleTrainingArguments

# the groups besides `EagleTrainingArguments`
_GROUPS = (TargetArguments, DraftArguments, AdapterArguments, DataArguments, DryRunArguments)


@dataclass
class RunArguments:
    """The arguments of scripts/train_eagle.py, one field per group.

    Example:
        >>> RunArguments.parse(["--config", "training_args/smollm2-135m-eagle3.yaml"]).draft.draft_vocab_size
        4096
    """

    target: TargetArguments
    draft: DraftArguments
    adapter: AdapterArguments
    data: DataArguments
    dry_run: DryRunArguments
    training: "EagleTrainingArguments"

    @classmethod
    def parse(cls, args: list[str] | None = None, description: str | None = None) -> "RunArguments":
        """Read a command line, including its `--config` file; `--help` loads no torch.

        Args:
            args: words of the command line; `sys.argv[1:]` if `None`.
            description: the text at the top of `--help`.
        """
        args = sys.argv[1:] if args is None else args
        if "--help_all" in args:  # the help of the full parser, with every argument of transformers
            args = ["--help"]
        elif asks_for_help(args):
            parser_beside_trainer(_GROUPS, description, for_help=True).parse_args_and_config(args)
        return cls(*cls.parser(description).parse_args_and_config(args))

    @classmethod
    def parser(cls, description: str | None = None) -> EagleArgumentParser:
        """Make the full parser of the command line, with every argument of transformers. This loads torch."""
        return parser_beside_trainer(_GROUPS, description)

    def check_paths(self, writes_features: bool = False) -> None:
        """Check that every input can be read, and that no output overwrites what the run does not own.

        Args:
            writes_features: whether the run only writes `feature_store`, and trains no draft.

        Raises:
            FileExistsError: if `output_dir` holds a model that is no draft of ours.
            ValueError: if another path cannot be used; the message names its argument.
        """
        from ..store.feature_store import check_store, check_store_to_write
        from .resuming import is_last, resolve_resume

        training, store = self.training, self.data.feature_store
        if self.dry_run.dry_run:
            check_target("target", self.target.target, self.target.gguf_file)
            return

        check_data_paths(self.target, self.data)
        if not writes_features:
            check_training_paths(self.data, self.draft)

        # no output may lie where an input is
        inputs = paths_read(self.target, self.data, self.draft)
        resume = training.resume_from_checkpoint
        inputs["resume_from_checkpoint"] = None if is_last(resume) else resume

        # a checkpoint that is named must exist; "last" and "false" name none
        if not writes_features and resume not in (None, "false") and not is_last(resume):
            check_folder("resume_from_checkpoint", resume)
            with naming("resume_from_checkpoint"):
                resolve_resume(training.output_dir, resume, training.ignore_missing_state)

        if store is not None and (writes_features or self.data.cache_mode == "first_epoch"):
            check_store_to_write(store, inputs)
        elif store is not None:
            check_store(store)

        # an earlier run may lie there: `refuse_before_loading` decides whether it is continued, replaced or refused
        if not writes_features:
            check_draft_folder("output_dir", training.output_dir, inputs | {"feature_store": store}, overwrite=True)

    def refuse_before_loading(self) -> Path | None:
        """Check all that can be checked before anything is loaded or written.

        Returns:
            The checkpoint to resume from, `None` for a new run.

        Raises:
            FileExistsError: if `output_dir` holds another run.
            OSError: if the draft will be pushed and the Hub does not answer.
            ValueError: if arguments do not fit each other, or the checkpoint cannot be resumed from.
        """
        from ..arguments.options import refuse_unavailable
        from ..data.reads import what_is_read
        from ..hub.reach import check_reachable
        from .distributed import check_offload
        from .feasible import check_draft_attention, check_evaluations
        from .resuming import is_last, refuse_other_run, resolve_resume
        from .stream_place import check_reading, check_same_data

        training, init_from = self.training, self.draft.init_from
        if not training.names_output_dir:
            raise ValueError("`output_dir` names no folder: set it to the one that the draft is written to.")

        # what is installed, and whether the arguments fit each other
        self.refuse_missing_kernels()
        self._refuse_beside_server()
        check_draft_attention(self.draft, training)
        check_evaluations(self.data, training, self.draft.kind.metrics)
        refuse_unavailable(training)
        check_offload(bool(training.fsdp and training.fsdp_config.get("cpu_offload")))

        # the folder is free, or holds the checkpoint to continue from, which read the same data
        resume = resolve_resume(training.output_dir, training.resume_from_checkpoint, training.ignore_missing_state)
        if resume is None:
            refuse_other_run(training.output_dir, training.overwrite, is_last(training.resume_from_checkpoint))
        elif not training.ignore_data_skip:
            check_reading(resume, self.data.streaming, argument="streaming")
            if self.data.streaming:
                check_same_data(resume, what_is_read(self.data.train_data, self.data.data_weights))

        if self.data.streaming:
            self._check_streaming(resume)
        if init_from is None and self.adapter.use_peft:
            raise ValueError("`use_peft` trains an adapter on an existing draft: name that draft with `init_from`.")
        self._refuse_other_kind(resume)

        if training.push_to_hub:
            check_reachable(training.hub_model_id, training.output_dir, training.hub_token)
        return resume

    def refuse_missing_kernels(self) -> None:
        """Raise `ValueError` if the target's `attn_implementation` is not installed."""
        from ..arguments.devices import check_attention

        check_attention("attn_implementation", self.target.attn_implementation)

    def refuse_other_methods(self) -> None:
        """Raise `ValueError` if an argument is given that this kind of draft does not use."""
        refuse_other_methods(self.draft.kind, self.target, self.draft, self.training)

    def _refuse_beside_server(self) -> None:
        """Raise `ValueError` if an argument needs the layers of a target that a server runs."""
        if self.target.target_url is not None and self.data.acceptance_prompts is not None:
            raise ValueError(
                "`acceptance_prompts` are decoded with the whole target, whose layers run in the server that "
                "`target_url` names: leave them out, follow `estimated_acceptance_length`, and measure the draft "
                "afterwards with `hf-eagle evaluate` or `hf-eagle benchmark-serving`."
            )

    def _refuse_other_kind(self, resume: Path | None) -> None:
        """Raise `ValueError` if a draft to continue or to start from is of another kind than the one to train."""
        from ..drafts.build import draft_class_of
        from ..drafts.kinds import architectures_of, find_kind

        named = {"resume_from_checkpoint": (resume, [] if resume is None else architectures_of(resume))}
        if self.draft.init_from is not None:
            path = self.draft.init_from
            named["init_from"] = path, [draft_class_of(path, "init_from").__name__]

        for argument, (path, names) in named.items():
            found = find_kind(names)
            if found is not None and found[0] != self.draft.kind:
                raise ValueError(
                    f"`method` is {self.draft.method} but `{argument}` {path} was trained with "
                    f"{next(iter(found[0].methods))}: keep that `method`, or start a new draft without `{argument}`."
                )

    def _check_streaming(self, resume: Path | None) -> None:
        """Raise `ValueError` if an argument needs all the data at once, which a stream does not have."""
        training, draft = self.training, self.draft
        if training.max_steps <= 0:
            raise ValueError("`streaming` data have no length: set `max_steps` to the number of steps to train.")

        if training.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise ValueError(
                f"`train_sampling_strategy` is {training.train_sampling_strategy}, which needs every conversation's "
                "length: set it to `random`, or leave out `streaming`."
            )

        if draft.draft_vocab_size is not None and resume is None:
            raise ValueError(
                f"`draft_vocab_size` is {draft.draft_vocab_size}, but `streaming` data cannot be counted first: prune "
                "the draft after training instead (scripts/prune_draft.py), or leave out `streaming`."
            )
