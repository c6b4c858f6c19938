"""Measure how much faster vLLM decodes with a draft: tokens per second with and without it, by K and batch size.

    python scripts/benchmark_serving.py --target assets/smollm2-135m-instruct --draft outputs/quickstart \
        --prompts assets/prompts/mt_bench.jsonl --num_speculative_tokens 1..6 --batch_sizes 1,2,4,8 \
        --output_json outputs/quickstart/serving.json

Starts one engine for every K and one without a draft, and keeps all of them running. Each decodes the same prompts in
turn, greedily, for several rounds, so whatever slows the machine slows all of them. Prints a table of medians, the
batch size from which the draft no longer pays, and the schedule that has vLLM draft as many tokens as pay at each load.
Draws the table next to the JSON. Uses the vLLM of the environment that `make test-serving` creates; `--serving_python`
selects a different one. Run it on an otherwise idle machine.

Prompts may contain images, which are sent as a client sends them, in `image_url` parts with data URLs. If prompts have
a `category`, the acceptance length of each category is measured too. `--context_buckets 512,2048` takes the length of
the prompts as their category: each bucket is decoded once more by itself, since vLLM's counters know no lengths.

You can interrupt it at any time: `<output_json>.journal` holds what all engines have decoded, and the same command
continues from there. It refuses to continue with different settings or a different draft. The journal is deleted once
the result is written.
"""

import hashlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Count, Repeats
from hf_eagle.door.printer import going_on, run_verb


ROOT = Path(__file__).resolve().parents[1]


@dataclass
class ServingArguments:
    target: str = field(metadata={"help": "Target model: a folder or a Hub id."})
    draft: str = field(metadata={"help": "The draft's checkpoint folder or Hub id."})
    prompts: str = field(metadata={"help": "Prompts, in any form that scripts/evaluate_draft.py reads."})
    output_json: str = field(
        metadata={"help": "JSON file for the result; until it is written, `<output_json>.journal` holds finished work."}
    )
    num_speculative_tokens: str | None = field(
        default=None,
        metadata={
            "help": "Numbers of drafted tokens (K) to measure, as `1..6` or `1,2,4`. Unset: what the draft's blocks "
            "hold, else 3."
        },
    )
    batch_sizes: str = field(default="1", metadata={"help": "Numbers of requests in flight, as `1..4` or `1,2,4,8`."})
    num_prompts: Count = field(default=16, metadata={"help": "Number of prompts to use, spread evenly over the file."})
    max_new_tokens: Count = field(default=64, metadata={"help": "Longest answer, in tokens."})
    context_buckets: str | None = field(
        default=None,
        metadata={
            "help": "Measure acceptance by the length of the prompts instead of by their category, in buckets that end "
            "at these, as `512,2048,8192`."
        },
    )
    rounds: Repeats = field(default=5, metadata={"help": "Runs of each engine, in alternation; medians are shown."})
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = field(
        default="bfloat16", metadata={"help": "Data type of target and draft."}
    )
    max_model_len: Count = field(default=2048, metadata={"help": "Context length."})
    engine_args: str = field(
        default='{"enforce_eager": true}',
        metadata={
            "help": "Further arguments of vLLM's `LLM` for every engine, as JSON. On a GPU, whose memory the engines "
            'share, for instance: {"gpu_memory_utilization": 0.2}.'
        },
    )
    serving_python: str = field(
        default=str(ROOT / ".venv-serving/bin/python"), metadata={"help": "Python interpreter that has vLLM."}
    )

    def __post_init__(self):
        from hf_eagle.arguments.parser import parse_counts, parse_lengths

        if self.context_buckets is not None:
            self.context_buckets = parse_lengths("context_buckets", self.context_buckets)
        for name, most in (("num_speculative_tokens", 64), ("batch_sizes", 1024)):
            if getattr(self, name) is not None:
                setattr(self, name, parse_counts(name, getattr(self, name), most))
        try:
            self.engine_args = json.loads(self.engine_args)
        except json.JSONDecodeError as problem:
            raise ValueError(f"`engine_args` is not JSON: {problem}.") from None
        if not isinstance(self.engine_args, dict):
            raise ValueError(f"`engine_args` must be a JSON object, got {self.engine_args}.")
        if not Path(self.serving_python).exists():
            raise ValueError(f"`serving_python` {self.serving_python} does not exist; `make test-serving` makes it.")


def parser():
    from hf_eagle.arguments.parser import EagleArgumentParser
    from hf_eagle.arguments.sources import TargetSourceArguments, TemplateArguments

    groups = (ServingArguments, TargetSourceArguments, TemplateArguments)
    return EagleArgumentParser(groups, description=__doc__)


def door(argv: list[str] | None = None):
    """Return the arguments, after checking every path."""
    from hf_eagle.door.inputs import check_draft, check_file, check_target
    from hf_eagle.door.outputs import check_journal, check_output_file, check_pictures, holds_object_with

    args, source, template = parser().parse_args_and_config(argv)
    check_target("target", args.target, source.gguf_file)
    check_draft("draft", args.draft)
    check_file("prompts", args.prompts)
    check_file("serving_python", args.serving_python)

    reads = {name: getattr(args, name) for name in ("target", "draft", "prompts", "serving_python")}
    reads["tools"] = template.tools
    check_output_file("output_json", args.output_json, reads, holds_object_with("server", "entries"))
    check_journal("output_json", args.output_json, reads)
    check_pictures("output_json", [Path(args.output_json).with_suffix(".png")], args.output_json, reads)
    return args, source, template


def main() -> None:
    args, source, template = door()

    from hf_eagle.door.inputs import naming
    from hf_eagle.door.journal import Journal, journal_path
    from hf_eagle.door.writing import output as output_file
    from hf_eagle.door.writing import write_output
    from hf_eagle.drafts.build import draft_class_of
    from hf_eagle.drafts.kinds import find_kind
    from hf_eagle.evaluation.plots import plot_serving
    from hf_eagle.evaluation.prompts import holds_media, load_prompts, spread
    from hf_eagle.hub.run_facts import machine
    from hf_eagle.serving.commands import served_as
    from hf_eagle.serving.schedule import schedule_of, takes_schedule
    from hf_eagle.serving.served_prompts import engine_arguments, served_prompts
    from hf_eagle.serving.speed import Engine, measure_serving, table, table_of_categories, verdict
    from hf_eagle.targets.loading import load_processor, load_tokenizer, takes_media

    with naming("prompts"):
        chosen = spread(load_prompts(args.prompts), args.num_prompts)
    draft_class = draft_class_of(args.draft)
    kind, _ = find_kind([draft_class.__name__])
    if args.num_speculative_tokens is None:
        args.num_speculative_tokens = [draft_class.config_class.from_pretrained(args.draft).chain_length]
    method = served_as(kind.name).vllm.name
    shows = any(map(holds_media, chosen)) and takes_media(args.target, **source.source)
    processing = (load_processor if shows else load_tokenizer)(args.target, **source.source)
    prompts, longest = served_prompts(chosen, processing, template.template_kwargs)
    if args.context_buckets is not None and any(isinstance(prompt, dict) for prompt in prompts):
        raise ValueError("`context_buckets` counts tokens, which images become only in the server: leave them out.")
    longest += args.max_new_tokens
    if longest > args.max_model_len:
        raise ValueError(f"`max_model_len` is {args.max_model_len}, but a prompt and its answer take {longest} tokens.")

    output = Path(args.output_json)
    journal = Journal(journal_path(output), depends_on(args, source, template, prompts))
    if journal.rows:
        print(f"continuing after the {len(journal.rows)} runs of all engines in {journal.path}", flush=True)
    with naming("output_json", args.output_json), journal, going_on(), tempfile.TemporaryDirectory() as logs:

        def start(count: int) -> Engine:
            print(f"starting vLLM {f'with K = {count}' if count else 'without a draft'}", flush=True)
            drafting = {"method": method, "model": args.draft, "num_speculative_tokens": count}
            return Engine(
                args.serving_python,
                Path(logs) / f"{count}.log",
                beside_pictures(args.serving_python) if shows else None,
                **(served_target(args.target, source) | engine_arguments(chosen) | args.engine_args),
                dtype=args.dtype,
                max_model_len=args.max_model_len,
                max_num_seqs=max(args.batch_sizes),
                **({"speculative_config": drafting} if count else {}),
            )

        shape = (args.num_speculative_tokens, args.batch_sizes, args.rounds, args.max_new_tokens)
        how = {"report": lambda line: print(line, flush=True), "journal": journal}
        how["categories"] = categories(args, chosen, prompts)
        entries = measure_serving(start, prompts, *shape, **how)

    result = {"server": "vLLM", "prompts": Path(args.prompts).name, "machine": machine(), "entries": entries}
    result["schedule"], result["takes_schedule"] = schedule_of(entries), takes_schedule(args.serving_python)
    result["arguments"] = asdict(args) | asdict(source) | asdict(template)
    write_output("output_json", output, json.dumps(result, indent=2))
    journal.remove()
    with output_file("output_json", output.with_suffix(".png")) as part:
        plot_serving(entries, part)
    said = (table(entries), table_of_categories(entries), verdict(entries), advice(result))
    print("\n".join(filter(None, said)))


def advice(result: dict) -> str:
    """Return how vLLM is told to draft as many tokens as pay at each load; empty if one load was measured."""
    from hf_eagle.serving.schedule import FIELD, loads, schedule_fields, told_schedule

    if len(loads(result["entries"])) < 2:
        return ""
    fields = schedule_fields(result["schedule"])
    told = f"requests in flight and tokens to draft: {told_schedule(result['schedule'])}"
    if FIELD not in fields:
        return told
    if not result["takes_schedule"]:
        return f"{told}. The vLLM that was measured takes no such schedule: start it with the number for your load"
    return f"{told}. In --speculative-config: {json.dumps(fields)[1:-1]}"


def categories(args: ServingArguments, chosen: list, prompts: list[list[int] | dict]) -> list[str | None]:
    """Return the category of each prompt: the file's, or the bucket of its length."""
    from hf_eagle.evaluation.contexts import bucket_of_prompt

    if args.context_buckets is None:
        return [prompt.category for prompt in chosen]
    return [bucket_of_prompt(len(ids), args.context_buckets) for ids in prompts]


def depends_on(args: ServingArguments, source, template, prompts: list[list[int] | dict]) -> dict:
    """Return the settings that a run depends on, for the first line of the journal."""
    from hf_eagle.hub.run_facts import machine
    from hf_eagle.serving.speed import model_identity

    asked = asdict(args) | asdict(source) | asdict(template)
    for name in ("output_json", "target", "draft", "prompts", "tools"):
        del asked[name]  # their contents identify them, not their names
    ids = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    models = {f"{name}_weights": model_identity(getattr(args, name)) for name in ("target", "draft")}
    return {"machine": machine(), "prompts": ids, **models, **asked}


def beside_pictures(python: str) -> dict[str, str]:
    """Return where vLLM finds torchvision if its environment keeps it apart, as that of `make` for CPUs does."""
    apart = Path(python).parents[1] / "torchvision"
    found = [ROOT / "tests" / "serving" / "without_cuda", apart] if apart.is_dir() else []
    return {"PYTHONPATH": os.pathsep.join(map(str, found))} if found else {}


def served_target(target: str, source) -> dict:
    """Return vLLM's arguments for the target; `engine_args` may set those that keep their default."""
    found = {"model": target}
    if source.gguf_file:
        from transformers.utils import cached_file

        file = cached_file(target, source.gguf_file, revision=source.target_revision)
        found = {"model": str(file), "tokenizer": target}
    if source.target_revision != "main":
        found |= dict.fromkeys(("revision", "tokenizer_revision"), source.target_revision)
    return found | ({"trust_remote_code": True} if source.trust_remote_code else {})


if __name__ == "__main__":
    run_verb(main)
