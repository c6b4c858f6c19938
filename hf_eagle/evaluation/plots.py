"""Plots of training, of measured acceptance, and of speed over the number of drafted tokens."""

import os
import re
from pathlib import Path


COMPARISON = "Runs compared by hf_eagle"  # title in the file of `plot_runs`, by which a later call recognises it
WIDTH, HEIGHT, DPI = 9.0, 3.4, 140  # inches, inches, dots per inch: legible in a card and in a terminal's viewer
TRAIN, EVAL = "#3b6fb6", "#d1793b"


def plot_training(log_history: list[dict], path: str | os.PathLike) -> Path | None:
    """
    Draw loss, and accuracy at each TTT step, over optimizer steps.

    Args:
        log_history (`list[dict]`):
            The Trainer's log: entries with `step` and any of `loss`, `eval_loss`, `accuracy_step_{s}`,
            `eval_accuracy_step_{s}` (teacher-forced shares, 0 to 1). Other entries are ignored.
        path (`str` or `os.PathLike`):
            The PNG to write; its folder must exist.

    Returns:
        `Path` or `None`: the file, or `None` when no loss was logged.
    """
    loss, eval_loss = series(log_history, "loss"), series(log_history, "eval_loss")
    if not loss[0]:
        return None

    figure, (left, right) = _figure(2)

    left.plot(*loss, color=TRAIN, linewidth=1.4, label="training")
    if eval_loss[0]:
        left.plot(*eval_loss, color=EVAL, marker="o", markersize=4, linewidth=1.4, label="held out")
        left.legend(frameon=False)
    left.set(xlabel="optimizer step", ylabel="loss", title="Loss")

    # held-out accuracy is the one that counts; show training's if there is no other
    keys = {key for entry in log_history for key in entry}
    prefix = "eval_" if "eval_accuracy_step_0" in keys else ""
    steps = sorted(int(m[1]) for key in keys if (m := re.fullmatch(rf"{prefix}accuracy_step_(\d+)", key)))

    for step, color in zip(steps, _shades(len(steps)), strict=True):
        x, y = series(log_history, f"{prefix}accuracy_step_{step}")
        right.plot(x, y, color=color, linewidth=1.4, marker="o" if len(x) < 12 else None, markersize=4, label=str(step))
    if steps:
        right.legend(
            title="TTT step", frameon=False, fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    right.set(xlabel="optimizer step", ylabel="accuracy", ylim=(0, None))
    right.set_title(f"Teacher-forced accuracy, {'held out' if prefix else 'training'}")
    return _save(figure, path)


def plot_acceptance(acceptance: dict, path: str | os.PathLike) -> Path | None:
    """
    Draw the share of drafts whose k-th token was accepted and, if measured, acceptance length by category.

    Args:
        acceptance (`dict`):
            Result of `measure_acceptance`: `drafts`, `accepted_per_position` (counts), `acceptance_length`, and
            possibly `acceptance_length_by_category`.
        path (`str` or `os.PathLike`):
            The PNG to write; its folder must exist.

    Returns:
        `Path` or `None`: the file, or `None` when nothing was drafted.
    """
    drafts = acceptance["drafts"]
    if not drafts:
        return None
    by_category = {k: v for k, v in (acceptance.get("acceptance_length_by_category") or {}).items() if v is not None}
    figure, axes = _figure(2 if by_category else 1)

    shares = [count / drafts for count in acceptance["accepted_per_position"]]
    positions = [str(position) for position in range(1, len(shares) + 1)]
    bars = axes[0].bar(positions, shares, color=TRAIN, width=0.6)
    axes[0].bar_label(bars, labels=[f"{share:.1%}" for share in shares], padding=2, fontsize=9)
    axes[0].set(
        xlabel="drafted token", ylabel="share of drafts that kept it", ylim=(0, min(1.05, 1.2 * max(shares) + 0.02))
    )
    axes[0].set_title(f"Accepted tokens, of {drafts:,} drafts")

    if by_category:
        names = [*sorted(by_category, key=by_category.get), "all"]
        lengths = [*(by_category[name] for name in names[:-1]), acceptance["acceptance_length"]]
        colors = [TRAIN] * len(by_category) + [EVAL]
        bars = axes[1].barh(range(len(names)), lengths, color=colors, height=0.65)
        axes[1].set_yticks(range(len(names)), names, parse_math=False)  # a name may hold anything, or be "all"
        axes[1].bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
        # every forward pass yields one token of the target: bars start at 1
        axes[1].set(xlabel="tokens per target forward pass", xlim=(1, 1 + 1.15 * max(max(lengths) - 1, 0.1)))
        axes[1].set_title("Acceptance length by category")
    return _save(figure, path)


def plot_contexts(lengths: dict[str, list[dict]], path: str | os.PathLike) -> Path | None:
    """
    Draw acceptance length against context length, with its 95% intervals.

    Args:
        lengths (`dict[str, list[dict]]`):
            By name, what `acceptance_by_context` returns; the name is shown if there are several.
        path (`str` or `os.PathLike`):
            The PNG to write; its folder must exist.

    Returns:
        `Path` or `None`: the file, or `None` when nothing was drafted.
    """
    from .contexts import bucket_name  # loads torch

    drawn = {name: [b for b in buckets if b["drafts"]] for name, buckets in lengths.items()}
    if not any(drawn.values()):
        return None

    figure, (axis,) = _figure(1)
    places = {b["above"]: place for place, b in enumerate(next(iter(lengths.values())))}
    for number, (name, color) in enumerate(zip(drawn, _shades(len(drawn)), strict=True)):
        shift = 0.08 * (number - (len(drawn) - 1) / 2)  # so that intervals stand beside each other
        x = [places[b["above"]] + shift for b in drawn[name]]
        y = [b["acceptance_length"] for b in drawn[name]]
        intervals = [b["acceptance_length_interval"] or [length] * 2 for b, length in zip(drawn[name], y, strict=True)]
        reach = [[length - low for length, (low, _) in zip(y, intervals, strict=True)]]
        reach += [[high - length for length, (_, high) in zip(y, intervals, strict=True)]]
        axis.errorbar(x, y, yerr=reach, color=color, marker="o", markersize=4, linewidth=1.4, capsize=2, label=name)

    axis.set_xticks(range(len(places)), list(map(bucket_name, next(iter(lengths.values())))), fontsize=8)
    axis.set(xlabel="context, in tokens", ylabel="tokens per target forward pass", title="Acceptance by context")
    if len(drawn) > 1:
        axis.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def plot_acceptance_history(log_history: list[dict], path: str | os.PathLike) -> Path | None:
    """
    Draw the acceptance length measured during training, and the teacher-forced estimate, over optimizer steps.

    Args:
        log_history (`list[dict]`):
            The Trainer's log: entries with `step` and `acceptance_length` or `eval_acceptance_length`, as
            `AcceptanceLengthCallback` logs them, and `eval_estimated_acceptance_length` of held-out data, or
            `estimated_acceptance_length` of the training data.
        path (`str` or `os.PathLike`):
            The PNG to write; its folder must exist.

    Returns:
        `Path` or `None`: the file, or `None` when nothing was measured.
    """
    found = {}
    for key in ("acceptance_length", "eval_acceptance_length"):
        found |= dict(zip(*series(log_history, key), strict=True))
    steps = sorted(found)
    lengths = [found[step] for step in steps]
    if not steps:
        return None

    figure, (axis,) = _figure(1)
    for key, name in (("eval_estimated_acceptance_length", "held out"), ("estimated_acceptance_length", "training")):
        estimate = series(log_history, key)
        if estimate[0]:
            axis.plot(*estimate, color=TRAIN, linewidth=1.4, label=f"estimate, {name}")
            break

    axis.plot(steps, lengths, color=EVAL, marker="o", markersize=4, linewidth=1.4, label="measured by decoding")
    axis.legend(frameon=False)
    axis.set(xlabel="optimizer step", ylabel="tokens per target forward pass", title="Acceptance length")
    return _save(figure, path)


def plot_sweep(sweep: list[dict], path: str | os.PathLike) -> Path | None:
    """
    Draw speed and acceptance length against the number of drafted tokens.

    Args:
        sweep (`list[dict]`):
            Result of `sweep_speculative_tokens`.
        path (`str` or `os.PathLike`):
            The PNG to write; its folder must exist.

    Returns:
        `Path` or `None`: the file, or `None` when nothing was measured.
    """
    if not sweep:
        return None

    figure, (left, right) = _figure(2)
    counts = [found["num_speculative_tokens"] for found in sweep]
    left.plot(
        counts, [x["tokens_per_second"] for x in sweep], color=TRAIN, marker="o", markersize=4, label="with the draft"
    )

    alone = [found["target_only_tokens_per_second"] for found in sweep]
    if None not in alone:
        left.plot(counts, alone, color=EVAL, linestyle="--", label="target alone")
    left.legend(frameon=False)
    left.set(xlabel="drafted tokens K", ylabel="tokens per second", ylim=(0, None), title="Speed")

    measured = [(x["num_speculative_tokens"], x["acceptance_length"]) for x in sweep if x["acceptance_length"]]
    if measured:
        right.plot(*zip(*measured, strict=True), color=TRAIN, marker="o", markersize=4)
    right.set(xlabel="drafted tokens K", ylabel="tokens per target forward pass", title="Acceptance length")

    for axis in (left, right):
        axis.set_xticks(counts)
    return _save(figure, path)


def plot_serving(entries: list[dict], path: str | os.PathLike) -> Path:
    """
    Draw how many times faster a server decodes with a draft, and its speed, over the number of drafted tokens.

    Args:
        entries (`list[dict]`):
            Result of `hf_eagle.serving.speed.measure_serving`.
        path (`str` or `os.PathLike`):
            The PNG to write; its folder must exist.
    """
    figure, (left, right) = _figure(2)
    sizes = sorted({entry["batch_size"] for entry in entries})

    for size, color in zip(sizes, _shades(len(sizes)), strict=True):
        found = sorted(
            (entry["num_speculative_tokens"], entry["speedup"], entry["tokens_per_second"])
            for entry in entries
            if entry["batch_size"] == size
        )
        counts, factors, speeds = zip(*found, strict=True)
        left.plot(counts, factors, color=color, marker="o", markersize=4, linewidth=1.4, label=f"batch {size}")
        right.plot(counts, speeds, color=color, marker="o", markersize=4, linewidth=1.4)

    left.axhline(1, color="0.6", linewidth=0.8)
    left.set(xlabel="drafted tokens K (0: no draft)", ylabel="times as fast", title="Speed-up")
    right.set(xlabel="drafted tokens K", ylabel="tokens per second", ylim=(0, None), title="Speed")
    for axis in (left, right):
        axis.set_xticks(counts)
    left.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def plot_runs(curves: dict[str, tuple[list[int], list[float]]], path: str | os.PathLike) -> Path:
    """
    Draw the loss of several runs over optimizer steps, and how far each is from the first.

    Args:
        curves (`dict[str, tuple[list[int], list[float]]]`):
            Steps and losses of each run, by name, as `series` returns them.
        path (`str` or `os.PathLike`):
            The PNG to write; its folder must exist.
    """
    figure, (left, right) = _figure(2)
    (first, (steps, losses)), *others = curves.items()
    of_first = dict(zip(steps, losses, strict=True))

    left.plot(steps, losses, linewidth=1.4, label=first, color=_shades(len(curves))[0])
    for (name, (x, y)), color in zip(others, _shades(len(curves))[1:], strict=True):
        left.plot(x, y, linewidth=1.4, label=name, color=color)
        gaps = [(step, loss - of_first[step]) for step, loss in zip(x, y, strict=True) if step in of_first]
        right.plot(*zip(*gaps, strict=True), linewidth=1.2, label=name, color=color)

    right.axhline(0, color="0.6", linewidth=0.8)
    left.set(xlabel="optimizer step", ylabel="loss", title="Loss")
    right.set(xlabel="optimizer step", ylabel="difference of loss", title=f"Distance from {first}")
    left.legend(frameon=False)
    return _save(figure, path, COMPARISON)


def plot_growth(name: str, values: list[int], panels: dict[str, dict[str, list[float]]], path) -> Path:
    """
    Draw how costs grow, on logarithmic axes.

    Args:
        name (`str`), values (`list[int]`):
            Name and values of the quantity that was varied.
        panels (`dict[str, dict[str, list[float]]]`):
            Two panels by label, each with curves by name.
        path (`str` or `os.PathLike`):
            The PNG to write; its folder must exist.
    """
    figure, axes = _figure(2)
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for (curve, y), color in zip(curves.items(), _shades(len(curves)), strict=True):
            axis.plot(values, y, marker="o", markersize=4, linewidth=1.4, label=curve, color=color)
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel=label)
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.legend(frameon=False)
    return _save(figure, path)


def series(log_history: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one logged quantity; if a resumed run logged a step again, the last value counts."""
    found = {entry["step"]: entry[key] for entry in log_history if key in entry and "step" in entry}
    return sorted(found), [found[step] for step in sorted(found)]


def _figure(columns: int):
    # Figure instead of pyplot needs no global state, window or display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH if columns == 2 else WIDTH * 0.55, HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]

    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)

    return figure, axes


def _shades(count: int) -> list:
    """Return colours from dark, for the first TTT step, to light, for the last."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * index / max(count - 1, 1)) for index in range(count)]


def _save(figure, path: str | os.PathLike, title: str | None = None) -> Path:
    figure.savefig(path, metadata={} if title is None else {"Title": title})
    return Path(path)
