"""Runs an unmodified vLLM with one block draft after another, greedily, and writes what it drafts, answers and counts.

    python tests/serving/run_blocks.py --target T --drafts D1 D2 --prompts ids.json --num_speculative_tokens 4 \
        --max_tokens 40 --output out.json

Only listens: each block is written as `[position of the newest token, drafted tokens]`, in the order of drafting. One
prompt runs at a time. A draft that vLLM refuses is written as the words of the refusal. `none` is no draft.
"""

import argparse
import gc
import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_eagle.serving.offline_engine import ENVIRONMENT, counters, minus  # noqa: E402


for name, value in ENVIRONMENT.items():  # read by vLLM when it is used
    os.environ.setdefault(name, value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("--target", "--prompts", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--drafts", nargs="+", required=True)
    parser.add_argument("--num_speculative_tokens", type=int, required=True)
    parser.add_argument("--max_tokens", type=int, default=40)
    args = parser.parse_args()
    blocks = listen()

    found = {}
    for draft in args.drafts:
        blocks.clear()
        found[draft] = run(args, None if draft == "none" else draft) | {"blocks": list(blocks)}
    args.output.write_text(json.dumps(found))


def listen() -> list:
    """A list that every block is appended to when vLLM drafts it."""
    from vllm.v1.spec_decode.dflash import DFlashProposer

    blocks, propose = [], DFlashProposer.propose

    def heard(proposer, *args, **kwargs):
        drafted = propose(proposer, *args, **kwargs)
        blocks.append([int(proposer.positions[0]), drafted[0].tolist()])
        return drafted

    DFlashProposer.propose = heard
    return blocks


def run(args, draft: str | None) -> dict:
    from vllm import LLM, SamplingParams

    drafting = {"method": "dflash", "model": draft, "num_speculative_tokens": args.num_speculative_tokens}
    try:
        llm = LLM(
            model=str(args.target),
            dtype="float32",
            speculative_config=drafting if draft else None,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=1,
            enable_prefix_caching=False,
            disable_log_stats=False,
        )
    except Exception as refusal:
        return {"refused": f"{type(refusal).__name__}: {refusal}"}

    prompts = [{"prompt_token_ids": ids} for ids in json.loads(args.prompts.read_text())]
    sampling = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, detokenize=False)
    before = counters(llm) if draft else {}
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    found = {"token_ids": [list(output.outputs[0].token_ids) for output in outputs]}
    if draft:  # counters of all engines of this process are one sum
        found |= {name: minus(now, before[name]) for name, now in counters(llm).items()}

    del llm
    gc.collect()
    return found


if __name__ == "__main__":
    main()
