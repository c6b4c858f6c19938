"""Let the target write prompts itself, if you have no data set of prompts (Magpie).

    make serve-target TARGET=your/model        (in another terminal, or any server with OpenAI's completion API)
    python scripts/write_prompts.py --target your/model --server_url http://localhost:8000 --num_prompts 5000 \
        --output prompts.jsonl

The target continues from the point where its chat template opens the user's turn, so it writes what users said in its
own training data. `--system_prompts`, used in turn, steer it: "You help with Python." After that,
scripts/regenerate_answers.py generates the answers. You can interrupt it at any time: the same command continues where
it stopped.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Bounds, Count, Mass, Seconds, Seed, Workers
from hf_eagle.arguments.parser import EagleArgumentParser
from hf_eagle.arguments.parser import argument as _arg
from hf_eagle.arguments.sources import TargetSourceArguments, TemplateArguments
from hf_eagle.door.connection import check_server
from hf_eagle.door.inputs import check_target, naming
from hf_eagle.door.logs import show_log
from hf_eagle.door.outputs import check_journaled_file
from hf_eagle.door.printer import going_on, run_verb


@dataclass
class WritingArguments:
    target: str = field(metadata={"help": "Target model: a folder or a Hub id."})
    server_url: str = field(metadata={"help": "Server that runs the target, such as http://localhost:8000."})
    output: str = field(metadata={"help": "JSONL file to write; `<output>.journal` next to it holds finished work."})
    num_prompts: Annotated[int, Bounds(least=1, most=10_000_000)] = _arg(
        1000, "Number of prompts to ask for; unfinished and repeated ones are left out."
    )
    system_prompts: list[str] | None = _arg(
        None, "System messages, used in turn, that steer the topics; they are not written to the output."
    )
    max_new_tokens: Count = _arg(256, "Longest prompt, in tokens.")
    temperature: Annotated[float, Bounds(above=0, most=100)] = _arg(1.0, "Of the sampling.")
    top_p: Mass = _arg(0.95, "Nucleus.")
    seed: Seed = _arg(0, "Seed of the sampling.")
    server_model: str | None = _arg(None, "The server's name for the target, if it differs from `target`.")
    concurrency: Workers = _arg(64, "Largest number of requests in flight.")
    retries: Annotated[int, Bounds(least=0, most=1000)] = _arg(12, "Retries of a failed request, at growing intervals.")
    request_timeout: Seconds = _arg(600.0, "Longest time of one request, in seconds.")


def parser() -> EagleArgumentParser:
    return EagleArgumentParser((WritingArguments, TargetSourceArguments, TemplateArguments), description=__doc__)


def door(argv: list[str] | None = None):
    """Return the arguments, after checking every path."""
    args, source, template = parser().parse_args_and_config(argv)
    check_target("target", args.target, source.gguf_file)
    check_journaled_file("output", args.output, {"target": args.target, "tools": template.tools})
    check_server(args.server_url, os.environ.get("OPENAI_API_KEY"))
    return args, source, template


def main() -> None:
    args, source, template = door()

    from hf_eagle.answers.written_prompts import write_prompts
    from hf_eagle.targets.loading import load_tokenizer
    from hf_eagle.targets.room import check_room

    show_log()
    check_room(args.target, "max_new_tokens", args.max_new_tokens, beside=1, **source.source)
    options = dict(vars(args))
    tokenizer = load_tokenizer(args.target, **source.source)
    options |= {"tokenizer": tokenizer, "template_kwargs": template.template_kwargs}
    with naming("output", args.output), going_on():
        write_prompts(options.pop("output"), api_key=os.environ.get("OPENAI_API_KEY"), **options)


if __name__ == "__main__":
    run_verb(main)
