"""`EagleTrainingArguments`: `transformers.TrainingArguments` with what is EAGLE's own."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .objective import EagleArguments
from .parser import at_least_one


@dataclass
class EagleTrainingArguments(EagleArguments, TrainingArguments):
    """Arguments of [`EagleTrainer`]: every field of `TrainingArguments` and of [`EagleArguments`].

    Defaults that differ from `TrainingArguments`: a cosine schedule from 1e-4 with AdamW betas (0.9, 0.95) and clipping
    at 0.5 as the EAGLE-3 authors train, logging every 10 steps, no search for unused parameters under DDP (a draft uses
    all of them at every step), and no hiding of a NaN loss.

    Raises:
        ValueError: for a value that does not fit, before any work is done.

    Example:
        >>> EagleTrainingArguments(output_dir="outputs/draft", ttt_steps=5, bf16=True)
    """

    _argument_group_name = "training"

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradient clipping."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps (below 1: share of all)."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "A draft uses all of them."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A NaN loss stops the run."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "`last` continues from the newest complete checkpoint in `output_dir`, or a checkpoint folder."
        },
    )
    ignore_missing_state: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint without optimizer or schedule, which begin anew; it is said."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete what another run left in `output_dir` first."})
    max_unsupervised_steps: int = field(
        default=100,
        metadata={
            "help": "Stop after so many steps in a row without a supervised row, where data are a stream; other data "
            "stop after a whole epoch."
        },
    )

    def __post_init__(self):
        EagleArguments.__post_init__(self)
        at_least_one(self, "max_unsupervised_steps")
        # bf16 on a machine without an accelerator needs `use_cpu` said aloud
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        TrainingArguments.__post_init__(self)
        if self.accelerator_config.dispatch_batches is None:
            # each rank reads a stream itself: rank 0 cannot join its batches, which differ in length
            self.accelerator_config.dispatch_batches = False
        if self.torch_compile:
            raise ValueError(
                "`torch_compile` cannot work: a draft's unroll follows the answers of each batch, so it has no one "
                "graph to compile (torch 2.13 fails on it); leave it out, and use `compile_target` for the target."
            )
