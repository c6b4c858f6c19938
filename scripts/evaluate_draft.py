"""Measure a draft: decode prompts with it and with the target alone, in alternation, and write the counts as JSON.

    python scripts/evaluate_draft.py --target assets/smollm2-135m-instruct --draft outputs/quickstart \
        --prompts question.jsonl --num_speculative_tokens 3 --output_json acceptance.json
    ... --sweep_tokens 1..8                                   also chains of 1 to 8 tokens: which is the fastest?
    ... --method tree --depth 5 --top_k 8 --total_tokens 40   EAGLE-2's dynamic draft tree
    ... --temperature 0.7 --top_p 0.9                         sampled answers, with the target's distribution

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
        default=None, metadata={"help": "Chain: tokens drafted per forward pass of the target (K); 3 when unset."}
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
    batch_size: Rows = field(default=1, metadata={"help": "Number of prompts decoded together."})
    turns: Turns = field(default=1, metadata={"help": "Turns to decode of prompts that have several (2 in MT-Bench)."})
    sweep_tokens: str | None = field(
        default=None,
        metadata={"help": "Chain: also measure these K, as `1..8` or `1,2,4` (at most 64), in alternation."},
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
        check_numbers(self)
        if self.sweep_tokens is not None:
            if self.method != "chain":
                raise ValueError(f"`sweep_tokens` measures chains, but `method` is {self.method!r}; leave one out.")
            from hf_eagle.arguments.parser import parse_counts

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
    check_pictures("output_json", pictures(args), args.output_json, reads)
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
    print(describe(result))


def pictures(args: EvaluationArguments) -> list[Path]:
    """Return the files that the result is plotted in: one for the chain or tree, one for a sweep."""
    stem = Path(args.output_json).with_suffix("")
    return [Path(f"{stem}.png"), *([Path(f"{stem}_sweep.png")] if args.sweep_tokens else [])]


def write_result(args: EvaluationArguments, result: dict, runs: list) -> None:
    """Write the JSON files, and plots of what they hold."""
    from hf_eagle.door.writing import output, write_output
    from hf_eagle.evaluation.plots import plot_acceptance, plot_sweep

    write_output("output_json", args.output_json, json.dumps(result, indent=2))
    if args.output_tokens:
        names = ("id", "prompt_token_ids", "token_ids")
        fields = [(run.prompt.id, run.prompt_token_ids, run.token_ids) for run in runs]
        decoded = [dict(zip(names, values, strict=True)) for values in fields]
        write_output("output_tokens", args.output_tokens, json.dumps(decoded, indent=2))

    draws = [lambda path: plot_acceptance(result, path), lambda path: plot_sweep(result["sweep"], path)]
    for picture, draw in zip(pictures(args), draws, strict=False):
        with output("output_json", picture) as part:
            draw(part)


def decoding_settings(args: EvaluationArguments):
    """Return the arguments that say how to decode; raise `ValueError` if they do not fit together."""
    from dataclasses import fields

    from hf_eagle.evaluation.acceptance import DecodingSettings

    return DecodingSettings(**{known.name: getattr(args, known.name) for known in fields(DecodingSettings)})


def load(args: EvaluationArguments, source: dict, template_kwargs: dict, settings):
    """Return target, draft, tokenizer or processor, and prompts, checked against each other, and the prompts' digest.

    Raises `OSError` or `ValueError` for bad prompts before the models are read.
    """
    from hf_eagle.arguments.devices import device_of
    from hf_eagle.door.inputs import naming
    from hf_eagle.evaluation.prompts import load_prompts

    device = device_of(args.device)
    with naming("prompts"):
        prompts = load_prompts(args.prompts, args.num_prompts, args.media_root, args.skip_bad_records)

    import torch

    from hf_eagle import load_draft
    from hf_eagle.data.media import limit_media
    from hf_eagle.decoding.checks import check_draft_fits
    from hf_eagle.decoding.target_run import check_target
    from hf_eagle.evaluation.prompt_batches import check_rendering, holds_media
    from hf_eagle.targets.loading import load_processor, load_tokenizer, takes_media
    from hf_eagle.targets.room import check_room
    from hf_eagle.targets.target import FrozenTarget

    check_room(args.target, "max_new_tokens", args.max_new_tokens, beside=1, **source)
    shows = any(map(holds_media, prompts)) and takes_media(args.target, **source)
    processing = (load_processor if shows else load_tokenizer)(args.target, **source)
    if shows:
        tell_other_limits(args)
        limit_media(processing, **args.media_limits)
    with naming("prompts"):
        try:
            rendered = check_rendering(prompts, processing, template_kwargs, settings.turns)
        except ValueError as problem:
            raise ValueError(f"{args.prompts}: {problem}") from problem

    dtype = getattr(torch, args.dtype)
    draft = load_draft(args.draft, dtype=dtype)
    target = FrozenTarget.from_pretrained(
        args.target, tap_ids=draft.config.tap_ids, dtype=dtype, device=device, **source
    )
    check_draft_fits(target, draft)
    settings.shape.check_vocabulary(draft)
    branches = settings.shape.tree
    check_target(target, needs_masks=branches or settings.batch_size > 1, branches=branches)
    draft.to(device).eval()
    draft.attach(target)
    return target, draft, processing, prompts, rendered


def tell_other_limits(args: EvaluationArguments) -> None:
    """Warn if media are shown otherwise than in the draft's training, as far as the facts in its folder say."""
    import logging

    from hf_eagle.hub.card_facts import FACTS, read_facts

    if not (Path(args.draft) / FACTS).is_file():
        return
    try:
        facts = read_facts(args.draft)
    except ValueError:
        return  # whoever renders the card is told
    trained, asked = facts.media_limits, args.media_limits
    other = [name for name in {**trained, **asked} if trained.get(name) != asked.get(name)]

    for name in other if facts.hyperparameters else ():
        now, then = (f"{held[name]:g}" if name in held else "unset" for held in (asked, trained))
        logging.getLogger("hf_eagle").warning(
            "`%s` is %s here and was %s in the draft's training, so media are shown otherwise: give the same.",
            *(name, now, then),
        )


def open_journal(args: EvaluationArguments, models, template_kwargs: dict, settings, rendered: str):
    """Open the journal of decoded batches next to `output_json`; raise `ValueError` if its settings differ."""
    from hf_eagle.door.journal import Journal, journal_path
    from hf_eagle.evaluation.finished import depends_on

    target, draft, processing, _ = models
    asked = {name: getattr(args, name) for name in ("dtype", "compare_to_target", "sweep_tokens")}
    known = depends_on(target, draft, processing, rendered, settings, template_kwargs=template_kwargs, **asked)
    journal = Journal(journal_path(Path(args.output_json)), known)
    if journal.rows:
        print(f"continuing after the {len(journal.rows)} batches in {journal.path}; their seconds count", flush=True)
    return journal


def measure(
    args: EvaluationArguments, models, template_kwargs: dict, settings, journal, rendered: str
) -> tuple[dict, list]:
    """Return the content of `output_json`, and every decoded prompt; finished batches go into the journal."""
    from hf_eagle.evaluation.acceptance import decode_prompts, sweep_speculative_tokens
    from hf_eagle.evaluation.finished import Finished
    from hf_eagle.evaluation.summary import summarize

    how = {"template_kwargs": template_kwargs, "finished": Finished(journal), "rendered": rendered}
    found = decode_prompts(*models, settings, compare_to_target=args.compare_to_target, **how)
    result = summarize(found)
    if args.sweep_tokens:
        how["finished"] = Finished(journal, "sweep")
        result["sweep"] = sweep_speculative_tokens(*models, args.sweep_tokens, settings, **how)
    told = {"target": args.target, "draft": args.draft, "prompts": Path(args.prompts).name}
    told |= {"template_kwargs": template_kwargs, "dtype": args.dtype, "device": str(models[0].device)}
    told |= args.media_limits
    return result | told, found.runs


def describe(result: dict) -> str:
    """Return the result in a few lines for a terminal."""
    length = "not measured" if result["acceptance_length"] is None else f"{result['acceptance_length']:.3f}"
    accepted = ", ".join(map(str, result["accepted_per_position"]))
    lines = [
        f"acceptance length {length}: {accepted} tokens accepted at positions 1 to "
        f"{result['num_speculative_tokens']} of {result['drafts']} drafts, {result['num_prompts']} prompts",
        f"{result['tokens_per_second']:.1f} tokens/s with the draft",
    ]

    if result["acceptance_length_interval"] is not None:
        low, high = result["acceptance_length_interval"]
        lines[0] += f" (95% interval over prompts: {low:.3f} to {high:.3f})"
    if result["target_only_tokens_per_second"] is not None:
        speeds = result["tokens_per_second"], result["target_only_tokens_per_second"]
        lines[-1] += f", {speeds[1]:.1f} without it ({speeds[0] / speeds[1]:.2f} times as many)"
    if result["draft_seconds_per_round"] is not None:
        drafting, verifying = (1000 * result[f"{who}_seconds_per_round"] for who in ("draft", "target"))
        lines.append(f"per round: {drafting:.1f} ms of drafting, {verifying:.1f} ms of the target's forward pass")

    for found in result.get("sweep", []):
        drafted, accepted = found["num_speculative_tokens"], found["acceptance_length"]
        lines.append(
            f"K = {drafted}: {found['tokens_per_second']:.1f} tokens/s, acceptance length "
            + ("not measured" if accepted is None else f"{accepted:.3f}")
        )

    if result["identical_to_target"] is not None:
        lines.append("output identical to the target's")
        if not result["identical_to_target"]:
            lines[-1] = "output NOT identical to the target's, first at prompt {prompt!r}, token {token}".format(
                **result["first_difference"]
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run_verb(main)
