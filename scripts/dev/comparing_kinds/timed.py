"""Train drafts for equal minutes, side by side on shares of the cores, on the target's own answers."""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated


ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts" / "dev")]

import ablate  # noqa: E402

from comparing_kinds import report  # noqa: E402
from hf_eagle.arguments.bounds import Bounds, Count, Repeats, Workers, check_numbers  # noqa: E402


ROUND_MINUTES = 2  # roughly, beside the training: loading and measuring
SHARED = ("minutes", "jobs", "points", "prompts", "num_prompts", "questions", "max_new_tokens")

Draft = tuple[str, int]  # name of a variant, and a seed


@dataclass
class TimedArguments:
    out: str = field(metadata={"help": "Folder for answers, drafts, table, JSON and picture."})
    minutes: Annotated[float, Bounds(above=0, most=100_000)] = field(
        default=10.0, metadata={"help": "Training time of every run."}
    )
    answer_minutes: Annotated[float, Bounds(above=0, most=100_000)] = field(
        default=20.0, metadata={"help": "Time for the target's answers, if they are not there."}
    )
    seeds: Repeats = field(default=3, metadata={"help": "Runs of what is compared, each with a seed of its own."})
    jobs: Workers = field(default=1, metadata={"help": "Runs side by side, each on its own cores."})
    points: Count = field(default=5, metadata={"help": "Measurements of acceptance in a run."})
    plan: bool = field(default=False, metadata={"help": "Only print what would run, and how long it takes."})
    questions: str = field(default="assets/prompts/train.jsonl", metadata={"help": "What the target answers."})
    max_new_tokens: Count = field(default=128, metadata={"help": "Longest answer to train on, in tokens."})
    prompts: str = field(default="assets/prompts/mt_bench.jsonl", metadata={"help": "What is measured on."})
    num_prompts: Count = field(default=20, metadata={"help": "So many of them."})

    __post_init__ = check_numbers


class TimedRuns:
    """Runs in a folder: what is done of them, and running what is left.

    Args:
        args: the arguments; relative paths start at the root of the repository.
        variants: name -> the recipe, as read, and what is changed in it.
        shared: names of further arguments that all runs of a folder must have in common.
    """

    def __init__(self, args: TimedArguments, variants: dict[str, tuple[dict, dict]], shared: tuple[str, ...] = ()):
        self.args, self.variants, self.out = args, variants, Path(args.out)
        self.answers = self.out / "answers.jsonl"
        self.settings = self._settings((*SHARED, *shared))

    def _settings(self, shared: tuple[str, ...]) -> dict:
        """What all runs of a folder share; `ValueError` if the runs in it were made with something else."""
        from hf_eagle.door.json_files import read_json

        asked = {name: getattr(self.args, name) for name in shared}
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

    def rounds(self, runs: list[Draft]) -> list[list[Draft]]:
        return [runs[place : place + self.args.jobs] for place in range(0, len(runs), self.args.jobs)]

    def folder(self, run: Draft) -> Path:
        return self.out / ablate.slug(run[0]) / str(run[1])

    def trained(self, run: Draft) -> bool:
        return (self.folder(run) / "trainer_state.json").exists()  # which training writes last

    def read(self, runs: list[Draft]) -> list[report.Run]:
        return [report.Run.read(*run, self.folder(run)) for run in runs if self.trained(run)]

    def plan(self, *groups: list[Draft]) -> tuple[list[str], float]:
        """What is left to train, in lines, with its minutes."""
        minutes = 0.0 if self.answers.exists() else self.args.answer_minutes
        lines = [] if self.answers.exists() else [f"the target answers {self.args.questions}: {minutes:g} minutes"]
        for together in (each for runs in groups for each in self.rounds(runs)):
            if not all(map(self.trained, together)):
                told = " | ".join(f"{name}, seed {seed}" for name, seed in together)
                minutes += self.args.minutes + ROUND_MINUTES
                lines.append(f"train {told}: {self.args.minutes:g} minutes")
        return lines, minutes

    def begin(self) -> None:
        """Make the folder, with its settings and the target's answers."""
        from hf_eagle.door.writing import write_output

        if "bf16" not in self.settings:
            import quickstart

            self.settings["bf16"] = quickstart.bfloat16_is_faster()
        self.out.mkdir(parents=True, exist_ok=True)
        write_output("out", self.out / "settings.json", json.dumps(self.settings, indent=2))
        if not self.answers.exists():
            self.make_answers()

    def go_through(self, runs: list[Draft], write: Callable[[], None]) -> None:
        """Train these runs, and write the result after each round.

        A round of which a run is missing is trained whole: alone, that run would have met a quieter machine.
        """
        cores = shares(sorted(os.sched_getaffinity(0)), self.args.jobs)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            for together in self.rounds(runs):
                if not all(map(self.trained, together)):
                    for run in together:
                        (self.folder(run) / "serving.json").unlink(missing_ok=True)
                    list(pool.map(self.train, together, cores))
                    write()

    def make_answers(self) -> None:
        (target,) = {recipe["target"] for recipe, _ in self.variants.values()}
        values = {"target": target, "data": self.args.questions, "output": self.answers}
        values |= {"held_out": self.args.prompts, "max_new_tokens": self.args.max_new_tokens}
        values |= {"time_limit": self.args.answer_minutes, "dtype": self.dtype}
        print("the target answers", flush=True)
        ablate.call(replace(self.args, jobs=1), "regenerate_answers.py", values, self.out / "answers.log")

    def train(self, run: Draft, cores: list[int]) -> None:
        import yaml

        from hf_eagle.door.writing import write_output

        config = self.folder(run).with_suffix(".yaml")
        print(f"train {run[0]}, seed {run[1]}, on cores {', '.join(map(str, cores))}", flush=True)
        write_output("out", config, yaml.safe_dump(self.training(run)))
        values = {"config": config, "minutes": self.args.minutes, "points": self.args.points}
        values["cores"] = ",".join(map(str, cores))
        ablate.call(self.args, "dev/comparing_kinds/clocked.py", values, config.with_suffix(".log"))

    def training(self, run: Draft) -> dict:
        """The arguments of a run: the clock ends it, and sets the learning rate beside a constant one."""
        name, seed = run
        values = {"train_data": [str(self.answers)], "output_dir": str(self.folder(run)), "seed": seed}
        values |= {"max_steps": 10**8, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_strategy": "no"}
        values |= {"acceptance_prompts": self.args.prompts, "acceptance_num_prompts": self.args.num_prompts}
        values |= {"acceptance_steps": 10**8, "overwrite": True, "disable_tqdm": True}
        values |= {"bf16": self.settings["bf16"], "target_dtype": self.dtype}
        recipe, changes = self.variants[name]
        return recipe | changes | values

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.settings["bf16"] else "float32"

    def write(self, known: list[Draft]) -> None:
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
