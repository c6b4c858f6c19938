"""
Train, measure and describe an EAGLE-3 draft for SmolLM2-135M-Instruct, from nothing to a folder that servers load.

    python scripts/quickstart.py            (or: make quickstart)

    1  assets      the target and prompts, into assets/
    2  answers     the target answers the prompts itself: a draft must learn the target's own words
    3  training    scripts/train_eagle.py with training_args/smollm2-135m-eagle3.yaml
    4  acceptance  MT-Bench questions, which training never saw, decoded with the draft
    5  model card  training's README.md, with what was measured and what the data hold

Every stage re-uses what an earlier run finished and continues what it left half done. QUICKSTART_SHORT=1 goes the
whole way in a few minutes, in outputs/quickstart-short: a check of the machinery, not of the draft.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Bounds, Count, Depth, Rows, check_numbers
from hf_eagle.door.inputs import naming
from hf_eagle.door.json_files import read_json
from hf_eagle.door.printer import run_verb
from hf_eagle.door.writing import write_output


ROOT = Path(__file__).resolve().parents[1]
# what its files hold
STAGES = {str: {"settings": dict, "minutes": float | None, "done": bool}}
ACCEPTANCE = {"acceptance_length": float | None, "num_speculative_tokens": int, "drafts": int}

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT_SET = "MT-Bench, first turns"
SHORT = {
    "output_dir": "outputs/quickstart-short",
    "num_prompts": 48,
    "max_new_tokens": 32,
    "train_options": "--max_steps 20 --save_steps 10 --logging_steps 5 --draft_vocab_size 256",
    "eval_prompts": 4,
    "eval_new_tokens": 32,
}


@dataclass
class QuickstartArguments:
    """What the quickstart does; the recipe itself is in `train_config`."""

    output_dir: str = field(
        default="outputs/quickstart",
        metadata={"help": "The draft's folder. Answers lie beside it, in OUTPUT_DIR-data."},
    )
    assets_dir: str = field(default="assets", metadata={"help": "Where the target and the prompts are, or will be."})
    num_prompts: Count = field(default=2200, metadata={"help": "Prompts that the target answers, at most."})
    answer_minutes: Annotated[float, Bounds(above=0, most=100_000)] = field(
        default=7.0, metadata={"help": "Stop answering after so long; training takes what is there."}
    )
    max_new_tokens: Count = field(default=128, metadata={"help": "Longest answer in the training data, in tokens."})
    batch_size: Rows = field(default=96, metadata={"help": "Prompts that are answered at once."})
    train_config: str = field(
        default="training_args/smollm2-135m-eagle3.yaml", metadata={"help": "Recipe for scripts/train_eagle.py."}
    )
    train_options: str = field(
        default="", metadata={"help": 'More options for scripts/train_eagle.py, in quotes: "--learning_rate 1e-3".'}
    )
    eval_prompts: Count = field(default=80, metadata={"help": "MT-Bench questions to decode, of 80."})
    eval_new_tokens: Count = field(default=48, metadata={"help": "Longest answer while measuring, in tokens."})
    num_speculative_tokens: Depth = field(
        default=3, metadata={"help": "Tokens drafted for each forward of the target."}
    )

    __post_init__ = check_numbers


class Progress:
    """What is finished, with which settings and in how many minutes; kept in a file beside the answers."""

    def __init__(self, path: Path):
        self.path, self.started = path, time.monotonic()
        self.stages = read_json(path, STAGES, "delete it, or restore it") if os.path.exists(path) else {}

    @contextmanager
    def stage(self, name: str, heading: str, settings: dict, product: Path):
        """Yields whether there is work; a clean end marks the stage as done, and what was built on it as stale."""
        print(f"\n=== {heading} (minute {self.minutes():.1f})", flush=True)
        entry = self.stages.setdefault(name, {"settings": settings, "minutes": 0.0, "done": False})
        for key, value in settings.items():
            if entry["settings"].get(key) != value:
                raise SystemExit(
                    f"`{key}` is {value!r}, but {product} was made with {entry['settings'].get(key)!r}; "
                    f"delete {product.parent} and {self.path.parent}, or choose another `output_dir`."
                )

        if entry["done"] and product.exists():
            print(f"{product} is there already")
            yield False
            return

        if entry.get("running"):  # it was killed, and nobody knows after how long
            entry["minutes"] = None
        following = list(self.stages)[list(self.stages).index(name) + 1 :]
        self.stages = {key: value for key, value in self.stages.items() if key not in following}
        entry.update(running=True, done=False)
        self.save()

        begun = time.monotonic()
        try:
            yield True
            entry["done"] = True
        finally:
            entry["running"] = False
            if entry["minutes"] is not None:
                entry["minutes"] += (time.monotonic() - begun) / 60
            self.save()

    def minutes(self) -> float:
        return (time.monotonic() - self.started) / 60

    def save(self) -> None:
        write_output("output_dir", self.path, json.dumps(self.stages, indent=2))


def run_script(name: str, *arguments: str) -> None:
    """Run one of our scripts as a user would; its own message tells what went wrong."""
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / name), *arguments])
    if done.returncode:
        raise RuntimeError(
            f"scripts/{name} failed (exit status {done.returncode}), as said above; `make quickstart` goes on."
        )


def bfloat16_is_faster() -> bool:
    """Some CPUs multiply bfloat16 faster than float32, others slower by far; measured in well under a second."""
    import torch

    if torch.cuda.is_available():
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512).to(dtype)
        a @ a
        begun = time.perf_counter()
        for _ in range(10):
            a @ a
        seconds[dtype] = time.perf_counter() - begun
    return seconds[torch.bfloat16] < seconds[torch.float32]


def train_command(arguments: QuickstartArguments, target: Path, answers: Path) -> list[str]:
    """The arguments of scripts/train_eagle.py."""
    # the recipe is made for a machine that is fast in bfloat16
    precision = [] if bfloat16_is_faster() else ["--bf16", "False", "--target_dtype", "float32"]
    return [
        *("--config", arguments.train_config, "--target", str(target), "--train_data", str(answers)),
        *("--base_model", BASE_MODEL, "--output_dir", arguments.output_dir, "--resume_from_checkpoint", "last"),
        *precision,
        *shlex.split(arguments.train_options),
    ]


def answer_prompts(target: Path, prompts: Path, answers: Path, arguments: QuickstartArguments, minutes: float) -> None:
    """The target's greedy answers to the first prompts, as many as it can give in so many minutes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_eagle.answers.regeneration import regenerate_answers
    from hf_eagle.data.conversations import load_records

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if bfloat16_is_faster() else torch.float32
    records = load_records(prompts)
    regenerate_answers(
        AutoModelForCausalLM.from_pretrained(target, dtype=dtype).to(device).eval(),
        AutoTokenizer.from_pretrained(target),
        records.select(range(min(arguments.num_prompts, len(records)))),
        answers,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        time_limit=60 * max(minutes, 0),
    )
    with answers.open(encoding="utf-8") as lines:
        print(f"{sum(1 for _ in lines)} prompts answered, of {arguments.num_prompts}")


def complete_card(output_dir: Path, statistics: Path, sources: Path) -> None:
    """Add to training's card where the prompts come from, what the data hold, and the measured acceptance."""
    from hf_eagle.hub.card_facts import with_measured
    from hf_eagle.hub.model_card import facts_of_card, render_model_card

    facts = facts_of_card(output_dir)
    if facts is None:
        print(f"{output_dir / 'README.md'} was edited, and is left as it is")
        return

    known = {"prompts/train.jsonl": {"from": {str: {"file": str, "from": str, "license": str}}}}
    found = read_json(sources, known)["prompts/train.jsonl"]["from"].values()
    prompts = [f"prompts from [{s['file']}]({s['from']}), licence {s['license']}" for s in found]
    facts = replace(
        facts,
        name="SmolLM2-135M-Instruct-EAGLE3",
        data=list(dict.fromkeys([*facts.data, *prompts])),  # each once, if an earlier run was stopped here
        data_statistics=read_json(statistics, {}),
    )
    print(f"wrote {render_model_card(output_dir, with_measured(facts, output_dir))}")


def print_result(output_dir: Path, target: Path, minutes: float) -> None:
    """The measured number, and how to serve the draft."""
    from hf_eagle.serving.commands import serve_commands

    acceptance = read_json(output_dir / "acceptance.json", ACCEPTANCE)
    length, speculative_tokens = acceptance["acceptance_length"], acceptance["num_speculative_tokens"]
    print(f"\n=== {output_dir}/ holds the draft and its card ({minutes:.1f} minutes)")
    if length:
        print(f"acceptance length {length:.3f} on {PROMPT_SET} ({speculative_tokens} tokens drafted at a time)")
    for server, command in serve_commands(str(target), str(output_dir), speculative_tokens).items():
        print(f"\nserve it with {server}:\n\n{command}")


def quickstart(arguments: QuickstartArguments) -> None:
    """All stages, in order."""
    output_dir, data_dir = Path(arguments.output_dir), Path(f"{arguments.output_dir}-data")
    target = Path(arguments.assets_dir) / "smollm2-135m-instruct"
    prompts, answers = Path(arguments.assets_dir) / "prompts", data_dir / "answers.jsonl"
    progress = Progress(data_dir / "progress.json")

    def settings(*names: str) -> dict:
        return {name: getattr(arguments, name) for name in names}

    print("=== 1/5 assets", flush=True)
    run_script("fetch_assets.py", "--output_dir", arguments.assets_dir)

    told = settings("num_prompts", "max_new_tokens", "batch_size")
    with progress.stage("answers", "2/5 the target answers the prompts", told, answers) as to_do:
        if to_do:
            data_dir.mkdir(parents=True, exist_ok=True)
            minutes_left = arguments.answer_minutes - (progress.stages["answers"]["minutes"] or 0)
            answer_prompts(target, prompts / "train.jsonl", answers, arguments, minutes_left)

    told = settings("train_config", "train_options")
    with progress.stage("training", "3/5 training", told, output_dir / "model.safetensors") as to_do:
        if to_do:
            run_script("train_eagle.py", *train_command(arguments, target, answers))

    told = settings("eval_prompts", "eval_new_tokens", "num_speculative_tokens")
    measured = output_dir / "acceptance.json"
    with progress.stage("acceptance", f"4/5 acceptance on {PROMPT_SET}", told, measured) as to_do:
        if to_do:
            run_script(
                "evaluate_draft.py",
                *("--target", str(target), "--draft", str(output_dir), "--prompts", str(prompts / "mt_bench.jsonl")),
                *("--num_prompts", str(arguments.eval_prompts), "--max_new_tokens", str(arguments.eval_new_tokens)),
                *("--num_speculative_tokens", str(arguments.num_speculative_tokens), "--output_json", str(measured)),
            )

    with progress.stage("card", "5/5 model card", {}, output_dir / "README.md") as to_do:
        if to_do:
            statistics = data_dir / "statistics.json"
            run_script(
                "preview_data.py",
                *train_command(arguments, target, answers),
                *("--num_previews", "0", "--output_json", str(statistics)),
                *("--overlap_prompts", str(prompts / "mt_bench.jsonl")),
            )
            complete_card(output_dir, statistics, Path(arguments.assets_dir) / "sources.json")
    print_result(output_dir, target, progress.minutes())


def parser():
    from hf_eagle.arguments.parser import EagleArgumentParser

    found = EagleArgumentParser(QuickstartArguments, description=__doc__)
    if os.environ.get("QUICKSTART_SHORT", "") not in ("", "0"):
        found.set_defaults(**SHORT)
    return found


def door(argv: list[str] | None = None) -> QuickstartArguments:
    """The arguments, once everything was looked at that a later stage would trip over."""
    (arguments,) = parser().parse_args_and_config(argv)

    import fetch_assets  # beside this file

    from hf_eagle.door.inputs import check_file
    from hf_eagle.door.outputs import check_output_folder
    from hf_eagle.shipped import find_config

    os.chdir(ROOT)  # assets/ and outputs/ are the repository's, wherever one calls from
    check_file("train_config", find_config(arguments.train_config, "train_config"))
    if not arguments.output_dir.strip():
        raise ValueError("`output_dir` is empty: name a folder.")
    assets, data_dir = Path(arguments.assets_dir), Path(f"{arguments.output_dir}-data")
    fetch_assets.check_folder("assets_dir", arguments.assets_dir)
    check_output_folder("output_dir", data_dir, {"assets_dir": assets}, overwrite=True, ours=lambda folder: True)
    with naming("output_dir"):
        Progress(data_dir / "progress.json")
    check_training(arguments, assets, data_dir)
    return arguments


def check_training(arguments: QuickstartArguments, assets: Path, data_dir: Path) -> None:
    """Refuse what training will refuse, before there are answers to train on."""
    from hf_eagle.arguments.paths import check_draft_folder, check_training_paths
    from hf_eagle.door.inputs import check_data
    from hf_eagle.training.run_arguments import RunArguments

    try:
        command = train_command(arguments, assets / "smollm2-135m-instruct", data_dir / "answers.jsonl")
    except ValueError as problem:  # of shlex
        raise ValueError(f"`train_options` {arguments.train_options} cannot be split into words: {problem}.") from None
    run = RunArguments.parse(command)
    run.refuse_other_methods()
    check_data("eval_data", run.data.eval_data or [])
    check_training_paths(run.data, run.draft)
    reads = {"train_config": arguments.train_config, "assets_dir": assets}
    check_draft_folder("output_dir", arguments.output_dir, reads, overwrite=True)


def main() -> None:
    arguments = door()
    try:
        quickstart(arguments)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; `make quickstart` goes on from here") from None


if __name__ == "__main__":
    run_verb(main)
