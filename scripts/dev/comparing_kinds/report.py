"""Read the runs of a comparison, and show them as a table, JSON and a picture."""

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_eagle.door.json_files import read_json


DELETE = "delete the folder that it is in, to have that run done again"
MEASURED = {"acceptance_length?": float, "minutes_trained?": float, "point?": int}
STATE = {"global_step": int, "log_history": [MEASURED]}
ENTRY = {"num_speculative_tokens": int, "batch_size": int, "tokens_per_second": float, "speedup": float}


@dataclass
class Run:
    """One trained draft.

    Attributes:
        draft: name of the variant.
        seed: its seed.
        steps: optimizer steps that its time was enough for.
        curve: by number of the point, the minutes of training and the acceptance length then.
        served: tokens a second in the server, by number of requests in flight; `alone` is without a draft.
    """

    draft: str
    seed: int
    steps: int
    curve: dict[int, tuple[float, float]]
    served: dict[int, float] = field(default_factory=dict)
    alone: dict[int, float] = field(default_factory=dict)

    @classmethod
    def read(cls, draft: str, seed: int, folder: Path) -> "Run":
        state = read_json(folder / "trainer_state.json", STATE, DELETE)
        measured = [entry for entry in state["log_history"] if "point" in entry]
        curve = {entry["point"]: (entry["minutes_trained"], entry["acceptance_length"]) for entry in measured}
        run = cls(draft, seed, state["global_step"], curve)
        if (folder / "serving.json").exists():
            for entry in read_json(folder / "serving.json", {"entries": [ENTRY]}, DELETE)["entries"]:
                speeds = run.served if entry["num_speculative_tokens"] else run.alone
                speeds[entry["batch_size"]] = entry["tokens_per_second"]
        return run

    @property
    def merit(self) -> float:
        """What makes a draft the better one: speed for one request, acceptance where no server ran."""
        return self.served[min(self.served)] if self.served else self.curve[max(self.curve)][1]


def best(runs: list[Run]) -> str:
    """The variant whose mean merit is highest."""
    merits = {name: statistics.mean(run.merit for run in found) for name, found in by_draft(runs).items()}
    return max(merits, key=merits.get)


def by_draft(runs: list[Run]) -> dict[str, list[Run]]:
    return {name: [run for run in runs if run.draft == name] for name in dict.fromkeys(run.draft for run in runs)}


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation if there are several."""
    told = f"{statistics.mean(values):.{digits}f}"
    return f"{told} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else told


def table(runs: list[Run], minutes: float, points: int) -> str:
    """A Markdown table, best first, with the standard deviation over seeds."""
    sizes = sorted({size for run in runs for size in run.served})
    heads = ["draft", "seeds", "steps", *(f"{minutes * point / points:.3g} min" for point in range(1, points + 1))]
    heads += [f"{size} request{'s' * (size > 1)}, tokens/s" for size in sizes]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]

    groups = by_draft(runs)
    for name in sorted(groups, key=lambda name: -statistics.mean(run.merit for run in groups[name])):
        found = groups[name]
        cells = [name, str(len(found)), f"{statistics.mean(run.steps for run in found):.0f}"]
        for point in range(1, points + 1):
            lengths = [run.curve[point][1] for run in found if point in run.curve]
            cells.append(spread(lengths, 3) if lengths else "")
        for size in sizes:
            speeds = [run.served[size] for run in found if size in run.served]
            cells.append(spread(speeds, 1) if speeds else "")
        lines.append("| " + " | ".join(cells) + " |")

    if sizes:
        alone = [[run.alone[size] for run in runs if size in run.alone] for size in sizes]
        cells = ["no draft", "", "", *[""] * points, *(f"{statistics.median(x):.1f}" for x in alone)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_json(runs: list[Run], settings: dict, machine) -> dict:
    return {"machine": machine, "settings": settings, "best": best(runs), "runs": [asdict(run) for run in runs]}


def draw(runs: list[Run], path: Path) -> None:
    """Acceptance over minutes, a line a run and a colour a variant; and speed in the server, if it ran."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    sizes = sorted({size for run in runs for size in run.served})
    figure = Figure(figsize=(9.0 if sizes else 5.5, 3.8), dpi=140, layout="constrained")
    left, *right = figure.subplots(1, 2 if sizes else 1, squeeze=False)[0]

    groups = by_draft(runs)
    colors = [colormaps["viridis"](0.9 * place / max(1, len(groups) - 1)) for place in range(len(groups))]
    for (name, found), color in zip(groups.items(), colors, strict=True):
        for number, run in enumerate(found):
            label = None if number else name
            left.plot(*zip(*run.curve.values(), strict=True), color=color, marker="o", markersize=3, label=label)
    left.set(xlabel="minutes of training", ylabel="tokens per target forward pass", title="Acceptance length")
    left.legend(frameon=False, fontsize=8)

    for axis in right:
        for place, (found, color) in enumerate(zip(groups.values(), colors, strict=True)):
            shown = [[run.served[size] for run in found if size in run.served] for size in sizes]
            where = [x + 0.8 * ((place + 0.5) / len(groups) - 0.5) for x in range(len(sizes))]
            heights = [statistics.mean(x) if x else 0 for x in shown]
            axis.bar(where, heights, width=0.8 / len(groups), color=color)
        for x, size in enumerate(sizes):
            alone = statistics.median(run.alone[size] for run in runs if size in run.alone)
            axis.hlines(alone, x - 0.4, x + 0.4, color="0.3", linestyle="--", label=None if x else "no draft")
        axis.set_xticks(range(len(sizes)), list(map(str, sizes)))
        axis.set(xlabel="requests in flight", ylabel="tokens per second", title="Speed in vLLM")
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)
