"""Compare ways to train a draft by what they reach in equal minutes: the same answers, acceptance over time.

    python scripts/dev/time_to_acceptance.py --out outputs/ways --minutes 5 --jobs 2 \
        --recipes smollm2-135m-eagle3 scripts/dev/comparing_kinds/padded.yaml

`--recipes` names configs of `hf-eagle train`, of this package or by path; the second one here is the way that others
publish, in this code: a chat a row, padded, with their learning rate and TTT steps. Their data, length of training and
schedule are not used: each run trains for `--minutes` on the target's own answers, which are made once, and a clock
sets its learning rate. Acceptance is measured on the first prompts of MT-Bench while the clock stands still.

Writes `table.md`, `compared.json` and `compared.png` into `--out` after every round, and prints after how many minutes
each way reaches what the slowest one has in the end. Finished rounds are not repeated, so the same command continues an
interrupted comparison. Run it on an otherwise idle machine.
"""

import os
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent))

from comparing_kinds.timed import ROOT, Draft, TimedArguments, TimedRuns, report, shares  # noqa: E402


@dataclass
class WaysArguments(TimedArguments):
    recipes: list[str] = field(
        default_factory=lambda: ["smollm2-135m-eagle3", "scripts/dev/comparing_kinds/padded.yaml"],
        metadata={"help": "Configs of `hf-eagle train`: names, or paths."},
    )


class Ways(TimedRuns):
    """Several recipes, trained for the same minutes.

    Raises:
        ValueError: for recipes of one name, or of several targets.
    """

    def __init__(self, args: WaysArguments):
        from hf_eagle.arguments.yaml_files import read_yaml
        from hf_eagle.shipped import find_config

        files = [find_config(path, "recipes") for path in args.recipes]
        variants = {Path(file).stem: (read_yaml(file, "recipes"), {}) for file in files}
        if len(variants) < len(args.recipes):
            raise ValueError(f"`recipes` {' '.join(args.recipes)} have one name twice: rename a file.")
        targets = dict.fromkeys(recipe.get("target") for recipe, _ in variants.values())
        if len(targets) > 1:
            raise ValueError(f"`recipes` are for several targets ({', '.join(map(str, targets))}): name those of one.")
        super().__init__(args, variants, ("recipes",))

    def runs(self) -> list[Draft]:
        """Every recipe with every seed; if cores are left, still further seeds."""
        found = [(name, seed) for seed in range(self.args.seeds) for name in self.variants]
        more = -len(found) % self.args.jobs
        return found + [(name, self.args.seeds) for name in list(self.variants)[:more]]

    def run(self) -> None:
        """Whatever is left."""
        self.begin()
        runs = self.runs()
        self.go_through(runs, lambda: self.write(runs))
        self.write(runs)


def minutes_to(length: float, curve: Mapping[int, tuple[float, float]]) -> float | None:
    """Minutes of training after which a run has this acceptance length; `None` if it never has.

    Between two measurements it grows evenly; an untrained draft has 1.
    """
    before = (0.0, 1.0)
    for minutes, reached in (curve[point] for point in sorted(curve)):
        if reached >= length:
            share = (length - before[1]) / (reached - before[1]) if reached > before[1] else 1.0
            return before[0] + share * (minutes - before[0])
        before = (minutes, reached)
    return None


def told(runs: list[report.Run]) -> str:
    """After how many minutes each recipe reaches what the slowest one has in the end."""
    ways = report.by_draft(runs)
    ends = {name: statistics.mean(run.curve[max(run.curve)][1] for run in found) for name, found in ways.items()}
    slowest = min(ends, key=ends.get)
    lines = [f"In the end {slowest} has an acceptance length of {ends[slowest]:.3f}."]
    for name, found in ways.items():
        reached = [minutes_to(ends[slowest], run.curve) for run in found]
        if name != slowest and None not in reached:
            minutes = statistics.mean(reached)
            lines.append(f"{name} has it after {minutes:.1f} minutes, and {ends[name]:.3f} in the end.")
    return "\n".join(lines)


def main() -> None:
    from hf_eagle.arguments.parser import EagleArgumentParser

    (args,) = EagleArgumentParser(WaysArguments, description=__doc__).parse_args_and_config()
    os.chdir(ROOT)  # the recipes name assets/ and outputs/ of the repository
    shares(sorted(os.sched_getaffinity(0)), args.jobs)
    ways = Ways(args)
    lines, minutes = ways.plan(ways.runs())
    print("\n".join([*lines, f"In all about {minutes:.0f} minutes."]), flush=True)
    if args.plan:
        return

    ways.run()
    runs = ways.read(ways.runs())
    print(f"\n{(ways.out / 'table.md').read_text()}\n{told(runs)}\nTable, JSON and PNG are in {ways.out}.")


if __name__ == "__main__":
    from hf_eagle.door.printer import run_verb

    run_verb(main)
