"""Let the target write prompts itself, where there is no data set of them (Magpie).

    make serve-target TARGET=your/model        (in another terminal, or any server with OpenAI's completion API)
    python scripts/write_prompts.py --target your/model --server_url http://localhost:8000 --num_prompts 5000 \
        --output prompts.jsonl

The target goes on where its chat template opens the user's turn, so it writes what users said in the data that it was
tuned on. `--system_prompts` steers it, several in turn: "You help with Python." Then scripts/regenerate_answers.py lets
the target answer. Interrupt it when you like: the same command goes on where it stopped.
"""

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

from hf_eagle.arguments.parser import EagleArgumentParser
from hf_eagle.arguments.parser import argument as _arg
from hf_eagle.arguments.sources import TargetSourceArguments, TemplateArguments


@dataclass
class WritingArguments:
    target: str = field(metadata={"help": "Target model: a folder or a Hub id."})
    server_url: str = field(metadata={"help": "Server that runs the target, such as http://localhost:8000."})
    output: str = field(metadata={"help": "JSONL file to write; `<output>.journal` beside it holds finished work."})
    num_prompts: int = _arg(1000, "Prompts to ask for; unfinished and repeated ones are left out.")
    system_prompts: list[str] | None = _arg(
        None, "System messages, taken in turn, which steer what is asked about; they are not written."
    )
    max_new_tokens: int = _arg(256, "Length of a prompt at most, in tokens.")
    temperature: float = _arg(1.0, "Of the sampling; above 0.")
    top_p: float = _arg(0.95, "Nucleus.")
    seed: int = _arg(0, "Seed of the sampling.")
    server_model: str | None = _arg(None, "The server's name for the target, where that cannot be told from `target`.")
    concurrency: int = _arg(64, "Requests under way together.")
    retries: int = _arg(12, "Attempts after a failed first one, ever later.")
    request_timeout: float = _arg(600.0, "Seconds that a prompt may take.")


def main() -> None:
    groups = (WritingArguments, TargetSourceArguments, TemplateArguments)
    args, source, template = EagleArgumentParser(groups, description=__doc__).parse_args_and_config()

    from hf_eagle.answers.written_prompts import write_prompts
    from hf_eagle.targets.loading import load_tokenizer

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = dict(vars(args))
    tokenizer = load_tokenizer(args.target, **source.source)
    options |= {"tokenizer": tokenizer, "template_kwargs": template.template_kwargs}
    write_prompts(options.pop("output"), api_key=os.environ.get("OPENAI_API_KEY"), **options)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as problem:
        raise SystemExit(f"error: {problem}") from None
