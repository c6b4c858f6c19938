"""Warn, when a run begins, of what its launcher was asked for and did not do."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import Trainer, TrainingArguments

from ..arguments.options import refuse_deepspeed
from ..arguments.yaml_files import read_yaml
from ..shipped import find_launch_config


logger = logging.getLogger(__name__)


def tell_launch(trainer: Trainer) -> None:
    """Warn on one rank of what this run does not do although its launcher was asked for it."""
    if trainer.is_world_process_zero():
        for told in told_of_launch(asked_to_shard(trainer.args), trainer.is_fsdp_enabled, trainer.args.world_size):
            logger.warning("%s", told)


def asked_to_shard(args: TrainingArguments) -> bool:
    """Whether the arguments or the config of `accelerate launch` ask for a draft sharded over the ranks."""
    return bool(args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true")


def told_of_launch(asked_to_shard: bool, sharded: bool, processes: int) -> Iterator[str]:
    """The warnings about a launch, as a run begins.

    Args:
        asked_to_shard: by the arguments, or by the launcher's config.
        sharded: whether the draft is.
        processes: of this run.
    """
    if asked_to_shard and not sharded and processes > 1:
        yield (
            "A sharded draft was asked for, but accelerate shards on accelerators only: here each of the "
            f"{processes} processes holds the whole draft, its gradient and its optimizer state, and the results are "
            "the same."
        )

    asked = asked_processes(_parent()) if processes == 1 else None
    if asked is not None and asked > 1:
        yield (
            f"`accelerate launch` was asked for {asked} processes and started one, as it does without an accelerator: "
            f"start with `torchrun --nproc-per-node {asked}` for {asked} processes on this machine's CPUs."
        )


def launch_of(config: str | None, args: TrainingArguments) -> tuple[int, bool]:
    """How many processes a launch starts on all machines, and whether it shards the draft over them.

    Args:
        config: launch config of accelerate, a path or the name of one of ours; `None` for this process's own launch.
        args: of the run.

    Raises:
        ValueError: naming the argument `launch_config`, if that is none.
    """
    if config is None:
        return max(asked_processes(_parent()) or 1, args.world_size), asked_to_shard(args)

    path = find_launch_config(config, "launch_config")
    fields = read_yaml(path, "launch_config")
    processes, kind = fields.get("num_processes"), fields.get("distributed_type")
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise ValueError(
            f"`launch_config` {path} must give `num_processes` as a whole number of at least 1, got {processes!r}: "
            "name a file that `accelerate config` writes."
        )
    if kind == "DEEPSPEED":
        refuse_deepspeed(f"`launch_config` {path}, whose `distributed_type` is DEEPSPEED,")
    return processes, asked_to_shard(args) or kind == "FSDP"


def asked_processes(command: Sequence[str]) -> int | None:
    """Processes that an `accelerate launch` command or its config asks for; `None` for another command."""
    words = _of_launch(command)
    if words is None:
        return None

    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        args, _ = launch_command_parser().parse_known_args(words)
        if args.num_processes is not None:
            return args.num_processes
        if args.config_file is None and (args.cpu or not Path(default_config_file).is_file()):
            return None
        return load_config_from_file(args.config_file).num_processes
    except (Exception, SystemExit):
        return None  # the launcher has already reported the error


def _of_launch(command: Sequence[str]) -> list[str] | None:
    """The arguments of `accelerate launch` in a command, however it was started; `None` for another command."""
    for place, word in enumerate(command):
        name = Path(word).name
        if name in ("accelerate-launch", "accelerate.commands.launch") or word.endswith(
            "accelerate/commands/launch.py"
        ):
            return list(command[place + 1 :])

        if name == "launch" and place and "accelerate" in command[place - 1]:
            return list(command[place + 1 :])
    return None


def _parent() -> list[str]:
    """The command line of the process that started this one; `[]` if the system does not say."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [os.fsdecode(word) for word in words[:-1]]
