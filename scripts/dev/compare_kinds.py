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

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a clone works without installation

import ablate  # noqa: E402
from comparing_kinds import report  # noqa: E402

from hf_eagle.arguments.bounds import Bounds, Count, Repeats, Workers, check_numbers  # noqa: E402


EAGLE3 = "EAGLE-3"
# rough minutes beside the training: loading and measuring in a round, and one draft in the server
ROUND_MINUTES, SERVED_MINUTES = 2, 5
REQUESTS = (1, 4)


@dataclass
class ComparisonArguments:
    out: str = field(metadata={"help": "Folder for answers, drafts, table, JSON and picture."})
    minutes: Annotated[float, Bounds(above=0, most=100_000)] = field(
        default=10.0, metadata={"help": "Training time of every run."}
    )
    answer_minutes: Annotated[float, Bounds(above=0, most=100_000)] = field(
        default=20.0, metadata={"help": "Time for the target's answers, if they are not there."}
    )
    seeds: Repeats = field(default=3, metadata={"help": "Runs of EAGLE-3 and of the best DFlash."})
    jobs: Workers = field(default=1, metadata={"help": "Runs side by side, each on its own cores."})
    points: Count = field(default=5, metadata={"help": "Measurements of acceptance in a run."})
    plan: bool = field(default=False, metadata={"help": "Only print what would run, and how long it takes."})
    serve: bool = field(default=True, metadata={"help": "Measure speed in vLLM."})
    eagle3: str = field(default="smollm2-135m-eagle3", metadata={"help": "Recipe of EAGLE-3."})
    dflash: str = field(default="smollm2-135m-dflash", metadata={"help": "Recipe of DFlash."})
    questions: str = field(default="assets/prompts/train.jsonl", metadata={"help": "What the target answers."})
    max_new_tokens: Count = field(default=128, metadata={"help": "Longest answer to train on, in tokens."})
    prompts: str = field(default="assets/prompts/mt_bench.jsonl", metadata={"help": "What is measured on."})
    num_prompts: Count = field(default=20, metadata={"help": "So many of them."})

    __post_init__ = check_numbers


class Comparison:
    """What is to be run, what of it is done, and running it.

    Args:
        args: the arguments; relative paths start at the root of the repository.
    """

    def __init__(self, args: ComparisonArguments):
        self.args, self.out = args, Path(args.out)
        self.answers = self.out / "answers.jsonl"
        self.variants = {EAGLE3: (args.eagle3, {})}
        for layers in (1, 2):
            for size in (4, 8):
                changes = {"draft_num_layers": layers, "block_size": size, "share_k_norm": layers > 1}
                name = f"DFlash, {layers} layer{'s' * (layers > 1)}, blocks of {size}"
                self.variants[name] = (args.dflash, changes)
        self.settings = self._settings()

    def _settings(self) -> dict:
        """What all runs of a folder share; `ValueError` if the runs in it were made with something else."""
        from hf_eagle.door.json_files import read_json

        shared = ("minutes", "jobs", "points", "eagle3", "dflash", "prompts", "num_prompts", "questions")
        asked = {name: getattr(self.args, name) for name in (*shared, "max_new_tokens")}
        path = self.out / "settings.json"
        if not path.exists():
            return asked
        found = read_json(path, {"bf16": bool}, "delete the folder that it is in")
        for name, value in asked.items():
            if found.get(name) != value:
                raise ValueError(
                    f"`{name}` is {value}, but the runs in `out` {self.out} have {found.get(name)}: give that, or name "
                    "another folder."
                )
        return found

    # ---- the order ----

    def first(self) -> list[tuple[str, int]]:
        """Every variant once; if cores are left, further seeds of EAGLE-3, which it gets anyway."""
        runs = [(name, 0) for name in self.variants]
        return runs + [(EAGLE3, 1 + number) for number in range(-len(runs) % self.args.jobs)]

    def second(self, best: str) -> list[tuple[str, int]]:
        """Further seeds of EAGLE-3 and of the best DFlash; if cores are left, still further ones of the latter."""
        found = [(name, seed) for seed in range(1, self.args.seeds) for name in (EAGLE3, best)]
        found = [run for run in found if run not in self.first()]
        return found + [(best, self.args.seeds + number) for number in range(-len(found) % self.args.jobs)]

    def rounds(self, runs: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
        return [runs[place : place + self.args.jobs] for place in range(0, len(runs), self.args.jobs)]

    def folder(self, run: tuple[str, int]) -> Path:
        return self.out / ablate.slug(run[0]) / str(run[1])

    def trained(self, run: tuple[str, int]) -> bool:
        return (self.folder(run) / "trainer_state.json").exists()  # which training writes last

    def served(self, run: tuple[str, int]) -> bool:
        return not self.args.serve or (self.folder(run) / "serving.json").exists()

    def best_dflash(self) -> str | None:
        """The best variant of DFlash once all have been run."""
        runs = [run for run in self.first() if run[0] != EAGLE3]
        if not all(self.trained(run) and self.served(run) for run in runs):
            return None
        return report.best(self.read(runs))

    def read(self, runs: list[tuple[str, int]]) -> list[report.Run]:
        return [report.Run.read(*run, self.folder(run)) for run in runs if self.trained(run)]

    def plan(self) -> str:
        """What is left to run, in lines, with its time."""
        minutes = 0.0 if self.answers.exists() else self.args.answer_minutes
        lines = [] if self.answers.exists() else [f"the target answers {self.args.questions}: {minutes:g} minutes"]
        for runs in (self.first(), self.second(self.best_dflash() or "the best DFlash")):
            for together in self.rounds(runs):
                if not all(map(self.trained, together)):
                    told = " | ".join(f"{name}, seed {seed}" for name, seed in together)
                    minutes += self.args.minutes + ROUND_MINUTES
                    lines.append(f"train {told}: {self.args.minutes:g} minutes")
            left = [run for run in runs if not self.served(run)]
            if left:
                minutes += SERVED_MINUTES * len(left)
                lines.append(f"serve {len(left)} of these, with {' and '.join(map(str, REQUESTS))} requests in flight")
        return "\n".join([*lines, f"In all about {minutes:.0f} minutes."])

    # ---- running ----

    def run(self) -> None:
        """Whatever is left."""
        from hf_eagle.door.writing import write_output

        if "bf16" not in self.settings:
            import quickstart

            self.settings["bf16"] = quickstart.bfloat16_is_faster()
        self.out.mkdir(parents=True, exist_ok=True)
        write_output("out", self.out / "settings.json", json.dumps(self.settings, indent=2))
        if not self.answers.exists():
            self.make_answers()

        first = self.first()
        self.go_through(first, first)
        second = self.second(self.best_dflash())
        self.go_through(second, first + second)

    def go_through(self, runs: list[tuple[str, int]], known: list[tuple[str, int]]) -> None:
        """Train these runs and serve their drafts, and write the result of all known ones after each.

        A round of which a run is missing is trained whole: alone, that run would have met a quieter machine.
        """
        cores = shares(sorted(os.sched_getaffinity(0)), self.args.jobs)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            for together in self.rounds(runs):
                if not all(map(self.trained, together)):
                    for run in together:
                        (self.folder(run) / "serving.json").unlink(missing_ok=True)
                    list(pool.map(self.train, together, cores))
                    self.write(known)

        for run in runs:
            if not self.served(run):
                self.serve(run)
                self.write(known)

    def make_answers(self) -> None:
        recipe = self.recipe(EAGLE3)
        values = {"target": recipe["target"], "data": self.args.questions, "output": self.answers}
        values |= {"held_out": self.args.prompts, "max_new_tokens": self.args.max_new_tokens}
        values |= {"time_limit": self.args.answer_minutes, "dtype": self.dtype}
        print("the target answers", flush=True)
        ablate.call(replace(self.args, jobs=1), "regenerate_answers.py", values, self.out / "answers.log")

    def train(self, run: tuple[str, int], cores: list[int]) -> None:
        import yaml

        from hf_eagle.door.writing import write_output

        config = self.folder(run).with_suffix(".yaml")
        print(f"train {run[0]}, seed {run[1]}, on cores {', '.join(map(str, cores))}", flush=True)
        write_output("out", config, yaml.safe_dump(self.training(run)))
        values = {"config": config, "minutes": self.args.minutes, "points": self.args.points}
        values["cores"] = ",".join(map(str, cores))
        ablate.call(self.args, "dev/comparing_kinds/clocked.py", values, config.with_suffix(".log"))

    def training(self, run: tuple[str, int]) -> dict:
        """The arguments of a run: the clock ends it, and sets the learning rate beside a constant one."""
        name, seed = run
        values = {"train_data": [str(self.answers)], "output_dir": str(self.folder(run)), "seed": seed}
        values |= {"max_steps": 10**8, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_strategy": "no"}
        values |= {"acceptance_prompts": self.args.prompts, "acceptance_num_prompts": self.args.num_prompts}
        values |= {"acceptance_steps": 10**8, "overwrite": True, "disable_tqdm": True}
        values |= {"bf16": self.settings["bf16"], "target_dtype": self.dtype}
        return self.recipe(name) | self.variants[name][1] | values

    def recipe(self, name: str) -> dict:
        from hf_eagle.arguments.yaml_files import read_yaml
        from hf_eagle.shipped import find_config

        kind = "eagle3" if name == EAGLE3 else "dflash"
        return read_yaml(find_config(self.variants[name][0], kind), kind)

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.settings["bf16"] else "float32"

    def serve(self, run: tuple[str, int]) -> None:
        folder = self.folder(run)
        print(f"serve {run[0]}, seed {run[1]}", flush=True)
        values = {"target": self.recipe(run[0])["target"], "draft": folder, "prompts": self.args.prompts}
        values |= {"num_prompts": self.args.num_prompts, "batch_sizes": ",".join(map(str, REQUESTS)), "rounds": 3}
        values |= {"dtype": self.dtype, "output_json": folder / "serving.json"}
        ablate.call(replace(self.args, jobs=1), "benchmark_serving.py", values, folder.with_suffix(".served.log"))

    def write(self, known: list[tuple[str, int]]) -> None:
        """Write table, JSON and picture of what is done."""
        from hf_eagle.door.writing import output, write_output
        from hf_eagle.hub.run_facts import machine

        runs = self.read(known)
        write_output("out", self.out / "table.md", report.table(runs, self.args.minutes, self.args.points))
        found = report.as_json(runs, self.settings, machine())
        write_output("out", self.out / "compared.json", json.dumps(found, indent=1))
        with output("out", self.out / "compared.png") as part:
            report.draw(runs, part)


def shares(cores: list[int], jobs: int) -> list[list[int]]:
    """The cores of each job, equally many; `ValueError` if there are too few."""
    if len(cores) < jobs:
        raise ValueError(f"`jobs` is {jobs}, but there are {len(cores)} cores: each run needs one of its own.")
    each = len(cores) // jobs
    return [cores[place * each : (place + 1) * each] for place in range(jobs)]


def main() -> None:
    from hf_eagle.arguments.parser import EagleArgumentParser

    (args,) = EagleArgumentParser(ComparisonArguments, description=__doc__).parse_args_and_config()
    os.chdir(ROOT)  # the recipes name assets/ and outputs/ of the repository
    shares(sorted(os.sched_getaffinity(0)), args.jobs)
    comparison = Comparison(args)
    print(comparison.plan(), flush=True)
    if args.plan:
        return
    comparison.run()
    print(f"\n{(comparison.out / 'table.md').read_text()}\nTable, JSON and PNG are in {comparison.out}.")


if __name__ == "__main__":
    from hf_eagle.door.printer import run_verb

    run_verb(main)
