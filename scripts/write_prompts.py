"""Let the target write prompts itself, if you have no data set of prompts (Magpie).

    make serve-target TARGET=your/model        (in another terminal, or any server with OpenAI's completion API)
    python scripts/write_prompts.py --target your/model --server_url http://localhost:8000 --num_prompts 5000 \
        --output prompts.jsonl

The target continues from the point where its chat template opens the user's turn, so it writes what users said in its
own training data. `--system_prompts`, used in turn, steer it: "You help with Python." After that,
scripts/regenerate_answers.py generates the answers. You can interrupt it at any time: the same command continues where
it stopped.

    python scripts/write_prompts.py --target your/model --behind none,512,2048,8192 --questions mt_bench.jsonl \
        --texts train.jsonl --output behind.jsonl

writes the same questions behind different amounts of text instead, to measure acceptance by context length with
scripts/evaluate_draft.py. The text is that of other prompts, in a random order. No server is needed.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Bounds, Count, Mass, Seconds, Seed, Workers
from hf_eagle.arguments.parser import EagleArgumentParser, parse_lengths
from hf_eagle.arguments.parser import argument as _arg
from hf_eagle.arguments.sources import TargetSourceArguments, TemplateArguments
from hf_eagle.door.connection import check_server
from hf_eagle.door.inputs import check_data, check_file, check_target, naming
from hf_eagle.door.logs import show_log
from hf_eagle.door.outputs import check_journaled_file, check_output_file
from hf_eagle.door.printer import going_on, run_verb


@dataclass
class WritingArguments:
    target: str = field(metadata={"help": "Target model: a folder or a Hub id."})
    output: str = field(metadata={"help": "JSONL file to write; `<output>.journal` next to it holds finished work."})
    server_url: str | None = _arg(
        None, "Server that runs the target, such as http://localhost:8000; only `behind` needs none."
    )
    behind: str | None = _arg(
        None, "Write questions behind so many tokens of text instead, as `none,512,2048`; `none`: behind no text."
    )
    questions: str | None = _arg(None, "With `behind`: the prompts, in any form that scripts/evaluate_draft.py reads.")
    texts: list[str] | None = _arg(None, "With `behind`: chats whose messages are the text, as `train_data`.")
    num_prompts: Annotated[int, Bounds(least=1, most=10_000_000)] = _arg(
        1000, "Number of prompts to ask for; unfinished and repeated ones are left out. With `behind`: of questions."
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

    def __post_init__(self):
        if self.behind is None and self.server_url is None:
            raise ValueError("`server_url` is missing: name a server that runs the target, or give `behind`.")
        given = {name: getattr(self, name) is not None for name in ("behind", "questions", "texts")}
        if len(set(given.values())) > 1:
            missing = ", ".join(f"`{name}`" for name, there in given.items() if not there)
            raise ValueError(f"`behind`, `questions` and `texts` belong together, but {missing} is missing: give all.")
        if self.behind is not None:
            self.behind = [length or 0 for length in parse_lengths("behind", self.behind, or_none=True)]


def parser() -> EagleArgumentParser:
    return EagleArgumentParser((WritingArguments, TargetSourceArguments, TemplateArguments), description=__doc__)


def door(argv: list[str] | None = None):
    """Return the arguments, after checking every path."""
    args, source, template = parser().parse_args_and_config(argv)
    check_target("target", args.target, source.gguf_file)
    reads = {"target": args.target, "tools": template.tools, "questions": args.questions, "texts": args.texts}
    if args.behind is None:
        check_journaled_file("output", args.output, reads)
        check_server(args.server_url, os.environ.get("OPENAI_API_KEY"))
    else:
        check_file("questions", args.questions)
        check_data("texts", args.texts)
        check_output_file("output", args.output, reads, is_behind)
    return args, source, template


def is_behind(path: Path) -> bool:
    """Whether a file begins as one that was written with `behind`."""
    import json

    try:
        with path.open(encoding="utf-8") as lines:
            first = json.loads(next(lines, "{}"))
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and str(first.get("category")).startswith("behind ")


def main() -> None:
    args, source, template = door()

    from hf_eagle.answers.written_prompts import write_prompts
    from hf_eagle.targets.loading import load_tokenizer
    from hf_eagle.targets.room import check_room

    show_log()
    if args.behind is not None:
        return write_behind(args, source)
    check_room(args.target, "max_new_tokens", args.max_new_tokens, beside=1, **source.source)
    options = dict(vars(args))
    tokenizer = load_tokenizer(args.target, **source.source)
    for name in ("behind", "questions", "texts"):
        del options[name]
    options |= {"tokenizer": tokenizer, "template_kwargs": template.template_kwargs}
    with naming("output", args.output), going_on():
        write_prompts(options.pop("output"), api_key=os.environ.get("OPENAI_API_KEY"), **options)


def write_behind(args: WritingArguments, source: TargetSourceArguments) -> None:
    """Write the questions behind each amount of text."""
    import json

    from hf_eagle.data.conversations import load_records
    from hf_eagle.data.messages import text_of, to_messages
    from hf_eagle.door.writing import write_output
    from hf_eagle.evaluation.behind import prompts_behind
    from hf_eagle.evaluation.prompts import load_prompts
    from hf_eagle.targets.loading import load_tokenizer

    with naming("questions"):
        questions = load_prompts(args.questions, args.num_prompts)
    texts = []
    for path in args.texts:
        with naming("texts"):
            chats = map(to_messages, load_records(path))
            texts += [text_of(message["content"]) for chat in chats for message in chat if message["content"]]

    tokenizer = load_tokenizer(args.target, **source.source)
    records = prompts_behind(questions, texts, args.behind, tokenizer, args.seed)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_output("output", args.output, "\n".join(lines))
    lengths = ", ".join(map(str, args.behind))
    print(f"{len(records)} prompts: {len(questions)} questions behind {lengths} tokens of text")


if __name__ == "__main__":
    run_verb(main)
