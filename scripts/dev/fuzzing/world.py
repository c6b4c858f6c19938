"""The sound world that every trial begins with: a tiny target, a draft of it, data, and a command for every verb."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tiny_files import write_chats, write_tiny_target
from warm_python import WarmPython


SMALL = "--ttt_steps 2 --max_length 64 --report_to none --logging_steps 1 --disable_tqdm true".split()
TRAIN = ["--target", "target", "--train_data", "chats.jsonl", *SMALL, "--max_steps", "1"]
EVALUATE = ["--target", "target", "--draft", "run", "--prompts", "prompts.jsonl", "--max_new_tokens", "4"]
REGENERATE = ["--target", "target", "--data", "chats.jsonl", "--output", "out.jsonl", "--max_new_tokens", "4"]
SERVED = ["--server_url", "{url}", "--retries", "1", "--request_timeout", "3"]


@dataclass(frozen=True)
class Verb:
    """A command that works.

    Attributes:
        name: of the verb and of what it is made to do.
        script: below `scripts/`.
        command: its arguments; paths are relative to the world, `{url}` is the chat server's.
        outputs: files and folders that it may make or replace.
        slow: whether it starts further programs.
    """

    name: str
    script: str
    command: list[str]
    outputs: tuple[str, ...] = field(default=())
    slow: bool = False


VERBS = [
    Verb("train", "train_eagle.py", [*TRAIN, "--output_dir", "out", "--save_strategy", "no"], ("out",)),
    Verb("train by a recipe", "train_eagle.py", ["--config", "recipe.yaml", "--output_dir", "out"], ("out",)),
    Verb(
        "train further",
        "train_eagle.py",
        [*TRAIN[:-1], "6", "--save_steps", "2", "--output_dir", "run", "--resume_from_checkpoint", "last"],
        ("run",),
    ),
    Verb(
        "train on a stream",
        "train_eagle.py",
        [*TRAIN, "--output_dir", "out", "--streaming", "--save_strategy", "no"],
        ("out",),
    ),
    Verb("dry run", "train_eagle.py", [*TRAIN, "--output_dir", "out", "--dry_run", "--device_memory_gb", "80"]),
    Verb("evaluate", "evaluate_draft.py", [*EVALUATE, "--output_json", "a.json"], ("a.json", "a.png")),
    Verb("regenerate", "regenerate_answers.py", [*REGENERATE, "--num_records", "2"], ("out.jsonl",)),
    Verb("regenerate, served", "regenerate_answers.py", [*REGENERATE, *SERVED, "--num_records", "2"], ("out.jsonl",)),
    Verb(
        "write-prompts",
        "write_prompts.py",
        ["--target", "target", "--output", "out.jsonl", "--num_prompts", "2", "--max_new_tokens", "4", *SERVED],
        ("out.jsonl",),
    ),
    Verb(
        "preview",
        "preview_data.py",
        ["--target", "target", "--train_data", "chats.jsonl", "--output_dir", "out", "--max_length", "64"]
        + ["--output_json", "a.json", "--html", "a.html", "--overlap_prompts", "prompts.jsonl"],
        ("out", "a.json", "a.html"),
    ),
    Verb("cache", "cache_features.py", [*TRAIN, "--output_dir", "out", "--feature_store", "fs"], ("out", "fs")),
    Verb("check", "check_draft.py", ["run", "--target", "target"]),
    Verb("check and mend", "check_draft.py", ["run", "--target", "target", "--fix", "out"], ("out",)),
    Verb(
        "diagnose",
        "diagnose_draft.py",
        ["run", "--target", "target", "--prompts", "prompts.jsonl", "--data", "chats.jsonl", "--max_new_tokens", "4"]
        + ["--max_length", "64", "--confirm", "false", "--output_json", "a.json"],
        ("a.json", "a.png"),
    ),
    Verb("prune", "prune_draft.py", ["run", "--output_dir", "out", "--token_ids", "ids.json"], ("out",)),
    Verb(
        "prune by counts",
        "prune_draft.py",
        ["run", "--output_dir", "out", "--counts_from", "chats.jsonl", "--target", "target", "--draft_vocab_size", "9"],
        ("out",),
    ),
    Verb("import", "import_draft.py", ["run", "--target", "target", "--output_dir", "out"], ("out",)),
    Verb("publish", "publish_draft.py", ["run", "--repo_id", "me/tiny", "--dry_run"]),
    Verb("compare", "compare_runs.py", ["--runs", "run", "run", "--output_png", "a.png"], ("a.png",)),
    Verb(
        "benchmark",
        "benchmark_training_step.py",
        ["--target", "target", "--data", "chats.jsonl", "--length", "64", "--ttt_steps", "2"]
        + ["--num_chats", "2", "--repeats", "1", "--output_json", "a.json"],
        ("a.json",),
    ),
    Verb(
        "ablate",
        "ablate.py",
        ["--recipe", "recipe.yaml", "--variants", "variants.yaml", "--prompts", "prompts.jsonl", "--output_dir", "out"]
        + ["--minutes", "0.01", "--num_prompts", "1", "--max_new_tokens", "4"],
        ("out",),
        slow=True,
    ),
    Verb("fetch-assets", "fetch_assets.py", ["--output_dir", "assets", "--hub_seconds", "0"], ("assets",)),
]


def make_world(folder: Path, python: WarmPython) -> None:
    """Write what all commands read.

    Raises:
        RuntimeError: if the draft cannot be trained.
    """
    folder.mkdir(parents=True)
    write_tiny_target(folder / "target")
    write_chats(folder / "chats.jsonl", 24)
    prompts = [{"prompt": "one two three"}, {"prompt": "sun moon star", "category": "sky"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / "ids.json").write_text(json.dumps(list(range(60))))
    recipe = {"target": "target", "train_data": ["chats.jsonl"], "max_length": 64, "ttt_steps": 2, "max_steps": 1}
    recipe |= {"report_to": "none", "save_strategy": "no"}
    (folder / "recipe.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in recipe.items()))
    (folder / "variants.yaml").write_text("more steps:\n  ttt_steps: 3\n")
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("somebody's notes\n")

    # an assets folder that lacks nothing, so that nothing is fetched
    assets = folder / "assets"
    for file in ("prompts/mt_bench.jsonl", "prompts/human_eval.jsonl", "prompts/train.jsonl"):
        (assets / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "prompts.jsonl", assets / file)
    shutil.copytree(folder / "target", assets / "smollm2-135m-instruct")
    (assets / "sources.json").write_text("{}\n")

    command = [*TRAIN[:-1], "4", "--save_steps", "2", "--output_dir", "run", "--draft_vocab_size", "24"]
    script = Path(__file__).resolve().parents[2] / "train_eagle.py"
    ended = python.run(script, *command, cwd=folder)
    if ended.returncode:
        raise RuntimeError(f"The draft of the world could not be trained: {ended.stderr[-2000:]}")
