"""Let the target write prompts itself, where there is no data set of them (Magpie).

    make serve-target TARGET=your/model        (in another terminal, or any server with OpenAI's completion API)
    python scripts/write_prompts.py --target your/model --server_url http://localhost:8000 --num_prompts 5000 \
        --output prompts.jsonl

The target goes on where its chat template opens the user's turn, so it writes what users said in the data that it was
tuned on. `--system_prompts` steers it, several in turn: "You help with Python." Then scripts/regenerate_answers.py lets
the target answer. Interrupt it when you like: the same command goes on where it stopped.
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
    output: str = field(metadata={"help": "JSONL file to write; `<output>.journal` beside it holds finished work."})
    num_prompts: Annotated[int, Bounds(least=1, most=10_000_000)] = _arg(
        1000, "Prompts to ask for; unfinished and repeated ones are left out."
    )
    system_prompts: list[str] | None = _arg(
        None, "System messages, taken in turn, which steer what is asked about; they are not written."
    )
    max_new_tokens: Count = _arg(256, "Length of a prompt at most, in tokens.")
    temperature: Annotated[float, Bounds(above=0, most=100)] = _arg(1.0, "Of the sampling.")
    top_p: Mass = _arg(0.95, "Nucleus.")
    seed: Seed = _arg(0, "Seed of the sampling.")
    server_model: str | None = _arg(None, "The server's name for the target, where that cannot be told from `target`.")
    concurrency: Workers = _arg(64, "Requests under way together.")
    retries: Annotated[int, Bounds(least=0, most=1000)] = _arg(12, "Attempts after a failed first one, ever later.")
    request_timeout: Seconds = _arg(600.0, "Seconds that a prompt may take.")


def parser() -> EagleArgumentParser:
    return EagleArgumentParser((WritingArguments, TargetSourceArguments, TemplateArguments), description=__doc__)


def door(argv: list[str] | None = None):
    """The arguments, once each path was looked at."""
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
