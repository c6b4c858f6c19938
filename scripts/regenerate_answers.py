"""Generate the target's own answers to the prompts of a data set, to train the draft on.

    python scripts/regenerate_answers.py --target TARGET --data prompts.jsonl --output answers.jsonl
    python scripts/regenerate_answers.py --target TARGET --data prompts.jsonl --output answers.jsonl \
        --server_url http://localhost:8000

User turns are answered in order, each after the model's own earlier answers; answers in the data are dropped. Tools are
not run: a chat ends before its first tool result, and the log counts the user turns after it.

The output holds `messages`, ready for `train_data` of scripts/train_eagle.py, with the token ids of each answer.
Training uses these ids, whatever the chat template leaves out of an answer. A record's own `id` is kept. You can
interrupt it at any time: the same command continues where it stopped.

The first command runs the target in this process. The second uses a server that runs it: vLLM, SGLang, or any other
with OpenAI's chat API (the key is read from the environment variable OPENAI_API_KEY). A server can also answer prompts
with images.
"""

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Bounds, Count, Mass, Rows, Seconds, Seed, Temperature, Workers
from hf_eagle.arguments.parser import EagleArgumentParser
from hf_eagle.arguments.parser import argument as _arg
from hf_eagle.arguments.sources import MEDIA_ROOT, TargetSourceArguments, TemplateArguments
from hf_eagle.data.overlap import RULE
from hf_eagle.door.connection import check_server
from hf_eagle.door.environment import tell_traps
from hf_eagle.door.inputs import check_data, check_file, check_folder, check_target, naming
from hf_eagle.door.logs import show_log
from hf_eagle.door.outputs import check_journaled_file
from hf_eagle.door.printer import going_on, run_verb


# what is meant by an option that is left out; each belongs to one of the two ways
IN_PROCESS = {"batch_size": 96, "dtype": "auto", "device": None}
SERVED = {"server_model": None, "concurrency": 64, "retries": 12, "request_timeout": 600.0}


@dataclass
class RegenerationArguments:
    target: str = field(metadata={"help": "Target model, or a PEFT adapter of it: a folder or a Hub id."})
    data: list[str] = field(
        metadata={
            "help": "Chats whose user turns are answered: JSON, JSONL, Parquet or CSV files, folders, or Hub ids."
        }
    )
    output: str = field(metadata={"help": "JSONL file to write; `<output>.journal` next to it holds finished work."})
    num_records: Count | None = _arg(None, "Number of records to use, beginning with the first.")
    held_out: list[str] | None = _arg(
        None,
        f"Evaluation prompts (.jsonl, .json, .txt): records that hold one are left out ({RULE}).",
    )
    media_root: str | None = _arg(None, MEDIA_ROOT)
    skip_bad_records: bool = _arg(
        False, "Leave out, and count, records that cannot be read or ask nothing, instead of stopping."
    )
    max_new_tokens: Count = _arg(128, "Longest answer, in tokens.")
    temperature: Temperature = _arg(0.0, "0 is greedy.")
    top_p: Mass = _arg(1.0, "Nucleus, when sampling.")
    seed: Seed = _arg(0, "Seed of sampling.")
    time_limit: Annotated[float, Bounds(least=0, most=1_000_000)] | None = _arg(
        None, "Minutes after which nothing new is started; the same command continues later."
    )
    batch_size: Rows | None = _arg(None, "Without a server: number of prompts answered together. Default 96.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = _arg(
        None, "Without a server: data type that the target runs in. Default auto, its own."
    )
    device: str | None = _arg(None, "Without a server: device of the target. Default cuda if there is one, else cpu.")
    server_url: str | None = _arg(None, "Address of a server that runs the target, such as http://localhost:8000.")
    server_model: str | None = _arg(None, "Server: its name for the target, if it differs from `target`.")
    concurrency: Workers | None = _arg(None, "Server: largest number of requests in flight. Default 64.")
    retries: Annotated[int, Bounds(least=0, most=1000)] | None = _arg(
        None, "Server: retries of a failed request, at growing intervals. Default 12, two to three minutes."
    )
    request_timeout: Seconds | None = _arg(None, "Server: longest time of one request, in seconds. Default 600.")

    def __post_init__(self):
        idle, way = (SERVED, "without") if self.server_url is None else (IN_PROCESS, "with")
        for name in idle:
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` means nothing {way} `server_url`; leave it out.")


def parser() -> EagleArgumentParser:
    return EagleArgumentParser((RegenerationArguments, TargetSourceArguments, TemplateArguments), description=__doc__)


def door(argv: list[str] | None = None):
    """Return the arguments, after checking every path."""
    args, source, template = parser().parse_args_and_config(argv)
    check_target("target", args.target, source.gguf_file)
    check_data("data", args.data)
    for path in args.held_out or ():
        check_file("held_out", path)
    reads = {name: getattr(args, name) for name in ("target", "data", "held_out")}
    check_journaled_file("output", args.output, reads | {"tools": template.tools})
    if args.media_root is not None:
        check_folder("media_root", args.media_root)
    if args.server_url is not None:
        check_server(args.server_url, os.environ.get("OPENAI_API_KEY"))
    return args, source, template


def main() -> None:
    args, source, template = door()

    from hf_eagle.answers.turns import answerable
    from hf_eagle.arguments.devices import device_of
    from hf_eagle.data.records import load_records
    from hf_eagle.data.template_check import check_template
    from hf_eagle.targets.loading import load_tokenizer
    from hf_eagle.targets.room import check_room

    if args.server_url is None:
        args.device = device_of(args.device)
    check_room(args.target, "max_new_tokens", args.max_new_tokens, beside=1, **source.source)
    show_log()
    tell_traps()
    served = args.server_url is not None
    parts = {"content_parts": served, "media_root": args.media_root}
    with naming("data"):
        records = load_records(args.data, content_parts=served, skip_bad_records=args.skip_bad_records)
        records = answerable(records, **parts) if args.skip_bad_records else records
    if args.num_records is not None:
        records = records.select(range(min(args.num_records, len(records))))
    if args.held_out:
        with naming("held_out"):
            records = without(args.held_out, records)
    tokenizer = load_tokenizer(args.target, **source.source)
    with naming("data"):
        check_template(tokenizer, records, template.template_kwargs, **parts)
    common = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "time_limit": None if args.time_limit is None else 60 * args.time_limit,
        "template_kwargs": template.template_kwargs,
    }
    with naming("output", args.output), going_on():
        if args.server_url is None:
            answer_in_process(args, records, tokenizer, source.source, common)
        else:
            ask_server(args, records, tokenizer, common)


def without(held_out: list[str], records):
    """Return the records without an evaluation prompt; log how many are left out."""
    from hf_eagle.data.messages import read_record, text_of
    from hf_eagle.data.overlap import HeldOut
    from hf_eagle.evaluation.prompts import load_prompts

    prompts = HeldOut([text for path in held_out for prompt in load_prompts(path) for text in prompt.asked])
    clean = []
    for index, record in enumerate(records):
        messages = read_record(record, index, content_parts=True)[0]
        if not prompts.found_in(text_of(message["content"]) for message in messages):
            clean.append(index)
    logging.info("%d of %d records hold prompts of %s: left out.", len(records) - len(clean), len(records), held_out)
    return records.select(clean)


def answer_in_process(args: RegenerationArguments, records, tokenizer, source: dict, common: dict) -> None:
    from hf_eagle.answers.regeneration import regenerate_answers
    from hf_eagle.targets.loading import load_causal_lm

    own = given(args, IN_PROCESS)
    model = load_causal_lm(args.target, dtype=own["dtype"], **source).eval()
    model = model.to(own["device"])
    regenerate_answers(model, tokenizer, records, args.output, batch_size=own["batch_size"], **common)


def ask_server(args: RegenerationArguments, records, tokenizer, common: dict) -> None:
    from hf_eagle.answers.served_answers import regenerate_through_server

    regenerate_through_server(
        records,
        args.output,
        server_url=args.server_url,
        target=args.target,
        tokenizer=tokenizer,
        api_key=os.environ.get("OPENAI_API_KEY"),
        media_root=args.media_root,
        **given(args, SERVED),
        **common,
    )


def given(args: RegenerationArguments, defaults: dict) -> dict:
    """Return the options of one way, with or without a server; its defaults stand in for those left out."""
    return {name: default if getattr(args, name) is None else getattr(args, name) for name, default in defaults.items()}


if __name__ == "__main__":
    run_verb(main)
