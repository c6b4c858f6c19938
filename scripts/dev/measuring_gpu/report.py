"""What is printed and written: lines, one table, JSON, and a picture."""

from pathlib import Path

from hf_eagle.evaluation.plots import DPI, EVAL, HEIGHT, TRAIN, WIDTH


_UNITS = {"_ms": "{:,.1f} ms", "_gib": "{:.2f} GiB", "_share": "{:.0%}"}
_HIDDEN = ("what", "curves")


def line(row: dict) -> str:
    """A row as one line: what was measured, and its numbers by name."""
    return f"{row['what']}: {figures(row)}"


def figures(row: dict) -> str:
    """The numbers of a row, with the units that their names end with; `-` for what cannot be measured here."""
    return ", ".join(_figure(name, x) for name, x in row.items() if name not in _HIDDEN)


def _figure(name: str, x) -> str:
    unit = next((unit for unit in _UNITS if name.endswith(unit)), "")
    if isinstance(x, float):
        x = _UNITS.get(unit, "{:.3g}").format(x)
    return f"{name.removesuffix(unit).replace('_', ' ')} {'-' if x is None else x}"


def table(machine: dict, found: dict) -> str:
    """All rows as a table in Markdown, and why a part ended early."""
    lines = [line(machine), "", "| part | what | found |", "|---|---|---|"]
    for name, part in found.items():
        lines += [f"| {name} | {_cell(row['what'])} | {_cell(figures(row))} |" for row in part.rows]
        if part.error:
            lines.append(f"| {name} | failed | {_cell(part.error)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def as_json(machine: dict, found: dict) -> dict:
    """All that was measured."""
    parts = {name: {"seconds": x.seconds, "error": x.error, "rows": x.rows} for name, x in found.items()}
    return {"machine": machine, "parts": parts}


def draw(machine: dict, found: dict, path: Path) -> None:
    """The draft's time and share of the limit, and the losses beside the CPU's, as far as they were measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT + 0.8), dpi=DPI, layout="constrained")
    figure.suptitle(f"{machine['device']}, torch {machine['torch']}", fontsize=9)
    left, right = figure.subplots(1, 2)

    rows = [row for row in (found["draft"].rows if "draft" in found else []) if "limit_share" in row]
    names = [row["what"] for row in rows][::-1]
    bars = left.barh(range(len(rows)), [row["limit_share"] for row in rows][::-1], color=TRAIN, height=0.65)
    left.set_yticks(range(len(rows)), names, fontsize=7)
    left.bar_label(bars, labels=[f"{row['draft_ms']:,.0f} ms" for row in rows][::-1], padding=3, fontsize=7)
    left.set(xlabel="share of what a matrix product reaches", title="Draft, forward and backward")
    left.margins(x=0.2)

    for row in found["training"].rows if "training" in found else []:
        for (name, losses), color in zip(row["curves"].items(), (TRAIN, EVAL), strict=True):
            style = {"color": color, "linestyle": "--" if name == "CPU" else "-", "linewidth": 1.2}
            right.plot(range(1, len(losses) + 1), losses, label=f"{row['what']}, {name}", **style)
    if right.lines:
        right.legend(frameon=False, fontsize=8)
    right.set(xlabel="optimizer step", ylabel="loss", title="A short run")

    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    figure.savefig(path)
