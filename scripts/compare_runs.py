"""Plot the loss of several training runs in one figure, and print how far each is from the first.

    python scripts/compare_runs.py --runs outputs/float32 outputs/bf16 --output_png curves.png

Each run is an output folder (or a checkpoint) that holds `trainer_state.json`. For comparison, the noise of the first
run is printed too: how much its loss differs from one log to the next.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.door.printer import run_verb


MOST_DRAWN = 1e100  # of what is larger, matplotlib cannot compute an axis


@dataclass
class CompareArguments:
    runs: list[str] = field(metadata={"help": "Output folders of training runs; others are compared with the first."})
    output_png: str = field(metadata={"help": "The picture to write."})


def parser():
    from hf_eagle.arguments.parser import EagleArgumentParser

    return EagleArgumentParser(CompareArguments, description=__doc__)


def door(argv: list[str] | None = None) -> CompareArguments:
    """Return the arguments, after checking every path."""
    from hf_eagle.door.inputs import check_folder
    from hf_eagle.door.outputs import check_output_file, is_png

    (args,) = parser().parse_args_and_config(argv)
    for run in args.runs:
        check_folder("runs", run)
    if not args.output_png.lower().endswith(".png"):
        raise ValueError(f"`output_png` {args.output_png} does not end in .png: name a file that does.")
    inside = any(Path(args.output_png).resolve().is_relative_to(Path(run).resolve()) for run in args.runs)
    # a run holds pictures of its own, which its card shows
    check_output_file("output_png", args.output_png, {"runs": args.runs}, is_comparison if inside else is_png)
    return args


def is_comparison(path: Path) -> bool:
    """Return whether a file was written by this verb."""
    from hf_eagle.evaluation.plots import COMPARISON

    with path.open("rb") as file:
        return f"Title\0{COMPARISON}".encode() in file.read(4096)  # PNG has its texts before the picture


def main() -> None:
    args = door()

    from hf_eagle.door.writing import output
    from hf_eagle.evaluation.plots import plot_runs

    curves = read_curves(args.runs)
    (first, (steps, losses)), *others = curves.items()
    unrest = [abs(b - a) for a, b in zip(losses, losses[1:], strict=False)]
    unrest = sum(unrest) / max(1, len(unrest))
    print(f"{first}: last loss {losses[-1]:.4f}, {unrest:.4f} from one log to the next")
    for name, (other_steps, other_losses) in others:
        common = {s: loss for s, loss in zip(other_steps, other_losses, strict=True)}
        gaps = [common[s] - loss for s, loss in zip(steps, losses, strict=True) if s in common]
        if not gaps:
            raise ValueError(f"{name} and {first} logged no step in common: give runs with the same `logging_steps`.")
        mean = sum(gaps) / len(gaps)
        spread = sum(abs(gap) for gap in gaps) / len(gaps)
        print(f"{name}: last loss {other_losses[-1]:.4f}; {spread:.4f} apart on average, {mean:+.4f} in one direction")
    with output("output_png", args.output_png) as part:
        plot_runs(curves, part)
    print(f"wrote {args.output_png}")


def read_curves(runs: list[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and losses of each run, by its folder's name, or by its path where two names are the same."""
    from hf_eagle.door.json_files import read_json
    from hf_eagle.evaluation.plots import series

    paths = {Path(run).resolve(): run for run in runs}
    names = Counter(path.name for path in paths)
    fields, curves = {"log_history": [{"step?": int, "loss?": float}]}, {}
    for path, run in paths.items():
        file = path / "trainer_state.json"
        if not file.is_file():
            raise ValueError(
                f"`runs` names {run}, which holds no trainer_state.json: give folders that training wrote."
            )
        mend = "give folders that training wrote in `runs`"
        steps, losses = series(read_json(file, fields, mend)["log_history"], "loss")
        if not losses:
            raise ValueError(f"{file} logs no `loss` in its `log_history`: {mend}.")
        for step, loss in zip(steps, losses, strict=True):
            if MOST_DRAWN < abs(loss) < float("inf") or abs(step) > MOST_DRAWN:  # NaN and infinity become gaps
                raise ValueError(f"{file} logs a `loss` of {loss:g} at step {step:g}, which cannot be drawn: {mend}.")
        curves[path.name if names[path.name] == 1 else str(path)] = steps, losses
    return curves


if __name__ == "__main__":
    run_verb(main)
