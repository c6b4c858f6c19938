"""`EagleTrainingArguments`: `transformers.TrainingArguments` with EAGLE's own."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from ..door.connection import read_key
from .bounds import Count, check_numbers
from .inherited import INHERITED
from .objective import EagleArguments
from .options import checkpointing_of, complete, refuse_unfit


@dataclass
class EagleTrainingArguments(EagleArguments, TrainingArguments):
    """Arguments of [`EagleTrainer`]: every field of `TrainingArguments` and of [`EagleArguments`].

    Defaults that differ from `TrainingArguments`: a cosine schedule from 1e-4 with AdamW betas (0.9, 0.95) and clipping
    at 0.5 as the EAGLE-3 authors train, logging every 10 steps, no search for unused parameters under DDP (a draft uses
    all of them at every step), and no hiding of a NaN loss.

    Raises:
        ValueError: for a value that is not allowed, before any work is done.

    Example:
        >>> EagleTrainingArguments(output_dir="outputs/draft", ttt_steps=5, bf16=True)
    """

    _argument_group_name = "training"
    _bounds: ClassVar = INHERITED

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradient clipping."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps (below 1: share of the run)."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Off: a draft uses all of them."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Off: a NaN loss is shown."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Checkpoint folder to continue from, or `last`: the newest complete one in `output_dir`."},
    )
    ignore_missing_state: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint without optimizer or schedule, which start over; this is logged."},
    )
    # transformers has this name since 5.24, and warns of the older one
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Keep less for the backward pass, and compute it again there: one checkpoint per TTT step.",
            "nargs": "?",
            "const": True,
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of `torch.utils.checkpoint`, as a JSON object."}
    )
    overwrite: bool = field(default=False, metadata={"help": "First delete what another run left in `output_dir`."})
    max_unsupervised_steps: Count = field(
        default=100,
        metadata={
            "help": "With `streaming`, stop after so many consecutive steps without a supervised row. Other data: "
            "after a whole epoch without one."
        },
    )

    def __post_init__(self):
        EagleArguments.__post_init__(self)
        check_numbers(self)
        refuse_unfit(self)
        self.hub_token = read_key(self.hub_token, "`hub_token`")

        self.names_output_dir = bool(self.output_dir)  # the library would name a folder of its own
        # the library refuses bf16 on a machine without an accelerator unless `use_cpu` is set
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.activation_checkpointing is not None:
            self.gradient_checkpointing = self.activation_checkpointing
        if self.activation_checkpointing_kwargs is not None:
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        complete(self)
        self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs = checkpointing_of(self)

        if self.accelerator_config.dispatch_batches is None:
            # each rank reads a stream itself: rank 0 cannot join its batches, which differ in length
            self.accelerator_config.dispatch_batches = False
