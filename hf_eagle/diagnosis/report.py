"""Tell a diagnosis: a ranked table of causes, the commands that measure them again, and one picture."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..evaluation.contexts import bucket_name, told_length
from .causes import cause_of
from .diagnose import Diagnosis
from .findings import Finding


def told(diagnosis: Diagnosis, command: Callable[[str], str], evaluate: str) -> str:
    """Return what is printed.

    Args:
        diagnosis: what was found.
        command: the command that tries one cause again.
        evaluate: the command that measures acceptance as it is.
    """
    summary = diagnosis.summary
    lines = [f"acceptance length {told_length(summary)} as it is, {summary['num_prompts']} prompts"]
    if diagnosis.decoded is not None:
        lines[0] += f"; by decoding {diagnosis.decoded:.3f}"
    lines += [f"context {bucket_name(x)}: {told_length(x)}" for x in summary.get("acceptance_by_context", [])]
    lines += ["", table(diagnosis.causes) if diagnosis.causes else nothing_found(diagnosis)]

    lines += ["", "To measure these figures again:", f"    {evaluate}"]
    lines += [f"    {command(found.cause)}" for found in diagnosis.causes]
    return "\n".join(lines)


def table(causes: list[Finding]) -> str:
    """Return the causes as a Markdown table, the first cause first."""
    lines = ["| | cause | evidence | acceptance length without it | what to do |", "|---|---|---|---|---|"]
    for number, found in enumerate(causes, 1):
        cause = cause_of(found.cause)
        cells = [str(number), f"{cause.title} (`{found.cause}`)", _evidence(found), _length(found), cause.mend]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def _evidence(found: Finding) -> str:
    if found.change is None or found.change in found.evidence:
        return found.evidence
    return f"{found.evidence}; measured with {found.change}"


def _length(found: Finding) -> str:
    if found.acceptance_length is None or found.gain is None:
        return "not measured"
    text = f"{'at most ' * found.bound}{found.acceptance_length:.3f} ({found.gain:+.3f})"
    return text if found.decoded is None else f"{text}; by decoding {found.decoded:.3f}"


def nothing_found(diagnosis: Diagnosis) -> str:
    """Say that nothing was found, and what was tried."""
    tried: dict[str, list[Finding]] = {}
    for found in diagnosis.tried:
        tried.setdefault(found.cause, []).append(found)
    lines = ["Nothing found. This was tried, and does not explain the acceptance:"]
    for cause, findings in tried.items():
        best = max(findings, key=lambda found: found.gain if found.gain is not None else float("-inf"))
        more = f", the best of {len(findings)} changes" if len(findings) > 1 else ""
        lines.append(f"  {cause}: {_evidence(best)}, acceptance length {_length(best)}{more}")
    return "\n".join(lines)


def plot_diagnosis(summary: dict[str, Any], path: str | os.PathLike) -> Path:
    """Draw acceptance by drafted token, context length, place in the answer and category, as far as there are several.

    Args:
        summary: acceptance as it is, see `summary_of`.
        path: the PNG to write; its folder must exist.
    """
    from matplotlib.figure import Figure  # needs no window

    shares = [count / summary["drafts"] for count in summary["accepted_per_position"]]
    panels = {"drafted token": ({str(n): x for n, x in enumerate(shares, 1)}, "share of drafts that kept it")}
    lengths = "tokens per target forward pass"
    named = {"acceptance_by_context": "context, in tokens", "acceptance_by_answer_position": "place in the answer"}
    for name, label in named.items():
        buckets = [x for x in summary.get(name, []) if x["drafts"]]
        if len(buckets) > 1:
            panels[label] = ({bucket_name(x): x["acceptance_length"] for x in buckets}, lengths)
    kinds = {name: x for name, x in summary.get("acceptance_length_by_category", {}).items() if x is not None}
    if kinds:
        panels["category"] = (kinds, lengths)

    figure = Figure(figsize=(4.5 * len(panels), 3.4), dpi=140, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, (values, label)) in zip(axes, panels.items(), strict=True):
        axis.bar(range(len(values)), list(values.values()), color="#3b6fb6", width=0.6)
        axis.set_xticks(range(len(values)), list(values), rotation=30 if len(values) > 3 else 0, parse_math=False)
        axis.set(xlabel=name, ylabel=label, ylim=(0 if axis is axes[0] else 1, None))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return Path(path)
