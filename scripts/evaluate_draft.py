"""Measures a draft: decodes prompts with it and with the target alone, in alternation, and writes the counts as JSON.

    python scripts/evaluate_draft.py --target assets/smollm2-135m-instruct --draft outputs/quickstart \
        --prompts question.jsonl --num_speculative_tokens 3 --output_json acceptance.json
    ... --sweep_tokens 1..8                                   also chains of 1 to 8 tokens: which is the fastest?
    ... --method tree --depth 5 --top_k 8 --total_tokens 40   EAGLE-2's dynamic draft tree
    ... --temperature 0.7 --top_p 0.9                         drawn answers, the target's distribution

A chain's counts (drafts, accepted tokens, accepted per position) are those that vLLM reports for the same prompts, and
in float32 greedy output is the target's own, token for token. Pictures of the result are drawn beside the JSON. A field
can also stand in a YAML file given with --config.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass
class EvaluationArguments:
    target: str = field(metadata={"help": "The target: a folder or a hub id, also of a PEFT adapter."})
    draft: str = field(metadata={"help": "The draft's checkpoint folder or hub id."})
    prompts: str = field(
        metadata={
            "help": 'Prompts: .jsonl of MT-Bench\'s form {"turns": [...]}, {"messages": [...]}, '
            'ShareGPT\'s {"conversations": [...]}, {"prompt": ...} (HumanEval; .gz is read too) or any other form of '
            "training data, or .txt with one prompt a line. Messages may show images and videos."
        }
    )
    output_json: str = field(metadata={"help": "Where the result is written."})
    method: Literal["chain", "tree"] = field(
        default="chain", metadata={"help": "Draft a chain of tokens, or EAGLE-2's dynamic tree."}
    )
    num_speculative_tokens: int | None = field(
        default=None, metadata={"help": "Chain: tokens drafted for each target forward (K); 3 when unset."}
    )
    depth: int | None = field(default=None, metadata={"help": "Tree: its levels; 5 when unset."})
    top_k: int | None = field(
        default=None, metadata={"help": "Tree: nodes expanded a level, and children of each; 8 when unset."}
    )
    total_tokens: int | None = field(
        default=None, metadata={"help": "Tree: nodes that the target verifies; 40 when unset."}
    )
    temperature: float = field(default=0.0, metadata={"help": "0 decodes greedily, above it tokens are drawn."})
    top_p: float = field(default=1.0, metadata={"help": "Draw from the most probable tokens of this mass."})
    sampling_top_k: int | None = field(default=None, metadata={"help": "Draw from so many most probable tokens."})
    seed: int = field(default=0, metadata={"help": "Where draws come from."})
    batch_size: int = field(default=1, metadata={"help": "Prompts decoded together."})
    turns: int = field(default=1, metadata={"help": "Turns decoded of prompts that have several; MT-Bench's have 2."})
    sweep_tokens: str | None = field(
        default=None,
        metadata={"help": "Chain: also measure these K, as `1..8` or `1,2,4`, in alternation with each other."},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    num_prompts: int | None = field(default=None, metadata={"help": "Take the first so many prompts; all by default."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Of target and draft. Below float32, near-ties flip and the output need not be identical."},
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, ...; cuda if there is one."})
    compare_to_target: bool = field(
        default=True, metadata={"help": "Decode with the target alone too, to compare output and speed."}
    )
    output_tokens: str | None = field(
        default=None, metadata={"help": "Also write the token ids of every prompt and answer here, as JSON."}
    )

    def __post_init__(self):
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"`num_prompts` must be at least 1, but is {self.num_prompts}.")
        if self.sweep_tokens is not None:
            if self.method != "chain":
                raise ValueError(f"`sweep_tokens` measures chains, but `method` is {self.method!r}; leave one out.")
            from hf_eagle.arguments.parser import parse_counts

            self.sweep_tokens = parse_counts("sweep_tokens", self.sweep_tokens)


def main():
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from hf_eagle.arguments.parser import EagleArgumentParser
    from hf_eagle.arguments.sources import TargetSourceArguments, TemplateArguments

    groups = (EvaluationArguments, TargetSourceArguments, TemplateArguments)
    parser = EagleArgumentParser(groups, description=__doc__.split("\n")[0])
    args, source, template = parser.parse_args_and_config()
    # everything that can be wrong with the input is found before a token is decoded
    try:
        settings = decoding_settings(args)
        target, draft, tokenizer, prompts = load(args, source.source, template.template_kwargs, settings)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error

    from hf_eagle.evaluation.acceptance import decode_prompts, sweep_speculative_tokens
    from hf_eagle.evaluation.plots import plot_acceptance, plot_sweep
    from hf_eagle.evaluation.summary import summarize

    models = (target, draft, tokenizer, prompts)
    rendering = {"template_kwargs": template.template_kwargs}
    found = decode_prompts(*models, settings, compare_to_target=args.compare_to_target, **rendering)
    result = summarize(found)
    if args.sweep_tokens:
        result["sweep"] = sweep_speculative_tokens(*models, args.sweep_tokens, settings, **rendering)
    result |= {
        "target": args.target,
        "draft": args.draft,
        "prompts": Path(args.prompts).name,
        "template_kwargs": template.template_kwargs,
        "dtype": args.dtype,
        "device": str(target.device),
    }
    write_json(args.output_json, result)
    if args.output_tokens:
        fields = [(run.prompt.id, run.prompt_token_ids, run.token_ids) for run in found.runs]
        names = ("id", "prompt_token_ids", "token_ids")
        write_json(args.output_tokens, [dict(zip(names, values, strict=True)) for values in fields])
    picture = Path(args.output_json).with_suffix("")
    plot_acceptance(result, f"{picture}.png")
    if args.sweep_tokens:
        plot_sweep(result["sweep"], f"{picture}_sweep.png")
    print(describe(result))


def decoding_settings(args: EvaluationArguments):
    """The arguments that say how to decode; `ValueError` where they do not fit together."""
    from dataclasses import fields

    from hf_eagle.evaluation.acceptance import DecodingSettings

    return DecodingSettings(**{known.name: getattr(args, known.name) for known in fields(DecodingSettings)})


def load(args: EvaluationArguments, source: dict, template_kwargs: dict, settings):
    """Target, draft, tokenizer or processor, and prompts, which fit together; else `OSError` or `ValueError`."""
    from hf_eagle.evaluation.prompts import load_prompts

    prompts = load_prompts(args.prompts, limit=args.num_prompts)

    import torch

    from hf_eagle import load_draft
    from hf_eagle.decoding.checks import check_draft_fits
    from hf_eagle.decoding.target_run import check_target
    from hf_eagle.evaluation.prompt_batches import PromptBatch, holds_media
    from hf_eagle.targets.loading import load_processor, load_tokenizer, takes_media
    from hf_eagle.targets.target import FrozenTarget

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    draft = load_draft(args.draft, dtype=dtype)
    target = FrozenTarget.from_pretrained(
        args.target, tap_ids=draft.config.tap_ids, dtype=dtype, device=device, **source
    )
    check_draft_fits(target, draft)
    settings.shape.check_vocabulary(draft)
    check_target(target, needs_masks=settings.shape.tree or settings.batch_size > 1)
    draft.to(device).eval()
    draft.attach(target)

    shows = any(map(holds_media, prompts)) and takes_media(args.target, **source)
    processing = (load_processor if shows else load_tokenizer)(args.target, **source)
    for prompt in prompts:
        PromptBatch.of([prompt], processing, template_kwargs=template_kwargs)
    return target, draft, processing, prompts


def write_json(path: str, content) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def describe(result: dict) -> str:
    """The result in a few lines for a terminal."""
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
        lines.append(f"a round: {drafting:.1f} ms of drafting, {verifying:.1f} ms of the target's forward")
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
    main()
