"""Measure how much faster vLLM decodes with a draft: all engines run at once, and their measurements alternate."""

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..door.journal import Journal
from ..door.names import at_home
from ..evaluation.acceptance_length import acceptance_length
from .far_end import FarEnd


_BLOCK, _BLOCKS = 2**20, 256  # bytes of a model's file that are read at once, and number of such reads


class Engine(FarEnd):
    """A vLLM engine with these `LLM` arguments, see `FarEnd`."""

    def __init__(self, python: str | Path, log: Path, environment: dict[str, str] | None = None, **arguments):
        super().__init__(python, Path(__file__).with_name("offline_engine.py"), arguments, log, environment)

    def decode(self, prompts: list[list[int] | dict], in_flight: int, max_tokens: int) -> dict:
        """Greedy answers, at most `in_flight` at a time; see `offline_engine.decode`."""
        return self.ask({"prompts": prompts, "in_flight": in_flight, "max_tokens": max_tokens})


def measure_serving(
    start: Callable[[int], Engine],
    prompts: list[list[int] | dict],
    counts: list[int],
    batch_sizes: list[int],
    rounds: int,
    max_tokens: int,
    report: Callable[[str], None] = print,
    journal: Journal | None = None,
    categories: Sequence[str | None] = (),
) -> list[dict]:
    """Measure the speed without a draft and with each number of drafted tokens, by number of requests in flight.

    All engines run at the same time. In every round each decodes the same prompts in turn, so a machine that slows
    down slows all of them.

    Args:
        start: starts the engine that drafts this number of tokens per round, 0 without a draft.
        prompts: token ids, and chats with images, see `served_prompts`.
        counts: drafted tokens K to measure, from 1 on.
        batch_sizes: requests in flight.
        rounds: runs of each; results are medians over them.
        max_tokens: longest answer.
        report: called with a line of progress.
        journal: keeps the runs of a round and a number of requests as soon as all engines have decoded, since they are
            compared with each other. Runs that it holds are not decoded again.
        categories: one for each prompt, or none. Prompts of a category are decoded once more, by themselves.

    Returns:
        One entry for each K (0 first) and batch size, see `_summary`. With a draft, `categories` holds the acceptance
        of each category, if there are any.
    """
    named = [name for name in dict.fromkeys(categories) if name is not None]
    parts = {name: [p for p, c in zip(prompts, categories, strict=True) if c == name] for name in named}
    tasks = [(number, size) for number in range(rounds) for size in batch_sizes]
    tasks += [("category", name) for name in named]
    done = {tuple(row["what"]): row["runs"] for row in (journal.rows if journal is not None else [])}

    def decoded(engines: list[Engine], task: tuple) -> list[dict]:
        what, value = task
        if what == "category":  # without a draft nothing is accepted
            return [engine.decode(parts[value], batch_sizes[0], max_tokens) for engine in engines[1:]]
        return [engine.decode(prompts, value, max_tokens) for engine in engines]

    def keep(task: tuple, runs: list[dict]) -> None:
        done[task] = runs
        if journal is not None:
            journal.append({"what": list(task), "runs": runs})

    missing = [task for task in tasks if task not in done]
    if missing:
        _decode(start, prompts[:2], (0, *counts), missing, decoded, keep, report)
    return _entries(done, counts, batch_sizes, rounds, {name: len(part) for name, part in parts.items()})


def _entries(done: dict, counts: list[int], batch_sizes: list[int], rounds: int, sizes: dict[str, int]) -> list[dict]:
    """The result of `measure_serving`, from the runs of every task and the number of prompts of each category."""
    entries = []
    for place, count in enumerate((0, *counts)):
        kinds = {x: {"prompts": n, **_counted(done["category", x][place - 1])} for x, n in sizes.items() if count}
        for size in batch_sizes:
            found = [done[number, size] for number in range(rounds)]
            entry = _summary(count, size, [runs[place] for runs in found], [runs[0] for runs in found])
            entries.append(entry | ({"categories": kinds} if kinds else {}))
    return entries


def _decode(start, first: list, counts: tuple[int, ...], missing: list[tuple], decoded, keep, report) -> None:
    """Decode each `missing` task: `decoded` takes the engines and a task, `keep` a task and its runs."""
    with ExitStack() as stack:
        # start one after the other: an engine sizes itself by the memory that is free when it starts
        engines = [stack.enter_context(start(count)) for count in counts]
        for engine in engines:
            engine.decode(first, 2, 8)  # warm

        for task in missing:
            begun = time.perf_counter()
            keep(task, decoded(engines, task))
            what, value = task
            told = f"category {value}" if what == "category" else f"round {what + 1}, batch {value}"
            report(f"{told}: {time.perf_counter() - begun:.0f} s")


def _counted(run: dict) -> dict:
    """Return `acceptance_length`, `drafts` and `accepted_per_position` of one run of an engine with a draft."""
    length = acceptance_length([run["accepted_tokens"]], [run["drafts"]])
    return {"acceptance_length": length, **{name: run[name] for name in ("drafts", "accepted_per_position")}}


def _summary(count: int, size: int, runs: list[dict], alone: list[dict]) -> dict:
    """Return one entry of the table.

    Returns:
        * `num_speculative_tokens` (0: no draft), `batch_size`;
        * `tokens_per_second`, the median over rounds, and `tokens_per_second_range`, smallest and largest;
        * `speedup`: the median over rounds of the ratio to the run without a draft of the same round, and its range;
        * `acceptance_length`, `drafts`, `accepted_per_position`: of one round, as vLLM counted; `None` without a draft;
        * `identical_answers`: share of answers that are those without a draft, token for token.
    """
    speeds, base = ([_tokens(run) / run["seconds"] for run in way] for way in (runs, alone))
    # ratios within a round, since both of its runs met the same load
    ratios = [ours / theirs for ours, theirs in zip(speeds, base, strict=True)]
    pairs = list(zip(runs[0]["token_ids"], alone[0]["token_ids"], strict=True))
    drafted = {"acceptance_length": None, "drafts": None, "accepted_per_position": None}

    if count:
        drafted = _counted(runs[0])

    return {
        "num_speculative_tokens": count,
        "batch_size": size,
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_range": [min(speeds), max(speeds)],
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        **drafted,
        "identical_answers": sum(ours == theirs for ours, theirs in pairs) / len(pairs),
    }


def _tokens(run: dict) -> int:
    return sum(map(len, run["token_ids"]))


def table(entries: list[dict]) -> str:
    """Return tokens per second and speedups as a Markdown table: one row per K, one column per batch size."""
    sizes = sorted({entry["batch_size"] for entry in entries})
    found = {(entry["num_speculative_tokens"], entry["batch_size"]): entry for entry in entries}
    lines = ["| K | acceptance length | " + " | ".join(f"batch {size}" for size in sizes) + " |"]
    lines.append("|---|---|" + "---|" * len(sizes))

    for count in sorted({entry["num_speculative_tokens"] for entry in entries}):
        length = found[count, sizes[0]]["acceptance_length"]
        cells = [
            f"{x['tokens_per_second']:.1f} ({x['speedup']:.2f}x)" if count else f"{x['tokens_per_second']:.1f} tokens/s"
            for x in (found[count, size] for size in sizes)
        ]
        name = str(count) if count else "no draft"
        lines.append(f"| {name} | {'' if length is None else f'{length:.3f}'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_of_categories(entries: list[dict]) -> str:
    """Return acceptance lengths as a Markdown table: one row per K, one column per category; empty without any."""
    rows = {entry["num_speculative_tokens"]: entry["categories"] for entry in entries if entry.get("categories")}
    if not rows:
        return ""
    first = next(iter(rows.values()))
    lines = ["| K | " + " | ".join(f"{name} ({found['prompts']})" for name, found in first.items()) + " |"]
    lines.append("|---" * (1 + len(first)) + "|")
    for count, row in sorted(rows.items()):
        lengths = ("" if x["acceptance_length"] is None else f"{x['acceptance_length']:.3f}" for x in row.values())
        lines.append(f"| {count} | " + " | ".join(lengths) + " |")
    return "\n".join(lines)


def verdict(entries: list[dict]) -> str:
    """The fastest K at each batch size; it is 0, no draft, at sizes where drafting does not pay."""
    lines = []
    for size in sorted({entry["batch_size"] for entry in entries}):
        best = max((entry for entry in entries if entry["batch_size"] == size), key=lambda entry: entry["speedup"])
        count, factor = best["num_speculative_tokens"], best["speedup"]
        lines.append(
            f"batch {size}: " + (f"fastest with K = {count}, {factor:.2f}x" if count else "no draft is the fastest")
        )
    return "\n".join(lines)


def model_identity(name: str) -> str:
    """Return a model's identity: its Hub id, or 16 hex digits of a hash of the files in its folder.

    Of a larger file, 256 MiB are read, spread evenly over it.
    """
    folder = at_home(name)
    if not folder.is_dir():
        return name

    digest = hashlib.sha256()
    for path in sorted(
        file for kind in ("config.json", "*.safetensors", "*.bin", "*.gguf") for file in folder.glob(kind)
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(_BLOCK, size // _BLOCKS)):
                file.seek(place)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
