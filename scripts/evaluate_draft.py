"""Measures a draft: decodes prompts greedily with it and with the target alone, and writes the counts as JSON.

    python scripts/evaluate_draft.py --target assets/smollm2-135m-instruct --draft outputs/quickstart \
        --prompts question.jsonl --num_speculative_tokens 3 --output_json acceptance.json

The counts (drafts, accepted tokens, accepted per position) are those that vLLM reports for the same prompts, and in
float32 the output is the target's own, token for token. A field can also stand in a YAML file given with --config.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass
class EvaluationArguments:
    target: str = field(metadata={"help": "The target: a folder or a hub id."})
    draft: str = field(metadata={"help": "The draft's checkpoint folder or hub id."})
    prompts: str = field(
        metadata={
            "help": 'Prompts: .jsonl of MT-Bench\'s form {"turns": [...]} (first turns are taken), {"messages": [...]} '
            'or {"prompt": ...} (HumanEval; .gz is read too), or .txt with one prompt a line.'
        }
    )
    output_json: str = field(metadata={"help": "Where the result is written."})
    num_speculative_tokens: int = field(default=3, metadata={"help": "Tokens drafted for each target forward (K)."})
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
        for name in ("num_speculative_tokens", "max_new_tokens", "num_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {value}.")


def main():
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from hf_eagle.parser import EagleArgumentParser

    parser = EagleArgumentParser(EvaluationArguments, description=__doc__.split("\n")[0])
    (args,) = parser.parse_args_and_config()
    # everything that can be wrong with the input is found before a token is decoded
    try:
        target, draft, tokenizer, prompts = load(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error

    from hf_eagle.evaluation.acceptance import decode_prompts, summarize

    limits = {"num_speculative_tokens": args.num_speculative_tokens, "max_new_tokens": args.max_new_tokens}
    runs = decode_prompts(target, draft, tokenizer, prompts, compare_to_target=args.compare_to_target, **limits)
    result = summarize(runs, **limits)
    result |= {
        "target": args.target,
        "draft": args.draft,
        "prompts": Path(args.prompts).name,
        "dtype": args.dtype,
        "device": str(target.device),
    }
    write_json(args.output_json, result)
    if args.output_tokens:
        fields = [(run.prompt.id, run.prompt_token_ids, run.token_ids) for run in runs]
        names = ("id", "prompt_token_ids", "token_ids")
        write_json(args.output_tokens, [dict(zip(names, values, strict=True)) for values in fields])
    print(describe(result))


def load(args: EvaluationArguments):
    """Target, draft, tokenizer and prompts, all of which fit together; `OSError` or `ValueError` where they do not."""
    from hf_eagle.evaluation.prompts import encode_prompt, load_prompts

    prompts = load_prompts(args.prompts, limit=args.num_prompts)

    import torch
    from transformers import AutoTokenizer

    from hf_eagle import load_draft
    from hf_eagle.decoding.chain import check_draft_fits
    from hf_eagle.targets.target import FrozenTarget

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    draft = load_draft(args.draft, dtype=dtype)
    tap_ids = draft.config.eagle_aux_hidden_state_layer_ids
    target = FrozenTarget.from_pretrained(args.target, tap_ids=tap_ids, dtype=dtype, device=device)
    check_draft_fits(target, draft)
    draft.to(device).eval()
    draft.attach(target)

    tokenizer = AutoTokenizer.from_pretrained(args.target)
    for prompt in prompts:
        encode_prompt(prompt, tokenizer)
    return target, draft, tokenizer, prompts


def write_json(path: str, content) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def describe(result: dict) -> str:
    """The result in two or three lines for a terminal."""
    length = "not measured" if result["acceptance_length"] is None else f"{result['acceptance_length']:.3f}"
    accepted = ", ".join(map(str, result["accepted_per_position"]))
    lines = [
        f"acceptance length {length}: {accepted} tokens accepted at positions 1 to "
        f"{result['num_speculative_tokens']} of {result['drafts']} drafts, {result['num_prompts']} prompts",
        f"{result['tokens_per_second']:.1f} tokens/s with the draft",
    ]
    if result["identical_to_target"] is not None:
        lines[-1] += f", {result['target_only_tokens_per_second']:.1f} without it"
        lines.append("output identical to the target's")
        if not result["identical_to_target"]:
            lines[-1] = "output NOT identical to the target's, first at prompt {prompt!r}, token {token}".format(
                **result["first_difference"]
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
