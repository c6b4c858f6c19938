"""Every collective of the package is on the page, and is run beside a rank that has nothing."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from collectives import PACKAGE, collectives, collectives_of
from test_loading import write_adapter
from tiny_files import write_chats, write_tiny_target
from workers import run_worker


ROOT = PACKAGE.parent
PAGE = (PACKAGE / "docs" / "collectives.md").read_text()
# | `file` | `function` | `collective` (how often, where it is not once) | why | what |
ROW = re.compile(r"^\| `(\S+\.py)` \| `(\S+)` \| `(\w+)`(?: \((\d)\))? \| (.+?) \| (.+?) \|$", re.MULTILINE)


def on_the_page() -> Counter:
    return Counter({(file, place, name): int(often or 1) for file, place, name, often, *_ in ROW.findall(PAGE)})


# ---- the page ----


def test_the_page_lists_what_the_code_calls():
    """A collective that is not there may wait for ranks that never call it: think, and write down why they do."""
    found, listed = collectives(), on_the_page()
    assert found and not found - listed, f"hf_eagle/docs/collectives.md lacks {dict(found - listed)}"
    assert not listed - found, f"hf_eagle/docs/collectives.md lists {dict(listed - found)}, which no code calls"


def test_the_page_says_why_and_what():
    rows = ROW.findall(PAGE)
    assert len(rows) == len([line for line in PAGE.splitlines() if line.startswith("| `") and ".py` |" in line])
    assert all(len(why) > 20 and len(what) > 3 for *_, why, what in rows)


def test_the_tests_that_the_page_names_are_there():
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", PAGE)
    assert len(named) >= 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("import torch.distributed as dist\ndist.all_reduce(x)", ["all_reduce"]),
        ("from torch import distributed\ndistributed.new_group([0])", ["new_group"]),
        ("import torch.distributed as dist\ndist.get_rank(), dist.is_initialized()", []),
        ("from accelerate.utils import reduce\nreduce(x)", ["reduce"]),
        ("from functools import reduce\nreduce(f, x)", []),
        ("self.accelerator.gather(x), hidden.gather(1, index)", ["gather"]),
        ("PartialState().wait_for_everyone()", ["wait_for_everyone"]),
        ("with state.main_process_first():\n    pass", ["main_process_first"]),
        ("from torch.distributed.fsdp import fully_shard\nfully_shard(draft)", ["fully_shard"]),
        ("weight.full_tensor()", ["full_tensor"]),
    ],
)
def test_collectives_are_found(code, wanted, tmp_path):
    (tmp_path / "code.py").write_text(code)
    assert [name for _, name in collectives_of(tmp_path / "code.py")] == wanted


# ---- a rank that has nothing ----


def curve(out: Path) -> dict[int, float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def runs_of(folder: Path, out: Path, ranks: int) -> dict[bool, list]:
    """The runs by whether their draft is under FSDP2; alone, neither draft nor target is spread."""
    held_out = ["--eval_data", folder / "chats.jsonl", "--eval_strategy", "steps", "--eval_steps", 1]
    prompts = ["--acceptance_prompts", folder / "prompts.txt", "--acceptance_steps", 1]
    cache = ["--feature_store", out / "store"]

    def train(name, *arguments, sharding="none", recipe="recipe.yaml"):
        spread = ["--target_sharding", sharding] if ranks > 1 else []
        config = ["--config", folder / recipe, "--output_dir", out / name]
        return ["train_eagle", [str(x) for x in (*config, *arguments, *spread)]]

    def go_on(name, *arguments, **sharding):
        return train(name, *arguments, "--resume_from_checkpoint", "last", "--max_steps", 3, **sharding)

    first = ["--cache_mode", "first_epoch", "--feature_store", out / "first_store"]
    filled = train("filled", *cache, sharding="fsdp2")
    filled[0] = "cache_features"
    stopped = train("stopped")
    stopped[0] = "stopped"
    replicated = [
        filled,
        stopped,
        train("stored", *cache, *held_out),
        train("first", *first, sharding="fsdp2"),
        train("live", *held_out, *prompts, sharding="tensor"),
        go_on("live", *held_out, *prompts, sharding="tensor"),
        train("stream", "--streaming", *prompts, recipe="stream.yaml"),  # each rank holds the target: one has no prompt
        train("adapted", "--target", folder / "adapter", sharding="fsdp2"),
    ]
    spread = [train("spread", *held_out, *prompts, sharding="fsdp2"), go_on("spread", *held_out, sharding="fsdp2")]
    return {False: replicated, True: spread}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """All runs alone, and on two ranks of which the second has no chat, no held-out chat and no prompt."""
    folder = tmp_path_factory.mktemp("nothing")
    write_tiny_target(folder / "target")
    write_adapter(folder / "adapter", folder / "target")
    write_chats(folder / "chats.jsonl", 1)
    (folder / "prompts.txt").write_text("red green\n")
    recipe = {"target": str(folder / "target"), "train_data": [str(folder / "chats.jsonl")], "max_length": 128}
    recipe |= {"ttt_steps": 2, "oov_rows": "renormalize", "per_device_train_batch_size": 1, "max_steps": 2}
    recipe |= {"save_steps": 1, "logging_steps": 1, "learning_rate": 1e-3, "report_to": "none", "packing": False}
    (folder / "stream.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "draft_vocab_size": 10}))

    for ranks in (1, 2):
        for fsdp2, runs in runs_of(folder, folder / f"on_{ranks}", ranks).items():
            out = folder / f"launch_{ranks}_{fsdp2}"
            run_worker(out, ranks=ranks, worker="nothing_worker.py", fsdp2=fsdp2 and ranks > 1, runs=runs)
    return folder


@pytest.mark.parametrize("name", ["stored", "first", "live", "stream", "adapted", "spread"])
def test_a_rank_that_has_nothing_changes_nothing(name, launched):
    wanted = curve(launched / "on_1" / name)
    assert sorted(wanted) == list(range(1, 4 if name in ("live", "spread") else 3))
    assert curve(launched / "on_2" / name) == pytest.approx(wanted, rel=1e-5)


def test_a_rank_that_has_nothing_stops_the_others(launched):
    assert [path.name for path in (launched / "on_2" / "stopped").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_collective_is_run_by_a_rank_that_has_nothing(rank, launched):
    """A collective that is added is run by these runs too, or by one that is added to them."""
    called = set()
    for fsdp2 in (False, True):
        called |= set(json.loads((launched / f"launch_2_{fsdp2}" / f"called_{rank}.json").read_text()))
    meeting = {f"{file} {place}" for file, place, _ in collectives()}
    assert not meeting - called, f"no run calls {sorted(meeting - called)}"
