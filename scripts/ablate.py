"""Compare variants of a recipe: train each for the same time, and measure the drafts by decoding.

    python scripts/ablate.py --recipe training_args/smollm2-135m-eagle3.yaml --variants variants.yaml \
        --prompts held_out.jsonl --minutes 4 --seeds 3 --output_dir outputs/ablation

The file of variants holds one line per variant, with the arguments of the recipe that it changes:

    recipe: {}
    ttt 5: {ttt_steps: 5}
    eagle1: {method: eagle1, draft_vocab_size: null, ttt_steps: null, feature_store: outputs/features-eagle1}

Two short runs of each variant show how many steps fit into the time (the faster run counts, as it was disturbed less);
the variant's learning rate schedule ends at that step. Finished runs in `output_dir` are not repeated, so the same
command continues an interrupted comparison. The arguments of all variants are checked before the first is trained; a
run that fails later does not stop the others. Do not use the prompts of your final measurement as `prompts`, or that
measurement will be biased.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Bounds, Count, Repeats, Rows, Workers, check_numbers
from hf_eagle.door.json_files import read_json
from hf_eagle.door.printer import run_verb
from hf_eagle.door.writing import writing


ROOT = Path(__file__).resolve().parents[1]


# arguments of the recipe that a draft is measured with, too
AS_TRAINED = ("target", "target_revision", "gguf_file", "trust_remote_code", "chat_template_kwargs", "tools")
TABLE = "table.md"
DELETE = "delete the folder that it is in, to have that run done again"
TRIALS = 2
TRIAL_STEPS = 20  # enough for a step's time to within a few per cent: packed steps are all alike


@dataclass
class AblationArguments:
    recipe: str = field(metadata={"help": "Recipe of scripts/train_eagle.py that the variants change."})
    variants: str = field(metadata={"help": "YAML file: for each variant's name, the arguments that it changes."})
    prompts: str = field(metadata={"help": "Prompts to measure acceptance on."})
    output_dir: str = field(metadata={"help": "Folder for the drafts, the measurements and the table."})
    minutes: Annotated[float, Bounds(above=0, most=100_000)] = field(
        default=4.0, metadata={"help": "Training time of every run, not counting data preparation."}
    )
    seeds: Repeats = field(default=1, metadata={"help": "Runs of every variant, with seeds 0, 1, ..."})
    num_prompts: Count = field(default=64, metadata={"help": "Number of prompts to use, beginning with the first."})
    max_new_tokens: Count = field(default=64, metadata={"help": "Longest answer, in tokens."})
    batch_size: Rows = field(default=16, metadata={"help": "Number of prompts decoded together."})
    jobs: Workers = field(
        default=1, metadata={"help": "Number of simultaneous runs, which share the machine's cores evenly."}
    )

    __post_init__ = check_numbers


def parser():
    from hf_eagle.arguments.parser import EagleArgumentParser

    return EagleArgumentParser(AblationArguments, description=__doc__)


def door(argv: list[str] | None = None) -> tuple[AblationArguments, dict[str, dict], list]:
    """The arguments, the variants and what each trains, once all was read that a run would miss only when it begins."""
    from hf_eagle.door.inputs import check_file, naming
    from hf_eagle.door.outputs import begins_with, check_output_file, check_output_folder
    from hf_eagle.evaluation.prompts import load_prompts
    from hf_eagle.shipped import find_config

    (args,) = parser().parse_args_and_config(argv)
    check_file("recipe", find_config(args.recipe, "recipe"))
    recipe_of(args)
    variants = read_variants(Path(args.variants))
    check_file("prompts", args.prompts)
    with naming("prompts"):
        load_prompts(args.prompts, limit=args.num_prompts)

    reads = {name: getattr(args, name) for name in ("recipe", "variants", "prompts")}
    check_output_folder("output_dir", args.output_dir, reads)
    check_output_file("output_dir", Path(args.output_dir) / TABLE, reads, begins_with(b"| variant"), levels=None)
    return args, variants, [checked(args, name, changes) for name, changes in variants.items()]


def checked(args: AblationArguments, name: str, changes: dict):
    """The `RunArguments` of a variant, parsed and checked as scripts/train_eagle.py does; `ValueError` names both."""
    from hf_eagle.door.writing import write_output
    from hf_eagle.training.run_arguments import RunArguments

    parser = RunArguments.parser()

    def refuse(message: str):
        raise ValueError(message)

    parser.error = refuse
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / "variant.yaml"
        folder = Path(args.output_dir) / slug(name) / "trial-0"
        write_output("TMPDIR", config, training_of(args, folder, changes, TRIAL_STEPS, 0))
        try:
            run = RunArguments(*parser.parse_args_and_config(["--config", str(config)]))
            run.refuse_other_methods()
            run.check_paths()
            run.refuse_before_loading()
        except (OSError, ValueError) as problem:
            said = re.sub(f"(`--config` )?{re.escape(str(config))}:? ?", "", str(problem))
            raise ValueError(f"`variants` {args.variants}: {name!r} cannot be trained: {said}") from problem
    return run


def check_measurements(args: AblationArguments, runs: list) -> None:
    """Raise `OSError` or `ValueError` for a target that cannot be read, or that cannot take prompts and answers."""
    from hf_eagle.door.inputs import naming
    from hf_eagle.evaluation.prompt_batches import check_rendering, holds_media
    from hf_eagle.evaluation.prompts import load_prompts
    from hf_eagle.targets.loading import load_tokenizer
    from hf_eagle.targets.room import check_room

    with naming("prompts"):
        prompts = load_prompts(args.prompts, limit=args.num_prompts)
    seen = []
    for run in runs:
        target, source, template_kwargs = run.target.target, run.target.source, run.data.template_kwargs
        if (target, source, template_kwargs) not in seen:
            seen.append((target, source, template_kwargs))
            check_room(target, "max_new_tokens", args.max_new_tokens, beside=1, **source)
            tokenizer = load_tokenizer(target, **source)
            check_rendering([prompt for prompt in prompts if not holds_media(prompt)], tokenizer, template_kwargs)


def main() -> None:
    from hf_eagle.door.writing import write_output

    args, variants, runs = door()
    check_measurements(args, runs)
    results = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        steps = dict(finished(pool, lambda name: steps_of(args, name, variants[name]), variants))
        runs = [(name, seed) for seed in range(args.seeds) for name in steps]
        work = lambda run: measured(args, run, variants[run[0]], steps[run[0]])  # noqa: E731
        for (name, _), result in finished(pool, work, runs):
            results.setdefault(name, []).append(result)
            write_output("output_dir", Path(args.output_dir) / TABLE, table(results))
    print(table(results))
    wanted, done = args.seeds * len(variants), sum(map(len, results.values()))
    if done < wanted:
        raise RuntimeError(
            f"`output_dir` {args.output_dir}: {wanted - done} of {wanted} runs failed, with the errors above: the same "
            "command tries them again."
        )


def finished(pool: ThreadPoolExecutor, work: Callable, items: Iterable) -> Iterator[tuple]:
    """Yield `(item, work(item))` in order; print a failure, and go on with the others."""
    for item, future in [(item, pool.submit(work, item)) for item in items]:
        try:
            yield item, future.result()
        except (OSError, RuntimeError, ValueError) as problem:
            print(f"{item}: {problem}", file=sys.stderr, flush=True)


def read_variants(path: Path) -> dict[str, dict]:
    """Return what each variant changes; raise `ValueError` if there are none, or two would share a folder."""
    from hf_eagle.arguments.yaml_files import read_yaml
    from hf_eagle.door.inputs import check_file

    check_file("variants", path)
    variants = read_yaml(path, "variants")
    if not variants or not all(isinstance(changes, dict) for changes in variants.values()):
        raise ValueError(
            f"`variants` must map names to arguments, as `ttt 5: {{ttt_steps: 5}}`, which {path} does not."
        )
    folders: dict[str, str] = {}
    for name in variants:
        if not isinstance(name, str):
            raise ValueError(f"`variants` {path}: a variant's name must be text, but is {name!r}: put it in quotes.")
        if not slug(name).strip("."):
            raise ValueError(f"`variants` {path}: {name!r} names no folder: give the variant letters or digits.")
        other = folders.setdefault(slug(name), name)
        if other != name:
            raise ValueError(f"`variants` {path}: {other!r} and {name!r} would share the folder {slug(name)}.")
    return variants


def steps_of(args: AblationArguments, name: str, changes: dict) -> int:
    """Return how many optimizer steps of a variant fit into the time."""
    found = []
    for folder in (Path(args.output_dir) / slug(name) / f"trial-{n}" for n in range(TRIALS)):
        if not (folder / "train_results.json").exists():
            train(args, folder, changes, TRIAL_STEPS, 0)
        results = read_json(folder / "train_results.json", {"train_runtime": float}, DELETE)
        found.append(results["train_runtime"] / TRIAL_STEPS)
    return max(1, round(60 * args.minutes / min(found)))


def measured(args: AblationArguments, run: tuple[str, int], changes: dict, steps: int) -> dict:
    """Train and measure, unless that is done, and return the results of both."""
    name, seed = run
    folder = Path(args.output_dir) / slug(name) / str(seed)
    if not (folder / "acceptance.json").exists():
        # a training writes its state last, and is not done again where only the measurement was interrupted
        if not (folder / "trainer_state.json").exists():
            train(args, folder, changes, steps, seed)
        recipe = recipe_of(args) | changes
        values = {
            **{name: recipe[name] for name in AS_TRAINED if recipe.get(name) is not None},
            **{"draft": folder, "prompts": args.prompts, "dtype": "bfloat16"},
            **{name: getattr(args, name) for name in ("num_prompts", "max_new_tokens", "batch_size")},
            **{"compare_to_target": False, "output_json": folder / "acceptance.json"},
        }
        call(args, "evaluate_draft.py", values, folder.with_suffix(".measured.log"))
    found = read_json(folder / "acceptance.json", {"acceptance_length": float}, DELETE)
    trained = read_json(folder / "all_results.json", {}, DELETE)
    estimate = trained.get("eval_estimated_acceptance_length")
    length = found["acceptance_length"]
    print(f"{name}, seed {seed}: {steps} steps, acceptance length {length:.3f}", flush=True)
    return {"steps": steps, "minutes": trained["train_runtime"] / 60, "estimate": estimate, "length": length}


def train(args: AblationArguments, folder: Path, changes: dict, steps: int, seed: int) -> None:
    from hf_eagle.door.writing import write_output

    config = folder.with_suffix(".yaml")
    write_output("output_dir", config, training_of(args, folder, changes, steps, seed))
    call(args, "train_eagle.py", {"config": config}, folder.with_suffix(".log"))


def training_of(args: AblationArguments, folder: Path, changes: dict, steps: int, seed: int) -> str:
    """Write the YAML file of a run and return its path."""
    import yaml

    run = {"output_dir": str(folder), "max_steps": steps, "seed": seed, "save_strategy": "no", "overwrite": True}
    return yaml.safe_dump(recipe_of(args) | changes | run)


def call(args: AblationArguments, script: str, values: dict, log: Path) -> None:
    """Run one of our scripts; its output goes into the log."""
    command = [sys.executable, str(ROOT / "scripts" / script)]
    for name, value in values.items():
        command += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    with writing("output_dir", log):
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("w")
    with output:
        done = subprocess.run(command, env=threads | os.environ, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"scripts/{script} failed ({log} has all that it printed): {last_words(log)}")


def last_words(log: Path) -> str:
    """Return the line in which a script said why it ended, or else its last line."""
    lines = log.read_text(errors="replace").split("\n")
    told = [line for line in lines if line.startswith("error: ") or ": error: " in line] or [
        line for line in lines if line.strip()
    ]
    return told[-1].removeprefix("error: ") if told else "it printed nothing."


def recipe_of(args: AblationArguments) -> dict:
    from hf_eagle.arguments.yaml_files import read_yaml
    from hf_eagle.shipped import find_config

    return read_yaml(find_config(args.recipe, "recipe"), "recipe")


def slug(name: str) -> str:
    return "".join(character if character.isalnum() or character in ".-" else "-" for character in name)


def table(results: dict[str, list[dict]]) -> str:
    """Return a Markdown table, best first, with the standard deviation over seeds, of each variant and of all."""
    lines = ["| variant | steps | minutes | estimate | acceptance length |", "|---|---|---|---|---|"]
    lengths = {name: [run["length"] for run in runs] for name, runs in results.items()}
    mean = {name: statistics.mean(found) for name, found in lengths.items()}
    for name in sorted(results, key=mean.get, reverse=True):
        runs = results[name]
        spread = f" ± {statistics.stdev(lengths[name]):.3f}" if len(runs) > 1 else ""
        estimates = [run["estimate"] for run in runs if run["estimate"] is not None]
        estimate = f"{statistics.mean(estimates):.3f}" if estimates else ""
        minutes = statistics.mean(run["minutes"] for run in runs)
        lines.append(f"| {name} | {runs[0]['steps']} | {minutes:.1f} | {estimate} | {mean[name]:.3f}{spread} |")
    if freedom := sum(len(found) - 1 for found in lengths.values()):
        pooled = (
            sum((length - mean[name]) ** 2 for name, found in lengths.items() for length in found) / freedom
        ) ** 0.5
        lines += [
            "",
            f"Over seeds a run's length has a standard deviation of {pooled:.3f} ({freedom} degrees of freedom).",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_verb(main)
