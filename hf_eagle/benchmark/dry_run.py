"""Predict what every rank of a training run holds, from configs alone, without reading or making weights.

Parameters are counted on meta-device models and are exact. Activations are what the draft's kind counts, see
`drafts/costs_base.py`. Memory for the allocator, CUDA itself and libraries is not counted.
"""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from ..drafts.build import class_of
from ..drafts.configuration_base import DraftConfig, width_of_experts
from ..drafts.costs_base import FLOAT32, DraftCosts, RunShapes
from ..drafts.kinds import find_kind
from ..targets.config_fields import largest_field
from ..targets.decoder_parts import find_decoder_parts
from ..targets.loading import auto_class, load_config
from ..targets.shard_layout import layout_of
from ..training.launching import launch_of
from ..training.memory import GIB


@dataclass
class Holding:
    """One thing that a rank holds.

    Attributes:
        what: name to show.
        bytes: its size.
        parameters: number of parameters, if it is weights.
    """

    what: str
    bytes: float
    parameters: int | None = None


@dataclass
class DryRun:
    """What a rank holds: all the time, during a step, and at most.

    Attributes:
        title: the run in words.
        kept: held from the first step to the last.
        target_step, draft_step: held while the target, and then the draft, runs; never both.
        sharing_step: held while the ranks share out the gradients of a sharded draft, behind its backward pass.
    """

    title: str
    kept: list[Holding] = field(default_factory=list)
    target_step: list[Holding] = field(default_factory=list)
    draft_step: list[Holding] = field(default_factory=list)
    sharing_step: list[Holding] = field(default_factory=list)

    @property
    def largest_step(self) -> list[Holding]:
        """The step that needs most."""
        steps = (self.target_step, self.draft_step, self.sharing_step)
        return max(steps, key=lambda step: sum(h.bytes for h in step))

    @property
    def peak(self) -> float:
        """The most bytes at one time."""
        return sum(h.bytes for h in self.kept + self.largest_step)

    def describe(self) -> str:
        """The table, for a terminal."""
        lines = [self.title, f"{'':58} {'parameters':>17} {'GiB':>9}"]
        parts = {"kept": self.kept, "while the target runs": self.target_step, "while the draft runs": self.draft_step}
        parts["while gradients are shared out"] = self.sharing_step
        for name, holdings in parts.items():
            lines += [name] if holdings else []
            for h in holdings:
                count = "" if h.parameters is None else f"{h.parameters:,}"
                lines.append(f"  {h.what:56} {count:>17} {h.bytes / GIB:9.2f}")

        lines.append(f"{'at most':76} {self.peak / GIB:9.2f}")
        return "\n".join(lines)

    def warning(self, device_memory_gb: float | None) -> str | None:
        """Why this run cannot fit a device with this many GiB, `None` if it may fit."""
        if device_memory_gb is None or self.peak <= device_memory_gb * GIB:
            return None

        largest = max(self.kept + self.largest_step, key=lambda h: h.bytes)
        return (
            f"This cannot fit `device_memory_gb` {device_memory_gb:g}: a rank needs {self.peak / GIB:.1f} GiB, most of "
            f"it for {largest.what} ({largest.bytes / GIB:.1f} GiB)."
        )


def read_target_config(name_or_path: str, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a target, from a folder with `config.json` or from the Hub; its weights are not needed.

    Raises:
        ValueError: if the config cannot be read.
    """
    try:
        return load_config(name_or_path, revision, trust_remote_code)
    except (OSError, ValueError) as problem:
        raise ValueError(
            f"The config of `target` {name_or_path} cannot be read here, which a `dry_run` needs: name a folder that "
            f"holds its `config.json` ({str(problem).rstrip('.')})."
        ) from problem


def shapes_of(target_config: PreTrainedConfig, target_args, data_args, dry_args, args, steps: int) -> RunShapes:
    """The run that a script's argument groups describe; `steps` of the training-time test.

    Raises:
        ValueError: for a launch config that cannot be read, and a target that cannot be spread over so many ranks.
    """
    launched, sharded = launch_of(dry_args.launch_config, args)
    ranks = dry_args.world_size or launched

    mode = target_args.target_sharding
    if mode != "none" and ranks < 2:
        raise ValueError(
            f"`target_sharding` is {mode}, but this `dry_run` counts one rank: give the number of ranks with "
            "`--world_size`, or the launch config with `--launch_config`; no launcher is needed."
        )
    layout_of(target_config, mode, target_args.target_shard_size, world=ranks)

    dtype = target_args.target_dtype
    if dtype == "auto":
        dtype = target_config.get_text_config().dtype or target_config.dtype or torch.float32
    return RunShapes(
        world_size=ranks,
        rows=args.per_device_train_batch_size,
        length=data_args.max_length,
        ttt_steps=steps,
        # a packed row holds many conversations, each with as many blocks or rows
        num_anchors=data_args.max_length if data_args.packing else args.num_anchors,
        loss_window=None if data_args.packing else args.loss_window,
        loss=args.loss,
        supervised_share=dry_args.supervised_share,
        bf16=args.bf16,
        checkpointing=bool(args.gradient_checkpointing),
        draft_sharded=sharded and ranks > 1,
        target_dtype=dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype),
        target_sharding=mode,
        target_shard_size=target_args.target_shard_size,
        target_served=target_args.target_url is not None,
        **({} if dry_args.device_memory_gb is None else {"memory": round(dry_args.device_memory_gb * GIB)}),
    )


def dry_run(target_config: PreTrainedConfig, draft_config: DraftConfig, shapes: RunShapes) -> DryRun:
    """What a rank of such a run holds.

    Args:
        target_config: config of the whole target.
        draft_config: config of the draft.
        shapes: the run.
    """
    kind, _ = find_kind(draft_config.architectures)
    costs = kind.part("costs").costs_of(draft_config)
    with torch.device("meta"):
        target = auto_class(target_config).from_config(target_config, dtype=shapes.target_dtype)
        draft = class_of(draft_config.architectures)(draft_config)

    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    # two-dimensional: tables that the target lends, and not a frozen bias
    lent = [p.numel() for p in draft.parameters() if not p.requires_grad and p.dim() == 2]

    text = target_config.get_text_config()
    taps = "no taps" if not draft_config.tap_ids else f"taps {', '.join(map(str, draft_config.tap_ids))}"
    run = DryRun(
        f"Each of {shapes.world_size} rank(s): {type(target).__name__} of {text.num_hidden_layers} layers "
        f"and {sum(p.numel() for p in target.parameters()):,} parameters, "
        f"{type(draft).__name__} of {trained + sum(lent):,} parameters ({taps}), "
        f"{shapes.rows} x {shapes.length} tokens, {shapes.supervised} of them supervised at most"
    )

    features = Holding("features", shapes.tokens * costs.feature_width * shapes.target_dtype.itemsize)
    run.kept = [*_target_weights(target, shapes), *_draft_weights(trained, lent, target, shapes)]
    run.target_step = [features, *([] if shapes.target_served else _target_forward(target, text, shapes))]
    run.draft_step = [features, Holding(*costs.teacher(shapes)), *_unroll(costs, trained, shapes)]
    if shapes.draft_sharded:
        whole, head = trained + sum(lent), draft.get_output_embeddings().weight
        run.draft_step += gathered_by_step(whole)
        run.sharing_step = shared_by_step(whole, trained, head.numel() if head.requires_grad else 0)
    return run


# ---- weights ----


def _target_weights(target, shapes: RunShapes) -> list[Holding]:
    sizes = {name: p.numel() for name, p in target.named_parameters()}
    whole, mode = sum(sizes.values()), shapes.target_sharding
    ranks = shapes.target_shard_size or shapes.world_size
    dtype, width = str(shapes.target_dtype).removeprefix("torch."), shapes.target_dtype.itemsize
    if shapes.target_served:
        held = _ends(target)
        return [Holding(f"target's embedding, norm and head, {dtype}", held * width, held)]

    if getattr(target.config, "quantization_config", None) is not None:
        dtype += " (unpacked)"

    if mode == "none" or ranks == 1:
        return [Holding(f"target, {dtype}, whole", whole * width, whole)]

    split = whole if mode != "tensor" else sum(n for name, n in sizes.items() if _is_split(name, target.tp_plan))
    held = whole - split + -(-split // ranks)  # every rank holds all of what is not split
    return [Holding(f"target, {dtype}, {mode} over {ranks} ranks", held * width, held)]


def _ends(target) -> int:
    """Parameters of what is loaded of a target whose layers run in a server; a tied head counts once."""
    parts = find_decoder_parts(target)
    ends = (target.get_input_embeddings(), parts.final_norm, parts.head)
    return sum({id(p): p.numel() for end in ends for p in end.parameters()}.values())


def _is_split(name: str, plan: dict[str, str]) -> bool:
    """Whether the model's own tensor-parallel plan splits a parameter."""
    pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
    style = plan.get(pattern) or plan.get(pattern.rpartition(".")[0]) or ""
    return "colwise" in style or "rowwise" in style


def _draft_weights(trained: int, lent: list[int], target, shapes: RunShapes) -> list[Holding]:
    own = trained // shapes.world_size if shapes.draft_sharded else trained
    # the draft shares the target's table and head if they are whole and float32, the draft's dtype
    shared = shapes.target_dtype == torch.float32 and shapes.target_sharding == "none" and not shapes.draft_sharded
    copies = 0 if shared else lent[0] if _is_tied(target) else sum(lent)
    copies = copies // shapes.world_size if shapes.draft_sharded else copies

    held = [
        Holding("draft, trained, float32", own * FLOAT32, own),
        Holding("draft, frozen, float32" + (" (the target's own)" if shared else ""), copies * FLOAT32, sum(lent)),
        Holding("gradients, float32", own * FLOAT32),
        Holding("AdamW's two moments, float32", 2 * own * FLOAT32),
    ]
    if shapes.world_size > 1 and not shapes.draft_sharded:
        held.append(Holding("DDP's buckets of gradients", trained * FLOAT32))
    return held


def gathered_by_step(whole: int) -> list[Holding]:
    """What FSDP2 gathers of a draft of so many parameters, frozen ones too; the buffer stays until the next gather."""
    return [
        Holding("the draft's weights, gathered", whole * FLOAT32),
        Holding("the buffer they came in", whole * FLOAT32),
    ]


def shared_by_step(whole: int, trained: int, head: int) -> list[Holding]:
    """What FSDP2 holds while it shares out the gradients of a draft, which are whole until then.

    Args:
        whole, trained: parameters of the draft.
        head: those of its head, if it is trained: the loss holds their gradient as it made it.
    """
    return [
        gathered_by_step(whole)[0],
        Holding("gradients, whole", trained * FLOAT32),
        Holding("the buffer they are sent from", trained * FLOAT32),
        Holding("the head's gradient, as the loss made it", head * FLOAT32),
    ]


def _is_tied(target) -> bool:
    return target.get_output_embeddings().weight is target.get_input_embeddings().weight


# ---- a step ----


def _target_forward(target, text, shapes: RunShapes) -> list[Holding]:
    width, parts = shapes.target_dtype.itemsize, find_decoder_parts(target)
    heads = largest_field(text, "num_attention_heads")
    head_dim = largest_field(text, "head_dim") or text.hidden_size // max(heads, 1)
    dense = largest_field(text, "intermediate_size_mlp") or largest_field(text, "intermediate_size")
    mlp = max(dense, width_of_experts(text, dense))

    # gate, up and their product, or queries, keys and values; and the residual stream, before and after a norm
    widest = max(3 * mlp, 4 * heads * head_dim)
    held = [Holding("one layer's activations", shapes.tokens * (4 * text.hidden_size + widest) * width)]

    if shapes.target_sharding in ("fsdp2", "expert"):
        largest = max(_gathered(layer, shapes.target_sharding) for layer in parts.layers)
        held.append(Holding("a layer's weights, gathered, and the next one's", 2 * largest * width))
    if shapes.target_sharding != "none":  # the teacher's logits need the whole head
        head = parts.head.weight.numel()
        held.append(Holding("the head, gathered", head * width, head))
    return held


def _gathered(layer, sharding: str) -> int:
    """Parameters gathered to run a layer: experts stay where they are, unless everything is `fsdp2`."""
    sizes = {name: p.numel() for name, p in layer.named_parameters()}
    return sum(size for name, size in sizes.items() if sharding == "fsdp2" or ".experts." not in f".{name}")


def _unroll(costs: DraftCosts, trained: int, shapes: RunShapes) -> list[Holding]:
    of_steps = f"activations of {shapes.ttt_steps} step(s)" + ", checkpointed" * shapes.checkpointing
    held = [Holding(of_steps, costs.kept_by_unroll(shapes))]
    if shapes.bf16:
        held.append(Holding("the draft's weights in bfloat16", trained * 2))
    of_loss = "head and loss" + ", or a step made again" * shapes.checkpointing
    return [*held, Holding(of_loss, costs.beside_unroll(shapes))]
