"""Compare the speed of answers through a vLLM server with vLLM's offline `LLM.chat` on the same prompts.

    python scripts/dev/benchmark_regeneration.py --target assets/smollm2-135m-instruct --data assets/prompts/train.jsonl

Starts both in the server's environment (`make test-serving` makes it) with the same settings, runs them in alternation,
and prints generated tokens per second and their ratio. The time through the server includes everything: the check of
the target, the requests, the journal on the disk, the output file.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a clone works without installation

from hf_eagle.arguments.bounds import Count  # noqa: E402


@dataclass
class BenchmarkArguments:
    target: str = field(metadata={"help": "Target model: a folder or a Hub id."})
    data: str = field(metadata={"help": "Chats; their first user turns are answered."})
    num_prompts: Count = field(default=96, metadata={"help": "The first so many."})
    max_new_tokens: Count = field(default=128, metadata={"help": "Longest answer, in tokens."})
    max_num_seqs: Count = field(default=48, metadata={"help": "Prompts that vLLM decodes together, both ways."})
    concurrency: Count = field(default=64, metadata={"help": "Largest number of requests in flight."})
    max_model_len: int = field(default=2048, metadata={"help": "Context length, both ways."})
    dtype: str = field(default="bfloat16", metadata={"help": "Data type, both ways."})
    rounds: Count = field(default=2, metadata={"help": "Runs of each way, in alternation; medians are shown."})
    serving_python: str = field(
        default=str(ROOT / ".venv-serving/bin/python"), metadata={"help": "Interpreter that has vLLM."}
    )
    output_json: str | None = field(default=None, metadata={"help": "Where the numbers are written."})

    def __post_init__(self):
        if not Path(self.serving_python).exists():
            raise ValueError(f"`serving_python` {self.serving_python} does not exist; `make test-serving` makes it.")


def main() -> None:
    from hf_eagle.arguments.parser import EagleArgumentParser

    (args,) = EagleArgumentParser(BenchmarkArguments, description=__doc__).parse_args_and_config()

    from transformers import AutoTokenizer

    from hf_eagle.answers.turns import read_turns
    from hf_eagle.data.records import load_records
    from hf_eagle.serving.vllm_server import vllm_server

    records = load_records(args.data)
    turns = read_turns(records.select(range(min(args.num_prompts, len(records)))))
    chats = [first for first, *_ in turns]
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    engine = {"dtype": args.dtype, "max_num_seqs": args.max_num_seqs, "max_model_len": args.max_model_len}
    with (
        tempfile.TemporaryDirectory() as folder,
        vllm_server(
            args.target,
            Path(folder) / "server.log",
            args.serving_python,
            **engine,
            enforce_eager=True,
            no_enable_prefix_caching=True,  # a second run would find the first one's prompts
        ) as url,
    ):
        result = compare(args, chats, tokenizer, engine, url, Path(folder))
    served, offline = (statistics.median(result[way]) for way in ("served", "offline"))
    result["ratio"] = served / offline
    print(f"{len(chats)} prompts, tokens per second, medians of {args.rounds}")
    for name, value in (("through the server", served), ("LLM.chat, offline", offline), ("ratio", served / offline)):
        print(f"{name:20}{value:8.2f}")
    if args.output_json:
        Path(args.output_json).write_text(json.dumps({**result, "arguments": asdict(args)}, indent=2) + "\n")


def compare(args: BenchmarkArguments, chats: list, tokenizer, engine: dict, url: str, folder: Path) -> dict:
    """Tokens a second of every run, by way."""
    from hf_eagle.serving.far_end import FarEnd

    (folder / "chats.json").write_text(json.dumps(chats))
    settings = {"chats": str(folder / "chats.json"), "max_tokens": args.max_new_tokens}
    settings["engine"] = {"model": args.target, **engine, "enforce_eager": True, "enable_prefix_caching": False}
    result = {"served": [], "offline": [], "tokens": {"served": [], "offline": []}}
    with FarEnd(
        args.serving_python, Path(__file__).with_name("offline_chat.py"), settings, folder / "offline.log"
    ) as offline:
        served_run(args, chats[:2], tokenizer, url, folder / "warm-up")
        for number in range(args.rounds):
            for way, found in (
                ("offline", offline.ask("run")),
                ("served", served_run(args, chats, tokenizer, url, folder / str(number))),
            ):
                result[way].append(found["tokens"] / found["seconds"])
                result["tokens"][way].append(found["tokens"])
                print(f"{way:8} {found['tokens']} tokens in {found['seconds']:.1f} s", flush=True)
    return result


def served_run(args: BenchmarkArguments, chats: list, tokenizer, url: str, output: Path) -> dict:
    from hf_eagle.answers.served_answers import regenerate_through_server

    begun = time.perf_counter()
    regenerate_through_server(
        [{"messages": chat} for chat in chats],
        output,
        server_url=url,
        target=args.target,
        tokenizer=tokenizer,
        max_new_tokens=args.max_new_tokens,
        concurrency=args.concurrency,
        progress=False,
    )
    seconds = time.perf_counter() - begun
    journal = output.with_name(output.name + ".journal").read_text().splitlines()[1:]
    return {"seconds": seconds, "tokens": sum(json.loads(line)["tokens"] for line in journal)}


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, ValueError) as problem:
        raise SystemExit(f"error: {problem}") from None
