"""Refuse options of `transformers.TrainingArguments` that cannot work, before anything is loaded.

`refuse_unfit` refuses what is wrong on any machine, when the arguments are made. `refuse_unavailable` refuses what this
machine lacks, such as a package, when a run begins: so a recipe can be read on a machine that cannot run it.
"""

import inspect
import json
import math
import os
import re
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any, NoReturn, get_args, get_type_hints

import torch
from torch.distributed import DistError
from transformers import TrainingArguments

from ..door.names import check_branch


# options with few allowed values, which the library does not declare as such
_CHOICES = {
    "log_level": ("debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": ("debug", "info", "warning", "error", "critical", "passive"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no", True, False),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver", None),
}
# options that have no effect on a draft's training, or make it fail
_MEANINGLESS = {
    "neftune_noise_alpha": "a draft has no embeddings of its own that noise could be added to",
    "use_liger_kernel": "Liger has no kernels for drafts",
    "label_smoothing_factor": "a draft is compared with the target's own distribution, which is not smoothed",
}
_COMPILED = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
_JSON = (
    *("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
    *("accelerator_config", "fsdp_config", "deepspeed"),
)
_JSON_OR_FILE = _JSON[3:]
# environment variables that launchers set for the ranks they start
_RANKS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_NTASKS")


def refuse_unfit(args: TrainingArguments) -> None:
    """Raise `ValueError` for an option that works on no machine; called before the library checks the arguments."""
    _refuse_other_choices(args)

    if args.neftune_noise_alpha == 0:  # no noise, but the library would ask a draft for embeddings to add it to
        args.neftune_noise_alpha = None

    for name, why in _MEANINGLESS.items():
        if getattr(args, name, None):
            raise ValueError(f"`{name}` is {getattr(args, name)}, but {why}: leave it out.")

    compiled = next((name for name in _COMPILED if getattr(args, name, None)), None)
    if compiled is not None:
        raise ValueError(
            f"`{compiled}` cannot work: a draft's unroll follows the answers of each batch, so it has no one "
            "graph to compile (torch 2.13 fails on it); leave it out, and use `compile_target` for the target."
        )

    for name in _JSON:
        _check_json(name, getattr(args, name, None))
    by_launcher = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if args.deepspeed or by_launcher:
        refuse_deepspeed("`deepspeed`" if args.deepspeed else "The launch config's `distributed_type` DEEPSPEED")

    if args.dataloader_num_workers == 0:
        for name in (
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
        ):
            if getattr(args, name, None):
                raise ValueError(
                    f"`{name}` is {getattr(args, name)}, but there are no workers: set `dataloader_num_workers` to 1 "
                    "or more, or leave it out."
                )

    if args.parallelism_config is not None and not hasattr(args.parallelism_config, "get_device_mesh"):
        raise ValueError("`parallelism_config` must be an `accelerate.ParallelismConfig`: give it from Python.")

    if args.ddp_backend is not None and not any(name in os.environ for name in _RANKS):
        raise ValueError(
            f"`ddp_backend` is {args.ddp_backend}, but this is one process: start several with torchrun or "
            "`accelerate launch`, or leave it out."
        )

    check_branch("hub_revision", args.hub_revision)
    if args.hub_model_id is not None:
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(args.hub_model_id)
        except HFValidationError:
            raise ValueError(
                f"`hub_model_id` {args.hub_model_id!r} is no name of a repository: write `you/your-draft`, of letters, "
                "digits, dots, hyphens and underscores."
            ) from None


def refuse_deepspeed(asked: str) -> NoReturn:
    """`ValueError` about what asked for DeepSpeed."""
    raise ValueError(
        f"{asked} cannot train a draft: ZeRO's stage 3 takes apart the target too, and in half precision every stage "
        "rounds the frequencies of RoPE. Shard the draft with FSDP2, as `training_args/accelerate/fsdp2.yaml` does."
    )


def _refuse_other_choices(args: TrainingArguments) -> None:
    """Raise `ValueError` for a text that is not one of the values its option takes."""
    choices = dict(_CHOICES)
    for name, hint in get_type_hints(TrainingArguments).items():
        kinds = [kind for kind in (hint, *get_args(hint)) if inspect.isclass(kind) and issubclass(kind, Enum)]
        if kinds:
            choices[name] = tuple(choice.value for choice in kinds[0])

    for name, allowed in choices.items():
        value = getattr(args, name, None)
        value = getattr(value, "value", value)
        if hasattr(args, name) and value not in allowed:
            told = ", ".join(choice for choice in allowed if isinstance(choice, str))
            raise ValueError(f"`{name}` must be one of {told}, got {value!r}.")

    from transformers.debug_utils import DebugOption

    known = [option.value for option in DebugOption]
    for option in args.debug.split() if isinstance(args.debug, str) else args.debug or ():
        if getattr(option, "value", option) not in known:
            raise ValueError(f"`debug` must be of {', '.join(known)}, got {option!r}.")


def _check_json(name: str, value: Any) -> None:
    """Raise `ValueError` for a text that is neither a JSON object nor, if allowed, the name of a file."""
    if not isinstance(value, str):
        return

    if value.startswith("{"):
        try:
            json.loads(value)
        except (ValueError, RecursionError) as problem:
            raise ValueError(f"`{name}` is not JSON: {problem}.") from None
    elif name not in _JSON_OR_FILE:
        raise ValueError(f"`{name}` must be a JSON object, such as '{{\"name\": 1}}', got {value!r}.")
    elif not os.path.isfile(value):
        raise ValueError(f"`{name}` names {value}, which is no file: correct the path, or write a JSON object.")


def checkpointing_of(args: TrainingArguments) -> dict[str, Any] | None:
    """What `torch.utils.checkpoint` is told besides its default, never to be reentrant; `None` for nothing.

    Raises:
        ValueError: if it is told to be.
    """
    given = args.gradient_checkpointing_kwargs  # the name that every version of transformers reads
    if given and given.get("use_reentrant"):
        raise ValueError(
            "`activation_checkpointing_kwargs` sets `use_reentrant`, but a draft cannot be trained with reentrant "
            "checkpoints, since its first inputs, the target's features, carry no gradient: leave it out."
        )
    return given and {**given, "use_reentrant": False}


def complete(args: TrainingArguments) -> None:
    """Run the library's own `__post_init__`, in which ranks meet; its errors are given the name of the argument.

    Raises:
        ConnectionError: if another rank ended while they met.
        ValueError: naming the arguments that the library mentions, or those that were set if it names none.
    """
    # a rank that has met all others waits until all have: if it ended earlier, they would wait for half an hour
    os.environ.setdefault("TORCH_DIST_INIT_BARRIER", "1")

    given = [known.name for known in fields(args) if _was_set(args, known)]
    try:
        TrainingArguments.__post_init__(args)
    except DistError as problem:
        said = "This rank lost another rank while they connected: look at what that one printed before it ended."
        raise ConnectionError(said) from problem
    except (ArithmeticError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as problem:
        said = _of(problem)
        words = re.findall(r"\w+", said.lower())

        # an error may name a class in place of its argument, as AcceleratorConfig for `accelerator_config`
        named = [name for name in given if name in words or name.replace("_", "") in words] or given
        raise ValueError(f"{', '.join(f'`{name}`' for name in named)} cannot be as given: {said}.") from problem


def _was_set(args: TrainingArguments, known) -> bool:
    default = known.default_factory() if known.default_factory is not MISSING else known.default
    return known.name not in ("output_dir", "use_cpu") and getattr(args, known.name) != default


def refuse_unavailable(args: TrainingArguments) -> None:
    """Raise `ValueError` for an option that needs something this machine lacks, or that its own library refuses.

    The library itself is tried with the option, as it will be when training begins.
    """
    _check_reports(args)
    _check_optimizer(args)
    _check_schedule(args)

    if args.fsdp and args.parallel_mode.value != "distributed":
        raise ValueError("`fsdp` shards a draft over ranks, but this is one process: start several, or leave it out.")

    if args.push_to_hub:
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise ValueError("`push_to_hub` cannot work while HF_HUB_OFFLINE is set: unset that, or leave this out.")
        if args.hub_token is None and get_token() is None:
            raise ValueError("`push_to_hub` needs a token of the Hub: run `hf auth login`, or give `hub_token`.")


def _check_reports(args: TrainingArguments) -> None:
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    for name in args.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except Exception as problem:
            raise ValueError(f"`report_to` names {name}, which cannot be used here: {_of(problem)}.") from problem


def _check_optimizer(args: TrainingArguments) -> None:
    from transformers import Trainer

    if args.optim.value in ("adamw_torch", "adamw_torch_fused") and not args.optim_args:
        return
    names = f"`optim` {args.optim.value}" + (f" with `optim_args` {args.optim_args}" if args.optim_args else "")

    # these inspect the model's modules, but the model does not exist yet
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4)})
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if made.__module__.startswith("torch.") and "optimizer_dict" not in options:
            made(model.parameters(), **options)
    except Exception as problem:
        raise ValueError(f"{names} cannot be used here: {_of(problem)}.") from problem


def _check_schedule(args: TrainingArguments) -> None:
    from transformers import get_scheduler

    options = dict(args.lr_scheduler_kwargs or {})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=max(args.learning_rate, 1e-12))
    try:
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=options)
        for factor in getattr(schedule, "lr_lambdas", ()):  # some options are used only later on
            for step in range(11):
                if not math.isfinite(factor(step)):
                    raise ValueError(f"the rate of step {step} is not a finite number")
    except Exception as problem:
        raise ValueError(
            f"`lr_scheduler_type` {args.lr_scheduler_type.value} does not go with `lr_scheduler_kwargs` {options}: "
            f"{_of(problem)}."
        ) from problem


def _of(problem: Exception) -> str:
    """Return a library's error text as one line."""
    return " ".join(str(problem).split()).rstrip(".") or type(problem).__name__
