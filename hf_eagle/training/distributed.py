"""The draft on several ranks: one unit under FSDP2, wrapped in time under DDP, saved as if on one rank, and the end.

A draft's `forward` runs the parts of its layer directly, so the whole draft is one root unit, gathered once a step.
A checkpoint holds what a replicated draft writes. So a run may continue on another number of ranks, under DDP or on a
single one, and back.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard


def shard_draft(draft: nn.Module, accelerator) -> None:
    """Make a draft one FSDP2 unit, before the optimizer is made; its embeddings are sharded too.

    Raises:
        ValueError: for a setting of accelerate's FSDP plugin that would write no checkpoint, or lose weights.
    """
    plugin = accelerator.state.fsdp_plugin
    check_plugin(plugin)
    check_offload(bool(plugin.cpu_offload))

    plugin.auto_wrap_policy = None  # otherwise accelerate looks for layers to wrap
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    offload = plugin.cpu_offload if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else OffloadPolicy()

    # as under DDP, gather float32 and let autocast compute in half precision: FSDP2's own policy would also cast the
    # residual stream and the loss
    fully_shard(draft, mesh=mesh, offload_policy=offload)

    # enters autocast, and keeps an evaluation before training from wrapping the draft again
    accelerator.prepare_model(draft, device_placement=False, evaluation_mode=True)


def check_plugin(plugin) -> None:
    """Refuse settings of accelerate's FSDP plugin (`fsdp_config`) under which a draft cannot be trained or saved.

    Raises:
        ValueError: naming the setting.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(f"`fsdp_version` is {plugin.fsdp_version}: a draft is trained under FSDP2 only; set it to 2.")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"`fsdp_state_dict_type` is {plugin.state_dict_type}: checkpoints would hold no draft that a server loads; "
            "set it to FULL_STATE_DICT."
        )

    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading` is true: it would zero draft and target on every rank but the first; set "
            "it to false."
        )

    if plugin.activation_checkpointing:
        raise ValueError(
            "`fsdp_activation_checkpointing` finds no layers in a draft: set it to false, and use "
            "`activation_checkpointing`."
        )


def check_offload(offloads: bool) -> None:
    """Refuse a draft whose shards lie in main memory if nothing connects the ranks there.

    Raises:
        ValueError: naming the setting and the backends.
    """
    backends = dist.get_backend_config() if offloads and dist.is_initialized() else "cpu:gloo"
    if "cpu:" not in backends:
        raise ValueError(
            "`cpu_offload` in `fsdp_config` keeps the gradient in main memory, but these ranks are connected by "
            f"{backends} alone, which sums nothing there: start with `accelerate launch`, which connects them by gloo "
            "too if its config says `fsdp_offload_params: true`, or set it to false."
        )


@contextmanager
def whole_draft(draft: nn.Module) -> Iterator[nn.Module]:
    """Give every rank the draft's whole weights inside the block, so that its parts can run outside `forward`."""
    if not isinstance(draft, FSDPModule):
        yield draft
        return

    draft.unshard()
    try:
        yield draft
    finally:
        draft.reshard()


def wrap_before_evaluation(trainer) -> None:
    """Wrap the draft of a `Trainer` for training, so that an evaluation before training cannot wrap it differently."""
    if trainer.args.world_size > 1 and not trainer.is_fsdp_enabled and trainer.model_wrapped is trainer.model:
        # Trainer would prepare the draft only for evaluation, and `train` would not wrap it again (accelerate 1.15), so
        # that replicas would drift apart
        trainer.model_wrapped = trainer.accelerator.prepare_model(trainer._wrap_model(trainer.model))


def set_weights(draft: nn.Module, folder: str | Path) -> None:
    """Give a draft the weights of a folder; under FSDP2 every rank must call this."""
    stored = {name: x for path in Path(folder).glob("*.safetensors") for name, x in load_file(path).items()}
    own = {draft.name_in_folder(name): name for name in draft.state_dict()}
    weights = {own.get(name, name): x for name, x in stored.items()}
    if not isinstance(draft, FSDPModule):
        draft.load_state_dict(weights, strict=False)
        return

    # not strict: embeddings are the target's, and are never saved
    set_model_state_dict(draft, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def whole_optimizer_state(draft: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The `optimizer.state_dict()` of a replicated draft, on the first rank; every rank must call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(draft, optimizer, options=options)
    if not state:
        return {}

    # a replicated draft's optimizer numbers its parameters, this one names them
    numbers = {name: i for i, name in enumerate(chain(*(group["params"] for group in state["param_groups"])))}
    return {
        "state": {numbers[name]: values for name, values in state["state"].items()},
        "param_groups": [{**g, "params": [numbers[name] for name in g["params"]]} for g in state["param_groups"]],
    }


def set_optimizer_state(draft: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give a draft's optimizer under FSDP2 what `whole_optimizer_state` returned; every rank must call this."""
    name_of = {id(parameter): name for name, parameter in draft.named_parameters()}
    names = [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    named = {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [{**g, "params": [names[number] for number in g["params"]]} for g in state["param_groups"]],
    }

    set_optimizer_state_dict(draft, optimizer, named, options=StateDictOptions(full_state_dict=True))


def leave(status: int = 0) -> None:
    """End this process, if it is one of several ranks and failed, or gloo connects them; call it as the last line.

    All ranks meet once more, then each exits without tearing Python down: gloo's threads sometimes abort or hang the
    interpreter (torch 2.13), when everything is already saved. A rank that failed waits for no other, whatever connects
    them: torn down, it could wait for a collective that the others never join, and the launcher for it.

    Args:
        status: of the process; not 0 if it failed.
    """
    if not dist.is_initialized() or not (status or dist.get_backend() == "gloo"):
        return

    if not status:
        dist.barrier()

    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
