"""A frozen target that is spread over ranks: which ranks run it together, and which spread weights are refused.

`transformers` itself loads (`from_pretrained(distributed_config=...)`, see `shard_layout.py`): every rank reads its
share of each weight from the files, and none ever holds the whole model. FSDP2 units are each decoder layer, the
embedding, and the final norm with the head. All else, for instance a vision tower, stays in the root unit: as units of
their own, its blocks would wait for each other as soon as one rank has images and another has none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def check_weights(model: PreTrainedModel) -> None:
    """Refuse a target that would silently train a draft on nonsense.

    Raises:
        ValueError: for weights on the meta device, zeroed ones, or ones that are only in part distributed.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "The target still has weights on the meta device, so it would teach random numbers: load it with "
            "`from_pretrained` before handing it over."
        )

    embedding = model.get_input_embeddings().weight
    local = embedding.to_local() if isinstance(embedding, DTensor) else embedding
    if local.numel() and not local.any():
        raise ValueError(
            "The target's input embedding is all zeros on this rank, as `fsdp_cpu_ram_efficient_loading` leaves it: "
            "set that to false, and load the target on every rank."
        )

    plain = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    spread = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    by_plan = getattr(model, "is_distributed_loading_by_transformers", False)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]

    if plain and spread and (units or not by_plan):
        raise ValueError(
            f"The target's weights are of two kinds, {spread[0]} is a DTensor and {plain[0]} a plain tensor: shard the "
            "whole model, its root too, or load it with `target_sharding`."
        )

    if units and not isinstance(model, FSDPModule):
        raise ValueError(
            "Parts of the target are sharded by FSDP2 but its root is not: call `fully_shard` on the whole model, not "
            "on the decoder inside."
        )

    _check_units(model, units)


def _check_units(model: PreTrainedModel, units: list[FSDPModule]) -> None:
    allowed = {*model.get_decoder().modules(), model, model.get_input_embeddings(), model.get_output_embeddings()}
    for name, module in model.named_modules():
        if module in units and module not in allowed:
            raise ValueError(
                f"The target's {name} is an FSDP2 unit of its own, outside of the decoder: ranks would wait for each "
                "other as soon as one has images and another none. Leave it in the root unit."
            )


@dataclass
class TargetSharding:
    """Which ranks hold one target between them, and what they must do together.

    Attributes:
        mode: `"fsdp2"`, `"tensor"` or `"expert"`.
        group: neighbouring ranks that together hold one whole target; all run it equally often.
        device: where this rank runs it; its shards may be in main memory.
        units: FSDP2 units; without a backward, the last ones stay gathered after a forward.
    """

    mode: str
    group: dist.ProcessGroup
    device: torch.device
    units: list[FSDPModule]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "TargetSharding | None":
        """Read from a model; `None` for one that each rank holds whole."""
        spread = next((parameter for parameter in model.parameters() if isinstance(parameter, DTensor)), None)
        if spread is None:
            return None

        config = getattr(model.config, "distributed_config", None)
        if config is None:  # somebody's own `fully_shard`
            mode, size = "fsdp2", spread.device_mesh.shape[-1]
        else:
            mode = "tensor" if config.tp_size > 1 else "expert" if config.ep_size > 1 else "fsdp2"
            size = config.fsdp_size * config.tp_size

        device_type, device = spread.device_mesh.device_type, torch.device("cpu")
        if device_type != "cpu":
            device = torch.device(device_type, torch.accelerator.current_device_index())

        names = ("replica", "member")
        mesh = dist.init_device_mesh(device_type, (dist.get_world_size() // size, size), mesh_dim_names=names)
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        return cls(mode, mesh["member"].get_group(), device, units)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def member(self) -> int:
        """This rank's index among those that hold the same copy of the target."""
        return dist.get_rank(self.group)

    @property
    def replica(self) -> int:
        """Return the index of the copy of the target that this rank holds a part of."""
        return dist.get_rank() // self.size

    @property
    def replicas(self) -> int:
        return dist.get_world_size() // self.size

    def run(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Run `forward(**inputs)` for each rank with its own inputs; every rank of the group must call.

        Ranks of a tensor-parallel target need the same tokens, so they take turns: all run the batch of one, and only
        that one keeps the result. With a cache, all ranks of a group decode alike, and take the first rank's result:
        a tie rounded differently on two ranks would part them for good.
        """
        if inputs.get("use_cache"):
            result = forward(**inputs)
            tensors = {name: x for name, x in vars(result).items() if isinstance(x, torch.Tensor)}
            for name, x in tensors.items():
                setattr(result, name, self._sent(x, x.shape, x.dtype, 0))
            return result

        if self.mode != "tensor":
            return forward(**inputs)

        result = None
        for turn in range(self.size):
            seen = forward(**self._share(inputs, turn))
            if turn == self.member:
                result = seen

        return result

    def _share(self, inputs: dict[str, Any], turn: int) -> dict[str, Any]:
        """The inputs of the group's rank `turn`, on all of its ranks."""
        forms = [{name: _form(x) for name, x in inputs.items()}]
        dist.broadcast_object_list(forms, group_src=turn, group=self.group)
        shared = {}

        for name, (value, shape, dtype) in forms[0].items():
            if dtype is not None:
                value = self._sent(inputs.get(name), shape, dtype, turn)
            shared[name] = value

        return shared

    def _sent(self, x: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype, turn: int) -> torch.Tensor:
        """A tensor of the group's rank `turn`, on all of its ranks.

        A collective copies memory as it lies, and ignores the strides of a view (an expanded one is shorter than it
        looks). What it overwrites must not be shared. So the sender's tensor is contiguous, the receiver's is new.
        """
        own = turn == self.member
        value = x.to(self.device).contiguous() if own else torch.empty(shape, dtype=dtype, device=self.device)
        dist.broadcast(value, group_src=turn, group=self.group)
        return value

    def release(self) -> None:
        """Free what a forward gathered."""
        for unit in self.units:
            unit.reshard()

    def describe(self, model: PreTrainedModel) -> str:
        """One line for the log: what this rank holds."""
        held, whole = local_bytes(model), sum(p.numel() * p.element_size() for p in model.parameters())

        return (
            f"The target is spread by {self.mode} over groups of {self.size} ranks: this one holds "
            f"{held / 2**20:.1f} of {whole / 2**20:.1f} MiB."
        )


def _form(x: Any) -> tuple[Any, tuple[int, ...] | None, torch.dtype | None]:
    """A value, or the shape and dtype of a tensor."""
    return (None, tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else (x, None, None)


def gathered(weight: torch.Tensor | None) -> torch.Tensor | None:
    """The whole of a weight that may be spread; every rank of its group must call this equally often."""
    if not isinstance(weight, DTensor):
        return weight
    return weight.to(weight.device_mesh.device_type).full_tensor()  # shards cannot be gathered in main memory


def move_shards_to_main_memory(model: nn.Module) -> None:
    """Take a target's shards off the accelerator: transformers (5.24) leaves them there though FSDP2 offloads them."""
    model._apply(lambda x: x.cpu() if isinstance(x, DTensor) else x)  # buffers stay where the rank runs


def local_bytes(model: nn.Module) -> int:
    """Bytes of the parameters held on this rank."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(x.numel() * x.element_size() for x in local)
