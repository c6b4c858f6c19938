"""Runs an unmodified vLLM in this process, greedily, and writes its tokens and its counters as JSON.

    python tests/serving/run_vllm.py --target T [--draft D --num_speculative_tokens 3] --prompts ids.json \
        --max_tokens 64 --output out.json

`ids.json` is a list of prompts, each a list of token ids, or one with pictures: `{"prompt_token_ids": [...], "images":
[paths]}`, with one token for each picture. One process a run: an engine does not give its memory back.
"""

import argparse
import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_eagle.serving.offline_engine import ENVIRONMENT, counters  # noqa: E402


for name, value in ENVIRONMENT.items():  # read by vLLM when it is used
    os.environ.setdefault(name, value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", help="draft folder; without one the target decodes alone")
    parser.add_argument("--method", default="eagle3")
    parser.add_argument("--num_speculative_tokens", type=int, default=3)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON list of prompts, see above")
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--max_num_seqs", type=int, default=1, help="prompts that may decode at the same time")
    parser.add_argument("--max_model_len", type=int, default=1024)
    parser.add_argument("--max_images", type=int, help="pictures of a prompt at most, for a target that takes them")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention_backend", help="one of vLLM's, where the one it would choose cannot do the dtype")
    parser.add_argument("--engine_args", type=json.loads, default={}, help="further arguments of `LLM`, as JSON")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.write_text(json.dumps(run(args)) + "\n")


def read_prompt(entry: list | dict) -> dict:
    """A prompt of the file, as vLLM takes it."""
    if isinstance(entry, list):
        return {"prompt_token_ids": entry}
    from PIL import Image

    shown = {"multi_modal_data": {"image": [Image.open(path) for path in entry["images"]]}} if entry["images"] else {}
    return {"prompt_token_ids": entry["prompt_token_ids"], **shown}


def run(args) -> dict:
    from vllm import LLM, SamplingParams

    speculative_config = args.draft and {
        "method": args.method,
        "model": args.draft,
        "num_speculative_tokens": args.num_speculative_tokens,
        **({"attention_backend": args.attention_backend} if args.attention_backend else {}),
    }
    media = {}
    if args.max_images is not None:
        media["limit_mm_per_prompt"] = {"image": args.max_images, "video": 0}
    llm = LLM(
        model=args.target,
        dtype=args.dtype,
        attention_backend=args.attention_backend,
        speculative_config=speculative_config or None,
        enforce_eager=True,
        max_model_len=args.max_model_len,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **{"max_num_seqs": args.max_num_seqs} | media | args.engine_args,
    )
    outputs = llm.generate(
        [read_prompt(entry) for entry in json.loads(args.prompts.read_text())],
        SamplingParams(temperature=0.0, max_tokens=args.max_tokens),
        use_tqdm=False,
    )
    result = {"token_ids": [list(output.outputs[0].token_ids) for output in outputs]}
    return result | (counters(llm) if args.draft else {})


if __name__ == "__main__":
    main()
