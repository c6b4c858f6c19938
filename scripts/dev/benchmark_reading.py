"""Compare the reader of `hf_eagle.data` with the JSON loader of `datasets`: from a file of chats to tokenised data.

    python scripts/dev/benchmark_reading.py --target assets/smollm2-135m-instruct --num_records 100000

Writes a JSONL file, and reads and tokenises it both ways in alternation, each time in a fresh process with empty
caches. After the loader, both are the same. Prints seconds, processor seconds and peak memory (without memory-mapped
files), and their ratios: below 1, our reader takes less.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a clone works without installation

from hf_eagle.arguments.bounds import Count, check_numbers  # noqa: E402


WAYS = ("datasets", "hf_eagle")
MEASURES = {"seconds": "s", "processor_seconds": "s", "peak_mb": "MB"}


@dataclass
class BenchmarkArguments:
    target: str = field(metadata={"help": "Folder or Hub id of a model whose tokenizer is used."})
    num_records: Count = field(default=100_000, metadata={"help": "Chats in the file."})
    words: Count = field(default=60, metadata={"help": "Average number of words per message."})
    max_length: Count = field(default=2048, metadata={"help": "Longest row in tokens."})
    rounds: Count = field(default=3, metadata={"help": "Runs of each way, in alternation; medians are shown."})
    only_read: bool = field(default=False, metadata={"help": "Only read the records; do not tokenise them."})
    output_json: str | None = field(default=None, metadata={"help": "Where the numbers are written."})

    __post_init__ = check_numbers


def main() -> None:
    from hf_eagle.arguments.parser import EagleArgumentParser

    (args,) = EagleArgumentParser(BenchmarkArguments, description=__doc__).parse_args_and_config()
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        write_chats(path, args.num_records, args.words)
        print(f"{args.num_records:,} chats, {path.stat().st_size / 2**20:,.0f} MB, medians of {args.rounds}")
        for _ in range(args.rounds):
            for way in WAYS:
                found[way].append(run(way, path, args))
    result = {way: {name: statistics.median(run[name] for run in found[way]) for name in MEASURES} for way in WAYS}
    print(f"{'':20}" + "".join(f"{way:>12}" for way in (*WAYS, "ratio")))
    for name, unit in MEASURES.items():
        old, new = (result[way][name] for way in WAYS)
        print(f"{name.replace('_mb', '').replace('_', ' ') + ', ' + unit:20}{old:12.1f}{new:12.1f}{new / old:12.2f}")
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(result, indent=2) + "\n")


def write_chats(path: Path, number: int, words: int) -> None:
    """Chats of one to three turns, one in ten with a tool call."""
    choose = random.Random(0)
    known = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=choose.randint(2, 9))) for _ in range(5000)]

    def text() -> str:
        return " ".join(choose.choices(known, k=choose.randint(1, 2 * words)))

    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            messages = []
            for _ in range(choose.randint(1, 3)):
                messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
            if index % 10 == 0:
                call = {"type": "function", "function": {"name": "find", "arguments": {"query": text(), "top": index}}}
                messages[-1] = {"role": "assistant", "content": "", "tool_calls": [call]}
            file.write(json.dumps({"id": index, "messages": messages}) + "\n")


def run(way: str, path: Path, args: BenchmarkArguments) -> dict:
    """One way in a process of its own, which measures itself."""
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        spec = {"way": way, "path": str(path), "target": args.target, "max_length": args.max_length}
        environment = os.environ | {"HF_DATASETS_CACHE": cache, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, __file__, json.dumps({**spec, "only_read": args.only_read})]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the run of {way} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def child(spec: dict) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    from hf_eagle.data.conversations import build_dataset
    from hf_eagle.data.records import load_records, to_messages

    tokenizer = AutoTokenizer.from_pretrained(spec["target"])
    memory = Memory()
    started, processor = time.perf_counter(), time.process_time()
    if spec["way"] == "datasets":
        records = load_dataset("json", data_files=spec["path"], split="train")
    else:
        records = load_records(spec["path"])
    if spec["only_read"]:
        for record in records:
            to_messages(record)
    else:
        build_dataset(records, tokenizer, spec["max_length"])
    measured = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - processor}
    print(json.dumps({**measured, "peak_mb": memory.peak / 2**20}))


class Memory:
    """The most memory that was this process's own, in bytes, seen every 20 ms."""

    def __init__(self):
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            own = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(own.split()[1]) * 1024)
            time.sleep(0.02)


if __name__ == "__main__":
    child(json.loads(sys.argv[1])) if sys.argv[1:2] and sys.argv[1].startswith("{") else main()
