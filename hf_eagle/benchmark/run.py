"""Run what `scripts/benchmark_training_step.py` asks for: one shape or a sweep, alone or against another way."""

import dataclasses
import math
import os
import platform
import statistics
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from ..evaluation.plots import plot_growth
from . import chats, measures, stored
from .shapes import Shapes, check_memory, shapes_of, turns_of
from .workload import Step, build_block_draft, build_draft, chat_batch, random_target


PARTS = ("target_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds")


def measure(args, device: torch.device) -> dict:
    """Medians of every part of a step, and the ratios to what `args.compare` names."""
    if args.compare == "live":
        return stored.measure(args, device)
    if args.data is not None:
        return chats.measure(args, device)

    shapes = shapes_of(args)
    layers = shapes.num_hidden_layers if args.target == "random" else 0
    check_memory(shapes, args.batch_size, args.length, layers, measures.room_of(device), str(device))

    dtype, turns = getattr(torch, args.dtype), turns_of(args.turns, args.length)
    batch = chat_batch(shapes, args.batch_size, args.length, args.supervised_share, turns, device)
    ways = _ways(args, shapes, device)
    batches = {name: step.planned(batch) for name, step in ways.items()}

    optimizers = {id(step.draft): _optimizer_of(step.draft) for step in ways.values()}
    runs = {
        name: partial(timed_step, step, batches[name], optimizers[id(step.draft)], device)
        for name, step in ways.items()
    }
    medians = measures.alternating_medians(runs, args.repeats)
    memory = {name: _draft_memory(step, batches[name], device) for name, step in ways.items()}

    result = _of_fast_way(ways["fast"], medians, memory, measures.matmul_limit(dtype, device))
    result["operations"] = {name: sum(_needed_flops(step).values()) for name, step in ways.items() if not step.whole}
    for name in set(ways) - {"fast"}:
        result[f"speedup_vs_{name}"] = _draft_seconds(medians[name]) / result["draft_seconds"]
        if None not in memory.values():
            result[f"memory_ratio_vs_{name}"] = memory[name] / memory["fast"]
    return result


def _ways(args, shapes: Shapes, device: torch.device) -> dict[str, Step]:
    """The way that is measured, `fast`, and the one that it is compared with, by its name."""
    blocks = {name: getattr(args, name) for name in ("draft_num_layers", "block_size") if getattr(args, name)}
    unrolled = partial(build_draft, window=args.draft_sliding_window)
    make = {"eagle3": unrolled, "dflash": partial(build_block_draft, **blocks), "full": build_draft}
    autocast = torch.bfloat16 if args.dtype == "bfloat16" else None
    draft, target = make[args.method](shapes, device), None
    if args.target != "none":
        target = random_target(shapes, autocast or torch.float32, device, draft.config.tap_ids)

    steps = args.ttt_steps
    ways = {"fast": Step(draft, target, steps, autocast, num_anchors=args.num_anchors or 512)}
    if args.compare == "eager":
        ways["eager"] = Step(draft, target, steps, autocast, whole=True)
    elif args.compare == "float32":
        ways["float32"] = Step(draft, target, steps, num_anchors=args.num_anchors or 512)
    elif args.compare in make:
        ways[args.compare] = Step(make[args.compare](shapes, device), target, steps, autocast)
    return ways


def _optimizer_of(draft) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], lr=1e-5, fused=True)


def _needed_flops(step: Step) -> dict[str, float]:
    return step.draft.kind.part("costs").costs_of(step.draft.config).needed_flops(step.plan)


def _of_fast_way(step: Step, medians: dict, memory: dict, limit: float) -> dict:
    """The result of a run, before it is compared with another way.

    Args:
        step: the fast way, after its last step.
        medians, memory: those of all ways.
        limit: FLOP/s that matrix products reach on this machine.
    """
    needed = _needed_flops(step)
    rows, draft_seconds = int(step.counts[0]), _draft_seconds(medians["fast"])

    rate = sum(needed.values()) / draft_seconds
    return {
        "seconds": medians,
        "draft_seconds": draft_seconds,
        "supervised_rows": rows,
        "supervised_rows_per_second": rows / sum(medians["fast"].values()),
        "draft_memory_bytes": memory,
        "needed_flop": needed,
        "flop_per_second": rate,
        "matmul_flop_per_second": limit,
        "matmul_limit_share": rate / limit,
    }


def _draft_seconds(medians: dict[str, float]) -> float:
    return medians["forward_seconds"] + medians["backward_seconds"]


def timed_step(step: Step, batch: dict, optimizer, device) -> dict[str, float]:
    """Seconds of each part of one training step, for a batch that carries its plan, see [`Step`]."""
    marks = [time.perf_counter()]

    def mark():
        measures.drain(device)
        marks.append(time.perf_counter())

    step.run_target(batch)
    mark()
    loss = step.forward(batch)
    mark()
    loss.backward()
    mark()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mark()
    return {name: end - begun for name, (begun, end) in zip(PARTS, pairwise(marks), strict=True)}


def _draft_memory(step: Step, batch: dict, device) -> int | None:
    """Peak bytes that forward and backward of the draft add, weight gradients included."""
    step.run_target(batch)

    def forward_and_backward():
        step.forward(batch).backward()

    added = measures.peak_memory(forward_and_backward, device)
    step.draft.zero_grad(set_to_none=True)
    return added


def sweep(args, device: torch.device, values: tuple[int, ...]) -> dict:
    """`measure` at every value, and the exponents of growth, fitted over the upper half."""
    name = {"length": "length", "ttt": "ttt_steps", "batch": "batch_size"}[args.sweep]
    points = []
    for value in values:
        result = measure(dataclasses.replace(args, **{name: value}), device)
        points.append({name: value, **result})
        print(f"{name} {value}\n{describe(result)}\n", flush=True)

    print(table(name, points))
    result = {"swept": name, "points": points}
    upper = points[len(points) // 2 - 1 :]
    x = [math.log(point[name]) for point in upper]
    costs = {
        "time": [point["draft_seconds"] for point in upper],
        "memory": [point["draft_memory_bytes"]["fast"] for point in upper],
    }
    for what, seen in costs.items():
        if None not in seen:  # memory cannot be measured on every system
            growth = statistics.linear_regression(x, [math.log(cost) for cost in seen]).slope
            result[f"{what}_exponent"] = growth
            print(f"{what} grows with {name} to the power {growth:.2f} ({upper[0][name]} to {upper[-1][name]})")
    return result


def table(name: str, points: list[dict]) -> str:
    """A line for each point of a sweep and each way: operations of the draft's side, its seconds and its memory."""
    lines = [f"{name:>10}  {'way':8} {'GFLOP':>10} {'seconds':>9} {'MiB':>8}"]
    for point in points:
        for way, medians in point["seconds"].items():
            operations, memory = point["operations"].get(way), point["draft_memory_bytes"][way]
            counted = "-" if operations is None else f"{operations / 1e9:,.1f}"
            held = "-" if memory is None else f"{memory / 2**20:,.0f}"
            lines.append(f"{point[name]:>10,}  {way:8} {counted:>10} {_draft_seconds(medians):>9.3f} {held:>8}")
    return "\n".join(lines)


def describe(result: dict) -> str:
    """Format the numbers as lines for a terminal."""
    lines = []
    for name, medians in result["seconds"].items():
        parts = "  ".join(f"{part.removesuffix('_seconds')} {medians[part]:.3f} s" for part in medians)
        memory = result.get("draft_memory_bytes", {}).get(name)
        lines.append(f"{name:8} {parts}" + (f"  draft memory {memory / 2**20:,.0f} MiB" if memory else ""))
    lines.append(f"{result['supervised_rows_per_second']:,.0f} supervised rows/s, whole step")

    if "matmul_limit_share" in result:
        lines.append(
            f"draft: {result['flop_per_second'] / 1e9:,.0f} GFLOP/s that supervised rows need, "
            f"{result['matmul_limit_share']:.0%} of the {result['matmul_flop_per_second'] / 1e9:,.0f} that matrix "
            "products reach here"
        )
    if "reading_share" in result:
        lines.append(
            f"store: {result['store_bytes'] / 2**30:.2f} GiB, {result['store_bytes_per_token']:,.0f} bytes a token, "
            f"filled in {result['fill_seconds']:.0f} s; reading it costs {result['reading_share']:.1%} of a step"
        )
    lines += [f"{key.replace('_', ' ')}: {value:.3g}" for key, value in result.items() if "_vs_" in key]
    return "\n".join(lines)


def draw_sweep(result: dict, path: Path) -> Path:
    """Plot time and memory of the draft's side over what was swept."""
    name, points = result["swept"], result["points"]
    ways = points[0]["seconds"]
    seconds = {way: [_draft_seconds(p["seconds"][way]) for p in points] for way in ways}
    memory = {way: [(p["draft_memory_bytes"][way] or math.nan) / 2**20 for p in points] for way in ways}
    panels = {"seconds, forward and backward": seconds, "MiB added": memory}
    return plot_growth(name.replace("_", " "), [point[name] for point in points], panels, path)


def machine(device: torch.device) -> dict:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
