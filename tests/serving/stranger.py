"""What someone does with a published draft who has transformers and not hf_eagle: fetches it, and generates with it.

    python tests/serving/stranger.py --target T --repo_id me/draft --prompts ids.json --output out.json

`ids.json` is a list of prompts, each a list of token ids. Written are the folder that the draft was fetched to, answers
without and with it, and how many forwards of the target either took.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("--target", "--repo_id", "--prompts", "--output"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    assert importlib.util.find_spec("hf_eagle") is None

    found = {"folder": snapshot_download(args.repo_id), "plain": [], "drafted": []}
    model, forwards = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32), []
    model.model.layers[0].register_forward_hook(lambda *_: forwards.append(1))
    for name, way in {
        "plain": {},
        "drafted": {"custom_generate": args.repo_id, "trust_remote_code": True},
    }.items():
        forwards.clear()
        for ids in json.loads(Path(args.prompts).read_text()):
            prompt = torch.tensor([ids])
            mask = torch.ones_like(prompt)
            answer = model.generate(prompt, attention_mask=mask, max_new_tokens=64, do_sample=False, **way)
            found[name].append(answer[0, len(ids) :].tolist())
        found[f"{name}_forwards"] = len(forwards)
    Path(args.output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
