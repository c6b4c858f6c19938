"""Compare a target in this process with the same one in a vLLM: the tokens that each reads in a second of CPU time.

    python scripts/dev/measure_served_target.py --target assets/smollm2-135m-instruct --data answers.jsonl \
        --serving_python .venv-serving/bin/python --dtype float32 --length 1024 --rows 2

Both read the same batches of real text in turn, on the same cores, and give the features that a draft learns from.
Counted is the CPU time of this process and of the server's processes together, since each way may use both. Prints the
two rates and their ratio in every round: above 1, the server takes less.
"""

import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a clone works without installation

from hf_eagle.arguments.bounds import Count, check_numbers  # noqa: E402


@dataclass
class MeasuringArguments:
    target: str = field(metadata={"help": "Folder or Hub id of the target."})
    data: str = field(metadata={"help": "JSONL file of chats, whose text is read."})
    serving_python: str = field(metadata={"help": "Python interpreter that has vLLM."})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Of target and server."})
    length: Count = field(default=1024, metadata={"help": "Tokens of a row."})
    rows: Count = field(default=2, metadata={"help": "Rows of a batch."})
    batches: Count = field(default=4, metadata={"help": "Batches that each way reads in a round."})
    rounds: Count = field(default=5, metadata={"help": "How often each way reads, in turn with the other one."})
    output_json: str | None = field(default=None, metadata={"help": "Where the numbers are written."})

    __post_init__ = check_numbers


def cpu_seconds() -> float:
    """CPU time of this process and of all that it has started."""
    import psutil  # of accelerate

    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def batches_of(args: MeasuringArguments):
    """Batches `(rows, length)` of the chats' text, each text once."""
    import torch

    from hf_eagle.data.records import load_records
    from hf_eagle.targets.loading import load_tokenizer

    text = "\n\n".join(message["content"] for record in load_records(args.data) for message in record["messages"])
    ids = load_tokenizer(args.target)(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = args.rows * args.length
    wanted = args.rounds * args.batches + 1  # one to warm up with
    if len(ids) < wanted * size:
        raise ValueError(
            f"`data` {args.data} holds {len(ids):,} tokens, but {wanted} batches of {size:,} are read: give more "
            "chats, or lower `rounds`, `batches`, `rows` or `length`."
        )
    return torch.tensor(ids[: wanted * size]).view(wanted, args.rows, args.length)


def measure(args: MeasuringArguments) -> list[dict[str, float]]:
    """Tokens for each second of CPU time, both ways, in each round."""
    from hf_eagle import FrozenTarget
    from hf_eagle.serving.features_command import features_command
    from hf_eagle.serving.vllm_server import vllm_server
    from hf_eagle.targets.served import ServedTarget

    batches = batches_of(args)
    here = FrozenTarget.from_pretrained(args.target, dtype=args.dtype)
    taps = [2, here.num_layers // 2, here.num_layers - 3]  # EAGLE-3's
    here.tap_ids = taps

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        options = {"enforce_eager": True, "enable_prefix_caching": False}
        command = features_command(args.target, [*taps, here.num_layers], folder, args.length, args.dtype, **options)
        given = {name: x for name, x in command.options.items() if name != "model"}
        with vllm_server(
            args.target, Path(folder) / "server.log", args.serving_python, environment=command.environment, **given
        ) as url:
            there = ServedTarget.from_server(args.target, [url], folder, taps, dtype=args.dtype)
            ways = {"in process": here, "served": there}
            for target in ways.values():
                target(batches[0])

            found = []
            for number in range(args.rounds):
                first = 1 + number * args.batches
                found.append({way: rate(x, batches[first : first + args.batches]) for way, x in ways.items()})
                found[-1]["ratio"] = found[-1]["served"] / found[-1]["in process"]
                print(", ".join(f"{name} {x:.3f}" for name, x in found[-1].items()), flush=True)
            there.client.close()
    return found


def rate(target, batches) -> float:
    """Tokens that a target reads in a second of CPU time."""
    begun = cpu_seconds()
    for batch in batches:
        target(batch)
    return batches.numel() / (cpu_seconds() - begun)


def main() -> None:
    from hf_eagle.arguments.parser import EagleArgumentParser
    from hf_eagle.door.inputs import check_file, check_target
    from hf_eagle.door.writing import write_output
    from hf_eagle.hub.run_facts import machine

    (args,) = EagleArgumentParser(MeasuringArguments, description=__doc__).parse_args_and_config()
    check_target("target", args.target)
    for name in ("data", "serving_python"):
        check_file(name, getattr(args, name))

    rounds = measure(args)
    ratios = [each["ratio"] for each in rounds]
    print(
        f"{args.rows} x {args.length}, {args.dtype}: a server reads {statistics.median(ratios):.2f} times the tokens "
        f"of the target in the process, between {min(ratios):.2f} and {max(ratios):.2f} ({machine()})"
    )
    if args.output_json is not None:
        told = {"rounds": rounds, "ratio": statistics.median(ratios), "machine": machine()}
        write_output("output_json", args.output_json, json.dumps(told, indent=1))


if __name__ == "__main__":
    from hf_eagle.door.printer import run_verb

    run_verb(main)
