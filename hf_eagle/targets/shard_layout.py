"""How a target is to be spread over ranks: what `transformers` is told when it loads one, and what is refused first."""

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from transformers import PreTrainedConfig
from transformers import __version__ as RELEASE

from .adapters import is_adapter
from .config_fields import values_of_field
from .loading import load_config
from .turned_weights import recognise_turned_shares, refuse_turned_experts


logger = logging.getLogger(__name__)

MODES = ("none", "fsdp2", "tensor", "expert")
# the first transformers that spreads targets in all of these ways: with token dispatch for experts, several copies of a
# sharded target, and plans for gpt-oss
_SPREADS = Version("5.24")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def layout_of(
    config: PreTrainedConfig, mode: str, size: int | None = None, cpu_offload: bool = False, world: int = 1
) -> dict[str, Any] | None:
    """What `transformers.distributed.DistributedConfig` takes for a mode, `None` for `"none"`.

    Args:
        config: the target's.
        mode: `"fsdp2"`: every rank gathers a layer's weights while it runs it. `"tensor"`: ranks compute their parts of
            each layer, by the model's plan; the ranks of a group see the same tokens. `"expert"`: ranks keep their
            experts and exchange tokens, the rest is as in `"fsdp2"`.
        size: ranks that together hold one whole target; the others hold further copies. `None` for all ranks.
        cpu_offload: `"fsdp2"`: keep the shards in main memory.
        world: ranks of the run.

    Raises:
        ValueError: for an unknown mode, a size that does not divide what it must, a target without a plan for it, or a
            transformers that cannot do it.
    """
    if mode not in MODES:
        raise ValueError(f"`target_sharding` must be one of {', '.join(MODES)}, got {mode!r}.")
    if cpu_offload and mode != "fsdp2":
        raise ValueError(f"`target_cpu_offload` is a part of fsdp2, but `target_sharding` is {mode}: leave one out.")

    if mode == "none":
        if size is not None:
            raise ValueError(f"`target_shard_size` is {size}, but `target_sharding` is none: set both or neither.")
        return None

    if Version(RELEASE).release < _SPREADS.release:  # before its plans are asked, which differ
        raise ValueError(
            f"`target_sharding` {mode} needs transformers {_SPREADS} or newer, and this is {RELEASE}: install a newer "
            "one, or set it to none."
        )
    if world < 2:
        raise ValueError(
            f"`target_sharding` is {mode}, but this run has one process: start it with `torchrun` or `accelerate "
            "launch`, which without an accelerator starts one process only, or set it to none."
        )
    size = world if size is None else size
    if size < 2 or world % size:
        raise ValueError(
            f"`target_shard_size` is {size}, but it must be at least 2 and divide the {world} processes of this run."
        )

    config = config.get_text_config()

    if mode == "fsdp2":
        return {"fsdp_size": size, "dp_replicate_size": world // size, "fsdp_cpu_offload": cpu_offload}
    if mode == "tensor":
        _check_heads(config, size)
        return {"tp_size": size, "dp_replicate_size": world // size}
    _check_experts(config, size)
    return {"fsdp_size": size, "ep_size": size, "dp_replicate_size": world // size}


def _check_heads(config: PreTrainedConfig, size: int) -> None:
    plan = config.base_model_tp_plan
    if not plan:
        raise ValueError(
            f"`target_sharding` is tensor, but transformers has no plan for {type(config).__name__}: use fsdp2."
        )
    if not any(name.startswith("layers.") for name in plan):  # gpt-oss and Qwen3-VL
        logger.warning(
            "`target_sharding` tensor splits the embedding of %s alone, by transformers' plan: each rank holds and "
            "computes all else. fsdp2 holds less.",
            type(config).__name__,
        )

    split = {name.rsplit(".", 1)[-1] for name, style in plan.items() if style == "colwise"}
    heads = {"num_attention_heads": "q_proj", "num_key_value_heads": "k_proj"}
    for name in (name for name, projection in heads.items() if projection in split):
        number = next((x for x in values_of_field(config, name) if x % size), None)
        if number is not None:
            raise ValueError(
                f"`target_shard_size` is {size}, which does not divide the target's {number} `{name}`: choose a "
                "divisor of it, or `target_sharding` fsdp2."
            )


def _check_experts(config: PreTrainedConfig, size: int) -> None:
    number = next((getattr(config, name) for name in _EXPERTS if getattr(config, name, None)), None)
    if number is None or "ep_dispatch_experts" not in (config.base_model_ep_plan or {}).values():
        raise ValueError(
            f"`target_sharding` is expert, but {type(config).__name__} has no experts that transformers can spread: "
            "use fsdp2."
        )

    if number % size:
        raise ValueError(
            f"`target_shard_size` is {size}, which does not divide the target's {number} experts: choose a divisor."
        )


def loading_arguments(
    name_or_path: str,
    sharding: str = "none",
    shard_size: int | None = None,
    cpu_offload: bool = False,
    gguf_file: str | None = None,
    **hub: Any,
) -> dict[str, Any]:
    """Further arguments of `from_pretrained` that let each rank read only its share; none for `"none"`.

    Args:
        sharding, shard_size, cpu_offload: `mode`, `size` and `cpu_offload` of `layout_of`.
        gguf_file: refused if sharded.
        hub: `revision`, `trust_remote_code`.

    Raises:
        ValueError: as `layout_of`, for a GGUF file, and for what transformers cannot do.
    """
    refuse_zeroed_loading()
    if sharding == "none":
        layout_of(PreTrainedConfig(), sharding, shard_size, cpu_offload)
        return {}

    if gguf_file is not None:
        raise ValueError(
            f"`gguf_file` {gguf_file} can only be read whole, but `target_sharding` is {sharding}: turn it into an "
            "ordinary checkpoint first, with `hf_eagle.targets.gguf.convert_gguf`."
        )
    if is_adapter(name_or_path, hub.get("revision", "main")):
        raise ValueError(
            f"`target` {name_or_path} is an adapter, which is merged into whole weights, but `target_sharding` is "
            f"{sharding}, which never has them whole: merge it with PEFT's `merge_and_unload`, save that, and name it."
        )
    if cpu_offload and not torch.accelerator.is_available():
        raise ValueError("`target_cpu_offload` spares an accelerator's memory, but there is none here: leave it out.")

    config = load_config(name_or_path, **hub)
    layout = layout_of(config, sharding, shard_size, cpu_offload, world_size())

    from transformers.distributed import DistributedConfig  # late: older releases have none

    # transformers warns of rules of a plan that name nothing in this model; `check_weights` sees what was spread
    logging.getLogger("transformers.distributed.mixin").addFilter(_is_no_idle_rule)
    recognise_turned_shares(config)
    if sharding == "tensor":
        refuse_turned_experts(config, name_or_path, hub.get("revision", "main"))
    return {"distributed_config": DistributedConfig(**layout)}


def _is_no_idle_rule(record: logging.LogRecord) -> bool:
    return "`fsdp_plan` rules" not in record.getMessage()


def world_size() -> int:
    """Processes of this run, whether or not they are connected yet."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def refuse_zeroed_loading() -> None:
    """Refuse accelerate's option that makes all ranks but the first start every model from zeros.

    Raises:
        ValueError: if it is on in a run of several processes.
    """
    on = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("1", "true", "yes")

    if on and world_size() > 1:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading` is true in the launch config (or the environment): it would zero the "
            "target on every rank but the first; set it to false."
        )
