"""The draft on several ranks: wrapped at the right time, one unit under FSDP2, and checkpoints that do not show it.

A draft's `forward` runs the parts of its layer directly, so the whole draft is one root unit, gathered once a step.
What a checkpoint holds is what a replicated draft writes, so a run may go on under another number of ranks, under DDP
or alone, and back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME


def shard_draft(draft: nn.Module, accelerator) -> None:
    """Make a draft one FSDP2 unit, before there is an optimizer; its embeddings are spread too.

    Raises:
        ValueError: for a setting of accelerate's FSDP plugin that would write no checkpoint or lose weights.
    """
    plugin = accelerator.state.fsdp_plugin
    check_plugin(plugin)
    plugin.auto_wrap_policy = None  # accelerate would look for layers to wrap
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    offload = plugin.cpu_offload if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else OffloadPolicy()
    # float32 is gathered, and autocast computes in half precision, as under DDP: a policy of FSDP2's own would cast the
    # residual stream and the loss too
    fully_shard(draft, mesh=mesh, offload_policy=offload)
    # enters autocast, and tells an evaluation before training that nothing is to be wrapped any more
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
            "`gradient_checkpointing`."
        )


@contextmanager
def whole_draft(draft: nn.Module) -> Iterator[nn.Module]:
    """Inside, every rank has the draft's whole weights, so that its parts can be called outside of `forward`."""
    if not isinstance(draft, FSDPModule):
        yield draft
        return
    draft.unshard()
    try:
        yield draft
    finally:
        draft.reshard()


class DistributedDraft(Trainer):
    """Of a `Trainer`, what differs on several ranks: checkpoints of a draft under FSDP2 are a replicated draft's."""

    def evaluation_loop(self, *args, **kwargs):
        if self.args.world_size > 1 and not self.is_fsdp_enabled and self.model_wrapped is self.model:
            # wrapped for good: Trainer prepares a model for evaluation only, and after that `train` does not wrap it
            # (accelerate 1.15), so that replicas would drift apart
            self.model_wrapped = self.accelerator.prepare_model(self._wrap_model(self.model))
        return super().evaluation_loop(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.is_fsdp_enabled or self.args.should_save:  # all ranks have gathered, one writes
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = _whole_optimizer_state(self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        _set_optimizer_state(self.model, self.optimizer.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        _set_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_best_model()
        _set_weights(self.model, self.state.best_model_checkpoint)


def _set_weights(draft: nn.Module, folder: str | Path) -> None:
    weights = {name: x for path in Path(folder).glob("*.safetensors") for name, x in load_file(path).items()}
    # not strict: embeddings are the target's, and are never saved
    set_model_state_dict(draft, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def _whole_optimizer_state(draft: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `optimizer.state_dict()` would be of a replicated draft, on the first rank; all ranks must call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(draft, optimizer, options=options)
    if not state:
        return {}
    numbers = {name: i for i, name in enumerate(chain(*(group["params"] for group in state["param_groups"])))}
    return {
        "state": {numbers[name]: values for name, values in state["state"].items()},
        "param_groups": [{**g, "params": [numbers[name] for name in g["params"]]} for g in state["param_groups"]],
    }


def _set_optimizer_state(draft: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The other way."""
    name_of = {id(parameter): name for name, parameter in draft.named_parameters()}
    names = [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    named = {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [{**g, "params": [names[number] for number in g["params"]]} for g in state["param_groups"]],
    }
    set_optimizer_state_dict(draft, optimizer, named, options=StateDictOptions(full_state_dict=True))
