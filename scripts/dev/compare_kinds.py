"""Compare the kinds of draft: the same answers, the same minutes of training, acceptance over time, speed in vLLM.

    python scripts/dev/compare_kinds.py --out outputs/kinds --minutes 10 --plan   what it will run, and for how long
    python scripts/dev/compare_kinds.py --out outputs/kinds --minutes 10 --jobs 2

First it trains EAGLE-3 and DFlash with 1 and 2 layers and blocks of 4 and 8, with one seed, and serves them in a real
vLLM. Then EAGLE-3 and the DFlash that was fastest for one request get further seeds. Acceptance is measured on the
first prompts of MT-Bench while the clock stands still. All train on the target's own answers, which are made once.

`--jobs 2` trains two drafts side by side, each on its own half of the cores. All runs must meet the same conditions, so
a round that would leave cores idle trains one seed more. Speed is always measured alone, on all cores.

Writes `table.md`, `compared.json` and `compared.png` into `--out` after every round. Finished rounds are not repeated,
so the same command continues an interrupted comparison. Run it on an otherwise idle machine.
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent))

from comparing_kinds.timed import ROOT, Draft, TimedArguments, TimedRuns, ablate, report, shares  # noqa: E402


EAGLE3 = "EAGLE-3"
SERVED_MINUTES = 5  # roughly, of one draft
REQUESTS = (1, 4)


@dataclass
class ComparisonArguments(TimedArguments):
    serve: bool = field(default=True, metadata={"help": "Measure speed in vLLM."})
    eagle3: str = field(default="smollm2-135m-eagle3", metadata={"help": "Recipe of EAGLE-3."})
    dflash: str = field(default="smollm2-135m-dflash", metadata={"help": "Recipe of DFlash."})


class Comparison(TimedRuns):
    """What is to be run, what of it is done, and running it.

    Args:
        args: the arguments; relative paths start at the root of the repository.
    """

    def __init__(self, args: ComparisonArguments):
        from hf_eagle.arguments.yaml_files import read_yaml
        from hf_eagle.shipped import find_config

        recipes = {kind: read_yaml(find_config(getattr(args, kind), kind), kind) for kind in ("eagle3", "dflash")}
        variants = {EAGLE3: (recipes["eagle3"], {})}
        for layers in (1, 2):
            for size in (4, 8):
                changes = {"draft_num_layers": layers, "block_size": size, "share_k_norm": layers > 1}
                name = f"DFlash, {layers} layer{'s' * (layers > 1)}, blocks of {size}"
                variants[name] = (recipes["dflash"], changes)
        super().__init__(args, variants, ("eagle3", "dflash"))

    # ---- the order ----

    def first(self) -> list[Draft]:
        """Every variant once; if cores are left, further seeds of EAGLE-3, which it gets anyway."""
        runs = [(name, 0) for name in self.variants]
        return runs + [(EAGLE3, 1 + number) for number in range(-len(runs) % self.args.jobs)]

    def second(self, best: str) -> list[Draft]:
        """Further seeds of EAGLE-3 and of the best DFlash; if cores are left, still further ones of the latter."""
        found = [(name, seed) for seed in range(1, self.args.seeds) for name in (EAGLE3, best)]
        found = [run for run in found if run not in self.first()]
        return found + [(best, self.args.seeds + number) for number in range(-len(found) % self.args.jobs)]

    def served(self, run: Draft) -> bool:
        return not self.args.serve or (self.folder(run) / "serving.json").exists()

    def best_dflash(self) -> str | None:
        """The best variant of DFlash once all have been run."""
        runs = [run for run in self.first() if run[0] != EAGLE3]
        if not all(self.trained(run) and self.served(run) for run in runs):
            return None
        return report.best(self.read(runs))

    def described(self) -> str:
        """What is left to run, in lines, with its time."""
        groups = (self.first(), self.second(self.best_dflash() or "the best DFlash"))
        lines, minutes = self.plan(*groups)
        left = [run for runs in groups for run in runs if not self.served(run)]
        if left:
            minutes += SERVED_MINUTES * len(left)
            lines.append(f"serve {len(left)} of these, with {' and '.join(map(str, REQUESTS))} requests in flight")
        return "\n".join([*lines, f"In all about {minutes:.0f} minutes."])

    # ---- running ----

    def run(self) -> None:
        """Whatever is left."""
        self.begin()
        first = self.first()
        self.train_and_serve(first, first)
        second = self.second(self.best_dflash())
        self.train_and_serve(second, first + second)

    def train_and_serve(self, runs: list[Draft], known: list[Draft]) -> None:
        """Train these runs and serve their drafts, and write the result of all known ones after each."""
        self.go_through(runs, lambda: self.write(known))
        for run in runs:
            if not self.served(run):
                self.serve(run)
                self.write(known)

    def serve(self, run: Draft) -> None:
        folder = self.folder(run)
        print(f"serve {run[0]}, seed {run[1]}", flush=True)
        values = {"target": self.variants[run[0]][0]["target"], "draft": folder, "prompts": self.args.prompts}
        values |= {"num_prompts": self.args.num_prompts, "batch_sizes": ",".join(map(str, REQUESTS)), "rounds": 3}
        values |= {"dtype": self.dtype, "output_json": folder / "serving.json"}
        ablate.call(replace(self.args, jobs=1), "benchmark_serving.py", values, folder.with_suffix(".served.log"))


def main() -> None:
    from hf_eagle.arguments.parser import EagleArgumentParser

    (args,) = EagleArgumentParser(ComparisonArguments, description=__doc__).parse_args_and_config()
    os.chdir(ROOT)  # the recipes name assets/ and outputs/ of the repository
    shares(sorted(os.sched_getaffinity(0)), args.jobs)
    comparison = Comparison(args)
    print(comparison.described(), flush=True)
    if args.plan:
        return
    comparison.run()
    print(f"\n{(comparison.out / 'table.md').read_text()}\nTable, JSON and PNG are in {comparison.out}.")


if __name__ == "__main__":
    from hf_eagle.door.printer import run_verb

    run_verb(main)
