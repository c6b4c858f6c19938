"""Writes a tiny target, DFlash drafts for it, and what decoding with them gives, by hf_eagle and by the reference.

python tests/serving/teach_blocks.py --folder F
"""

import argparse
import json
import shutil
import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]

from block_models import BLOCK, PROMPTS, block_draft, served_blocks, wide_target  # noqa: E402
from chain_models import random_prompts  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from hf_eagle import speculative_generate  # noqa: E402
from hf_eagle.decoding import target_generate  # noqa: E402


LENGTH = 24
# name -> how a draft is made; layers with a `k_norm` each are another draft in vLLM on a CPU
DRAFTS = {
    "random": {},
    "taught": {"steps": 26},
    "taught, 2 layers": {"steps": 26, "layers": 2, "share_k_norm": True},
    "random, own k_norms": {"layers": 2},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder

    target = wide_target()
    target.model.save_pretrained(folder / "target")
    prompts = [*PROMPTS[:2], *random_prompts(1, 21, seed=7)]
    (folder / "prompt_ids.json").write_text(json.dumps([prompt.tolist() for prompt in prompts]))

    found = {"answers": [target_generate(target, prompt[None], max_new_tokens=LENGTH)[0] for prompt in prompts]}
    for name, how in DRAFTS.items():
        draft = block_draft(target, **how)
        draft.save_pretrained(folder / name)
        found[name] = measured(target, draft, folder / name, prompts, slip="own" in name)
        if name == "taught, 2 layers":
            draft.config.served_form = "transformers"
            draft.save_pretrained(folder / "second form")
            found["second form"] = found[name]

    falsified(folder, "taught")
    (folder / "measured.json").write_text(json.dumps(found))


def measured(target, draft, folder, prompts, slip) -> dict:
    """Counts of hf_eagle, and blocks and counts of the reference, with vLLM's slip on a CPU where that matters."""
    found = {"drafts": 0, "accepted_per_position": [0] * (BLOCK - 1), "blocks": [], "reference": [0] * (BLOCK - 1)}
    for prompt in prompts:
        own = speculative_generate(target, draft, prompt[None], max_new_tokens=LENGTH)
        blocks, accepted = served_blocks(target, folder, prompt, LENGTH, slip)
        found["blocks"].append(blocks)
        found["drafts"] += own.drafts[0]
        for name, counts in (("accepted_per_position", own.accepted_per_position[0]), ("reference", accepted)):
            found[name] = [a + b for a, b in zip(found[name], counts, strict=True)]
    return {**found, "accepted_tokens": sum(found["accepted_per_position"]), "num_speculative_tokens": BLOCK - 1}


def falsified(folder: Path, name: str) -> None:
    """Copies of a draft with one fault each: folders that `check_draft` refuses, and what vLLM makes of them."""
    changes = {
        "no fc": ({}, lambda t: t.pop("fc.weight")),
        "is_causal": ({"is_causal": True}, lambda t: None),
        "verifier_norm": ({}, lambda t: t.update({"verifier_norm.weight": t["norm.weight"].clone()})),
        "no mask": ({"dflash_config": {"target_layer_ids": [0, 2, 3]}}, lambda t: None),
    }
    for fault, (fields, change) in changes.items():
        shutil.copytree(folder / name, folder / fault)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / fault / "config.json").write_text(json.dumps(config | fields))
        tensors = load_file(folder / name / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / fault / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
