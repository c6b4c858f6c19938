"""Say why acceptance is low: test its causes one by one, and rank those that hold.

    python scripts/diagnose_draft.py outputs/my-draft --target your/model --prompts assets/prompts/mt_bench.jsonl
    ... --data answers.jsonl                    also against the training data: template, domain, answers, vocabulary
    ... --trained_target your/first-model       was the draft trained for that target?
    ... --server_url http://localhost:8000      does a vLLM that serves the draft accept as much as it does here?
    ... --only rope_base --repaired new-draft   try one cause, and write the draft without it

The target answers the prompts once, greedily. Then one thing is changed at a time (a RoPE base, the order of the taps,
the rows of the head, the target, the system prompt) and what the draft accepts of these answers is counted again.
Causes that can be undone at once come first, the largest gain first; then what the draft is asked; then what only
training can change, of which upper bounds are told. What can be undone is decoded as well. The commands that measure
each figure again are printed.

Page `diagnose` describes every cause. Without `--prompts`, MT-Bench is taken if `make assets` has fetched it, else
conversations of `--data`. The server must have nobody else to serve meanwhile, and draft as many tokens.
"""

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Count, Depth, Temperature, check_numbers
from hf_eagle.diagnosis.causes import CAUSES
from hf_eagle.door.environment import tell_traps
from hf_eagle.door.printer import run_verb


MT_BENCH = "assets/prompts/mt_bench.jsonl"  # where `make assets` puts it


@dataclass
class DiagnosisArguments:
    _argument_group_name = "diagnosis"

    draft: str = field(metadata={"help": "The draft, a folder or a Hub id; may come first, without its flag."})
    target: str = field(metadata={"help": "The target, or a PEFT adapter of it: a folder or a Hub id."})
    prompts: str | None = field(
        default=None, metadata={"help": f"Prompts, in any form that `evaluate` reads. Unset: {MT_BENCH}, or of `data`."}
    )
    data: list[str] | None = field(
        default=None,
        metadata={"help": "The chats that the draft was trained on: JSON, JSONL, Parquet or CSV, folders, or Hub ids."},
    )
    trained_target: str | None = field(
        default=None, metadata={"help": "Another target, which the draft may have been trained for."}
    )
    server_url: str | None = field(
        default=None,
        metadata={"help": "A vLLM that serves target and draft, e.g. http://localhost:8000: are its counters ours?"},
    )
    only: list[str] | None = field(
        default=None, metadata={"help": f"Causes to try, instead of all: {', '.join(CAUSES)}."}
    )
    repaired: str | None = field(
        default=None, metadata={"help": "New folder for the draft without the first cause that a change of it undoes."}
    )
    output_json: str | None = field(
        default=None, metadata={"help": "JSON file for the diagnosis, which a card shows; a picture lies next to it."}
    )
    num_prompts: Count = field(default=80, metadata={"help": "Number of prompts to use, beginning with the first."})
    max_new_tokens: Count = field(default=64, metadata={"help": "Longest answer, in tokens."})
    num_speculative_tokens: Depth | None = field(
        default=None, metadata={"help": "Tokens drafted per round (K). Unset: the draft's block, or 3."}
    )
    temperature: Temperature = field(
        default=0.0, metadata={"help": "Temperature of the server, to compare with greedy decoding."}
    )
    max_length: Count = field(default=2048, metadata={"help": "Longest chat of `data` in tokens, as in training."})
    confirm: bool = field(default=True, metadata={"help": "Decode with each change that is told, too."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Data type of target and draft; below float32, it may be a cause."},
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, ...; unset: cuda if there is one."})

    def __post_init__(self):
        check_numbers(self)
        for cause in self.only or ():
            if cause not in CAUSES:
                raise ValueError(f"`only` must name causes, got {cause!r}: they are {', '.join(CAUSES)}.")


def parser():
    from hf_eagle.arguments.parser import EagleArgumentParser
    from hf_eagle.arguments.sources import TargetSourceArguments, TemplateArguments

    groups = (DiagnosisArguments, TargetSourceArguments, TemplateArguments)
    return EagleArgumentParser(groups, description=__doc__)


def door(argv: list[str] | None = None):
    """Return the arguments, after checking every path."""
    from hf_eagle.door.connection import check_server
    from hf_eagle.door.inputs import check_data, check_draft, check_file, check_target
    from hf_eagle.door.outputs import (
        check_apart,
        check_new_folder,
        check_output_file,
        check_pictures,
        holds_object_with,
    )

    args, source, template = parser().parse_args_and_config(argv, first="draft")
    check_draft("draft", args.draft)
    check_target("target", args.target, source.gguf_file)
    if args.prompts is None and Path(MT_BENCH).is_file():
        args.prompts = MT_BENCH
    if args.prompts is None and not args.data:
        raise ValueError(f"`prompts` is not set and there is no {MT_BENCH}: name a file of prompts, or `data`.")
    if args.prompts is not None:
        check_file("prompts", args.prompts)
    if args.data:
        check_data("data", args.data)
    if args.trained_target is not None:
        check_target("trained_target", args.trained_target)
    if args.server_url is not None:
        check_server(args.server_url, api_key())

    names = ("target", "draft", "prompts", "data", "trained_target")
    reads = {name: getattr(args, name) for name in names} | {"tools": template.tools}
    if args.repaired is not None:
        check_new_folder("repaired", args.repaired, reads)
    if args.output_json is not None:
        check_output_file("output_json", args.output_json, reads, holds_object_with("causes", "tried"))
        check_pictures("output_json", [Path(args.output_json).with_suffix(".png")], args.output_json, reads)
    check_apart({"output_json": args.output_json, "repaired": args.repaired})
    return args, source, template


def api_key() -> str | None:
    """Return the server's key, from the environment."""
    import os

    return os.environ.get("OPENAI_API_KEY")


def main() -> None:
    args, source, template = door()
    tell_traps()

    from hf_eagle.diagnosis.diagnose import diagnose
    from hf_eagle.diagnosis.of_server import Server
    from hf_eagle.diagnosis.report import told

    case, opened = examined(args, source.source, template.template_kwargs)
    server = None if args.server_url is None else Server(args.server_url, api_key())
    diagnosis = diagnose(case, opened, server, args.confirm)
    write_result(args, diagnosis)
    again = words(args, source, template)
    print(told(diagnosis, lambda cause: shlex.join([*again, "--only", cause]), evaluation(args, template, case)))


def read_texts(args: DiagnosisArguments, source: dict, template_kwargs: dict):
    """Return tokenizer, prompts and [`TrainingData`] (`None` without `data`); no model is read."""
    from hf_eagle.data.records import load_records
    from hf_eagle.diagnosis.training_data import TrainingData
    from hf_eagle.door.inputs import naming
    from hf_eagle.evaluation.prompt_batches import check_rendering
    from hf_eagle.evaluation.prompts import load_prompts
    from hf_eagle.targets.loading import load_tokenizer

    with naming("prompts"):
        prompts = None if args.prompts is None else load_prompts(args.prompts, args.num_prompts)
    tokenizer, data = load_tokenizer(args.target, **source), None
    if args.data:
        with naming("data"):
            records = load_records(args.data)
        data = TrainingData(records, tokenizer, args.max_length, template_kwargs)
        prompts = data.prompts(args.num_prompts) if prompts is None else prompts
    with naming("prompts"):
        check_rendering(prompts, tokenizer, template_kwargs)
    return tokenizer, prompts, data


def examined(args: DiagnosisArguments, source: dict, template_kwargs: dict):
    """Return the [`Case`], and what opening the draft found; the target's weights are read last."""
    import torch

    from hf_eagle import load_draft
    from hf_eagle.arguments.devices import device_of
    from hf_eagle.decoding.checks import check_draft_fits
    from hf_eagle.decoding.target_run import check_target, why_alone
    from hf_eagle.diagnosis.case import Case, TrainingFacts
    from hf_eagle.diagnosis.opening import open_draft
    from hf_eagle.diagnosis.sample import Sample
    from hf_eagle.evaluation.measurement import DecodingSettings
    from hf_eagle.evaluation.whole import BATCH
    from hf_eagle.targets.room import check_room
    from hf_eagle.targets.target import FrozenTarget

    device, dtype = device_of(args.device), getattr(torch, args.dtype)
    config = check_room(args.target, "max_new_tokens", args.max_new_tokens, beside=1, **source)
    tokenizer, prompts, data = read_texts(args, source, template_kwargs)
    opened = open_draft(args.draft, config, dtype)
    draft = opened.draft.to(device).eval()

    def load_target(name: str, source: dict) -> FrozenTarget:
        asked = {"tap_ids": draft.config.tap_ids, "dtype": dtype, "device": device}
        return FrozenTarget.from_pretrained(name, **asked, **source)

    target = load_target(args.target, source)
    check_draft_fits(target, draft)
    draft.attach(target)
    alone = why_alone(target, False)
    check_target(target, needs_masks=alone is None)

    given = {name: getattr(args, name) for name in ("max_new_tokens", "num_speculative_tokens")}
    settings = DecodingSettings(**given, batch_size=BATCH if alone is None else 1).for_draft(draft)
    case = Case(draft, Sample(target, tokenizer, prompts, settings, template_kwargs), frozenset(args.only or ()))
    case.facts, case.data, case.bases = TrainingFacts.read(opened.folder), data, opened.bases
    case.prompts_name, case.temperature = args.prompts and Path(args.prompts).name, args.temperature
    if args.trained_target is not None:
        case.trained_target = lambda: load_target(args.trained_target, {})
    if args.dtype != "float32" and not opened.mended:
        case.in_float32 = lambda: load_draft(args.draft, target, dtype=torch.float32)
    return case, opened


def write_result(args: DiagnosisArguments, diagnosis) -> None:
    """Write the JSON file, the picture and the repaired draft, as far as they were asked for."""
    from hf_eagle.diagnosis.report import plot_diagnosis
    from hf_eagle.door.writing import output, output_folder, write_output

    if args.repaired is not None:
        if diagnosis.repaired is None:
            print("No change of the draft was found that repairs it: `repaired` is not written.")
        else:
            with output_folder("repaired", args.repaired) as folder:
                diagnosis.repaired().save_pretrained(folder)
    if args.output_json is None:
        return

    said = {"target": args.target, "draft": args.draft, "prompts": args.prompts and Path(args.prompts).name}
    said |= {"dtype": args.dtype}
    write_output("output_json", args.output_json, json.dumps(diagnosis.as_json() | said, indent=2))
    with output("output_json", Path(args.output_json).with_suffix(".png")) as part:
        plot_diagnosis(diagnosis.summary, part)


def words(args: DiagnosisArguments, source, template) -> list[str]:
    """Return this command, without what it writes and without `only`."""
    from dataclasses import fields

    found = ["hf-eagle", "diagnose", args.draft]
    for group in (args, source, template):
        for known in fields(group):
            value = getattr(group, known.name)
            if known.name in ("draft", "only", "repaired", "output_json") or value in (None, known.default):
                continue
            found += [f"--{known.name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


def evaluation(args: DiagnosisArguments, template, case) -> str:
    """Return the command that measures acceptance as it is, without a diagnosis."""
    if args.prompts is None:
        return shlex.join([*words(args, template, template), "--only", "lost_norms"])
    found = ["hf-eagle", "evaluate", "--target", args.target, "--draft", args.draft, "--prompts", args.prompts]
    found += ["--num_prompts", str(args.num_prompts), "--max_new_tokens", str(args.max_new_tokens)]
    found += ["--num_speculative_tokens", str(case.depth), "--dtype", args.dtype, "--teacher_forced"]
    if template.chat_template_kwargs is not None:
        found += ["--chat_template_kwargs", template.chat_template_kwargs]
    return shlex.join([*found, "--output_json", "acceptance.json"])


if __name__ == "__main__":
    run_verb(main)
