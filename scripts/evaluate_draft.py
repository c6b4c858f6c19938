"""Measure a draft: decode prompts with it and with the target alone, and write the counts as JSON.

    python scripts/evaluate_draft.py --target assets/smollm2-135m-instruct --draft outputs/quickstart \
        --prompts question.jsonl --num_speculative_tokens 3 --output_json acceptance.json
    ... --sweep_tokens 1..8                                   also chains of 1 to 8 tokens: which for which load?
    ... --method tree --depth 5 --top_k 8 --total_tokens 40   EAGLE-2's dynamic draft tree
    ... --temperature 0.7 --top_p 0.9                         sampled answers, with the target's distribution
    ... --context_buckets 512,2048,8192                       acceptance by context length too
    ... --windows none,512,1024,2048                          which sliding window of the draft accepts most, and where?
    ... --teacher_forced                                      only the counts, the same ones, without decoding

Acceptance is counted in batches, on all prompts. Speed is measured one request at a time, with and without the draft in
alternation, on as many prompts as it takes to know the speedup to 5%. `--batch_size` decodes all prompts both ways in
batches of that size instead.

The counts of a chain (drafts, accepted tokens, accepted per position) are those that vLLM reports for the same prompts.
In float32, greedy output is identical to the target's own, token for token. Plots of the result are written next to the
JSON. Arguments can also be given in a YAML file with --config.

You can interrupt it at any time: `<output_json>.journal` holds the decoded batches, and the same command continues from
there, with the same counts. Speeds then use the seconds that each batch took in the run that decoded it. It refuses to
continue with different settings or a different draft. The journal is deleted once the result is written.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Bounds, Count, Depth, Mass, Rows, Seed, Temperature, Turns, check_numbers
from hf_eagle.arguments.sources import MediaArguments
from hf_eagle.door.environment import tell_traps
from hf_eagle.door.printer import going_on, run_verb


@dataclass
class EvaluationArguments(MediaArguments):
    _argument_group_name = "evaluation"

    target: str = field(metadata={"help": "The target, or a PEFT adapter of it: a folder or a Hub id."})
    draft: str = field(metadata={"help": "The draft's checkpoint folder or Hub id."})
    prompts: str = field(
        metadata={
            "help": 'Prompts: .jsonl of MT-Bench\'s form {"turns": [...]}, {"messages": [...]}, '
            'ShareGPT\'s {"conversations": [...]}, {"prompt": ...} (HumanEval; .gz is read too) or any other form of '
            "training data, or .txt with one prompt per line. Messages may contain images and videos."
        }
    )
    output_json: str = field(
        metadata={"help": "JSON file for the result; until it is written, `<output_json>.journal` holds finished work."}
    )
    method: Literal["chain", "tree"] = field(
        default="chain", metadata={"help": "Draft a chain of tokens, or EAGLE-2's dynamic tree."}
    )
    num_speculative_tokens: Depth | None = field(
        default=None,
        metadata={"help": "Chain: tokens drafted per forward pass of the target (K). Unset: the draft's block, or 3."},
    )
    depth: Depth | None = field(default=None, metadata={"help": "Tree: number of levels; 5 when unset."})
    top_k: Annotated[int, Bounds(least=1, most=1024)] | None = field(
        default=None, metadata={"help": "Tree: nodes expanded per level, and children of each; 8 when unset."}
    )
    total_tokens: Annotated[int, Bounds(least=1, most=4096)] | None = field(
        default=None, metadata={"help": "Tree: nodes that the target verifies; 40 when unset."}
    )
    temperature: Temperature = field(default=0.0, metadata={"help": "0 decodes greedily; above 0, tokens are sampled."})
    top_p: Mass = field(default=1.0, metadata={"help": "Sample from the most probable tokens of this total mass."})
    sampling_top_k: Count | None = field(default=None, metadata={"help": "Sample from so many most probable tokens."})
    seed: Seed = field(default=0, metadata={"help": "Where draws come from."})
    batch_size: Rows | None = field(
        default=None,
        metadata={
            "help": "Number of prompts decoded together, for speeds too. Unset: acceptance in batches of up to 16, "
            "speed one request at a time."
        },
    )
    turns: Turns = field(default=1, metadata={"help": "Turns to decode of prompts that have several (2 in MT-Bench)."})
    sweep_tokens: str | None = field(
        default=None,
        metadata={"help": "Chain: also measure these K, as `1..8` or `1,2,4` (at most 64), in alternation."},
    )
    context_buckets: str | None = field(
        default=None,
        metadata={"help": "Also give acceptance by context length, in buckets that end at these, as `512,2048,8192`."},
    )
    windows: str | None = field(
        default=None,
        metadata={
            "help": "Also measure the draft with its attention cut to so many last tokens, as `none,512,1024`. The "
            "best of each bucket is printed, and how servers are told of it."
        },
    )
    teacher_forced: bool = field(
        default=False,
        metadata={
            "help": "Count acceptance from the target's greedy answers, read once: the counts of decoding, sooner, but "
            "no speeds."
        },
    )
    max_new_tokens: Count = field(default=64, metadata={"help": "Longest answer, in tokens."})
    num_prompts: Count | None = field(
        default=None, metadata={"help": "Number of prompts to use, beginning with the first; all by default."}
    )
    skip_bad_records: bool = field(
        default=False, metadata={"help": "Leave out, and count, records that are no prompts, instead of stopping."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Data type of target and draft. Below float32, near-ties may flip and change the output."},
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, ...; unset: cuda if there is one."})
    compare_to_target: bool = field(
        default=True, metadata={"help": "Also decode with the target alone, to compare output and speed."}
    )
    output_tokens: str | None = field(
        default=None, metadata={"help": "JSON file for the token ids of every prompt and answer."}
    )

    def __post_init__(self):
        from hf_eagle.arguments.parser import parse_counts, parse_lengths

        check_numbers(self)
        if self.context_buckets is not None:
            self.context_buckets = parse_lengths("context_buckets", self.context_buckets)
        if self.windows is not None:
            self.windows = parse_lengths("windows", self.windows, or_none=True)
        if self.teacher_forced and self.temperature:
            raise ValueError(
                f"`teacher_forced` counts what greedy decoding accepts, but `temperature` is {self.temperature:g}; "
                "leave one out."
            )
        if self.sweep_tokens is not None:
            if self.teacher_forced:
                raise ValueError("`sweep_tokens` measures speeds, but `teacher_forced` does not; leave one out.")
            if self.method != "chain":
                raise ValueError(f"`sweep_tokens` measures chains, but `method` is {self.method!r}; leave one out.")
            self.sweep_tokens = parse_counts("sweep_tokens", self.sweep_tokens)


def parser():
    from hf_eagle.arguments.parser import EagleArgumentParser
    from hf_eagle.arguments.sources import TargetSourceArguments, TemplateArguments

    groups = (EvaluationArguments, TargetSourceArguments, TemplateArguments)
    return EagleArgumentParser(groups, description=__doc__.split("\n")[0])


def door(argv: list[str] | None = None):
    """Return the arguments, after checking every path."""
    from hf_eagle.door.inputs import check_draft, check_file, check_folder, check_target
    from hf_eagle.door.outputs import check_apart, check_journal, check_output_file, check_pictures, holds_object_with

    args, source, template = parser().parse_args_and_config(argv)
    check_target("target", args.target, source.gguf_file)
    check_draft("draft", args.draft)
    check_file("prompts", args.prompts)
    if args.media_root is not None:
        check_folder("media_root", args.media_root)

    reads = {"target": args.target, "draft": args.draft, "prompts": args.prompts, "tools": template.tools}
    check_output_file("output_json", args.output_json, reads, holds_object_with("acceptance_length"))
    check_journal("output_json", args.output_json, reads)
    check_pictures("output_json", pictures(args).values(), args.output_json, reads)
    if args.output_tokens is not None:
        check_output_file("output_tokens", args.output_tokens, reads, holds_object_with("prompt_token_ids"))
    check_apart({"output_json": args.output_json, "output_tokens": args.output_tokens})
    return args, source, template


def main():
    args, source, template = door()
    tell_traps()
    # everything that can be wrong with the input is found before a token is decoded
    settings, kwargs = decoding_settings(args), template.template_kwargs
    *models, rendered = load(args, source.source, kwargs, settings)
    settings = settings.for_draft(models[1])

    from hf_eagle.door.inputs import naming

    journal = open_journal(args, models, kwargs, settings, rendered)
    with naming("output_json", args.output_json), journal, going_on():
        result, runs = measure(args, models, kwargs, settings, journal, rendered)
        write_result(args, result, runs)
        journal.remove()

    from hf_eagle.evaluation.told import told
    from hf_eagle.serving.schedule import told_model

    print("\n".join([told(result), *told_model(result), *tell_windows(args, result, models[1])]))


def pictures(args: EvaluationArguments) -> dict[str, Path]:
    """Return the files that the result is plotted in: one for the chain or tree, for a sweep, and for contexts."""
    stem = Path(args.output_json).with_suffix("")
    found = {"acceptance": Path(f"{stem}.png")}
    if args.sweep_tokens:
        found["sweep"] = Path(f"{stem}_sweep.png")
    if args.context_buckets:
        found["context"] = Path(f"{stem}_context.png")
    return found


def write_result(args: EvaluationArguments, result: dict, runs: list) -> None:
    """Write the JSON files, and plots of what they hold."""
    from hf_eagle.door.writing import output, write_output
    from hf_eagle.evaluation.plots import plot_acceptance, plot_contexts, plot_sweep
    from hf_eagle.evaluation.windows import window_name

    write_output("output_json", args.output_json, json.dumps(result, indent=2))
    if args.output_tokens:
        names = ("id", "prompt_token_ids", "token_ids")
        fields = [(run.prompt.id, run.prompt_token_ids, run.token_ids) for run in runs]
        decoded = [dict(zip(names, values, strict=True)) for values in fields]
        write_output("output_tokens", args.output_tokens, json.dumps(decoded, indent=2))

    contexts = {window_name(x["window"]): x["acceptance_by_context"] for x in result.get("windows", [])}
    contexts = contexts or {"": result.get("acceptance_by_context", [])}
    draws = {
        "acceptance": lambda path: plot_acceptance(result, path),
        "sweep": lambda path: plot_sweep(result["sweep"], path),
        "context": lambda path: plot_contexts(contexts, path),
    }
    for name, picture in pictures(args).items():
        with output("output_json", picture) as part:
            draws[name](part)


def tell_windows(args: EvaluationArguments, result: dict, draft) -> list[str]:
    """Return how servers are told of the best windows, if windows were measured and one of them is the best."""
    if not args.windows:
        return []

    from transformers.utils import cached_file

    from hf_eagle.evaluation.windows import best_windows
    from hf_eagle.serving.commands import serve_window
    from hf_eagle.serving.kinds import serves

    if not serves(draft.kind.name):
        return []
    folder = Path(cached_file(args.draft, "config.json")).parent
    best = {entry["window"] for entry in best_windows(result["windows"]) if entry is not None} - {None}
    return [line for window in sorted(best) for line in serve_window(folder, window)]


def decoding_settings(args: EvaluationArguments):
    """Return the arguments that say how to decode; raise `ValueError` if they do not fit together."""
    from dataclasses import fields

    from hf_eagle.evaluation.acceptance import DecodingSettings

    given = {known.name: getattr(args, known.name, None) for known in fields(DecodingSettings)}
    return DecodingSettings(**given | {"batch_size": args.batch_size or 1})


def processing_for(args: EvaluationArguments, prompts: list, source: dict):
    """Return the target's tokenizer and `False`, or, for prompts with images or videos, its processor and `True`.

    Raises `OSError` or `ValueError`, also for a target that is shown no media.
    """
    from hf_eagle.data.media import limit_media
    from hf_eagle.evaluation.prompts import holds_media
    from hf_eagle.hub.card_facts import tell_other_limits
    from hf_eagle.targets.loading import load_processor, load_tokenizer, takes_media, why_only_text

    if not (any(map(holds_media, prompts)) and takes_media(args.target, **source)):
        return load_tokenizer(args.target, **source), False

    why = why_only_text(args.target, **source)
    if why is not None:
        raise ValueError(f"`prompts` {args.prompts} hold images or videos, but {why}: use others, or another `target`.")

    processor = load_processor(args.target, **source)
    tell_other_limits(args.draft, args.media_limits)
    limit_media(processor, **args.media_limits)
    return processor, True


def load(args: EvaluationArguments, source: dict, template_kwargs: dict, settings):
    """Return target, draft, tokenizer or processor, and prompts, checked against each other, and their `Rendering`.

    Raises `OSError` or `ValueError`: for prompts before the models are read, for the draft before the target is.
    """
    from hf_eagle.arguments.devices import device_of
    from hf_eagle.door.inputs import naming
    from hf_eagle.evaluation.prompts import load_prompts

    device = device_of(args.device)
    with naming("prompts"):
        prompts = load_prompts(args.prompts, args.num_prompts, args.media_root, args.skip_bad_records)

    import torch

    from hf_eagle import load_draft
    from hf_eagle.decoding.checks import check_draft_fits
    from hf_eagle.decoding.target_run import check_target, why_alone
    from hf_eagle.evaluation.prompt_batches import check_rendering
    from hf_eagle.evaluation.windows import check_windows
    from hf_eagle.targets.room import check_room
    from hf_eagle.targets.target import FrozenTarget

    check_room(args.target, "max_new_tokens", args.max_new_tokens, beside=1, **source)
    processing, shows = processing_for(args, prompts, source)
    with naming("prompts"):
        try:
            rendered = check_rendering(prompts, processing, template_kwargs, settings.turns)
        except ValueError as problem:
            raise ValueError(f"{args.prompts}: {problem}") from problem

    dtype = getattr(torch, args.dtype)
    draft = load_draft(args.draft, dtype=dtype)
    settings.shape.check_vocabulary(draft)
    check_windows(draft, settings, args.windows or ())

    target = FrozenTarget.from_pretrained(
        args.target, tap_ids=draft.config.tap_ids, dtype=dtype, device=device, media=shows, **source
    )
    check_draft_fits(target, draft)
    branches = settings.shape.tree
    check_target(target, needs_masks=branches or settings.batch_size > 1, branches=branches)
    if args.batch_size is None and (alone := why_alone(target, branches)) is not None:
        print(alone, flush=True)
        args.batch_size = 1
    draft.to(device).eval()
    draft.attach(target)
    return target, draft, processing, prompts, rendered


def open_journal(args: EvaluationArguments, models, template_kwargs: dict, settings, rendered):
    """Open the journal of decoded batches next to `output_json`; raise `ValueError` if its settings differ."""
    from hf_eagle.door.journal import Journal, journal_path
    from hf_eagle.evaluation.finished import depends_on

    target, draft, processing, _ = models
    asked = {name: getattr(args, name) for name in ("dtype", "compare_to_target", "sweep_tokens", "windows")}
    asked |= {"teacher_forced": args.teacher_forced, "given_batch_size": args.batch_size}
    known = depends_on(target, draft, processing, rendered.digest, settings, template_kwargs=template_kwargs, **asked)
    journal = Journal(journal_path(Path(args.output_json)), known)
    if journal.rows:
        print(f"continuing after the {len(journal.rows)} batches in {journal.path}; their seconds count", flush=True)
    return journal


def measure(args: EvaluationArguments, models, template_kwargs: dict, settings, journal, rendered) -> tuple[dict, list]:
    """Return the content of `output_json`, and every decoded prompt; finished batches go into the journal."""
    from hf_eagle.evaluation.whole import measure_whole

    asked = {name: getattr(args, name) for name in ("batch_size", "compare_to_target", "teacher_forced")}
    asked |= {name: getattr(args, name) or () for name in ("context_buckets", "sweep_tokens", "windows")}
    how = {"template_kwargs": template_kwargs, "rendered": rendered}
    result, runs = measure_whole(*models, settings, journal=journal, **asked, **how)

    told = {"target": args.target, "draft": args.draft, "prompts": Path(args.prompts).name}
    told |= {"template_kwargs": template_kwargs, "dtype": args.dtype, "device": str(models[0].device)}
    return result | told | args.media_limits, runs


if __name__ == "__main__":
    run_verb(main)
