"""Writes a tiny DeepSeek target, a draft with latent attention that learned its answers, and what decoding them gives.

    python tests/serving/teach_mla.py --folder F [--draft_fields '{"fc_norm": true}']

The widths of latent and rotated key are those that vLLM's CPU kernel knows. YaRN, because that kernel's plain RoPE is
wrong for latent attention: vLLM 0.32's `RotaryEmbedding.forward_cpu` misreads queries of three dimensions, so that even
a target alone says something else than in transformers.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM


sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]

from chain_models import make_draft, random_prompts  # noqa: E402
from tiny_mla import YARN  # noqa: E402
from tiny_tokenizer import CHATML, tiny_tokenizer  # noqa: E402

from hf_eagle import EagleMLAConfig, FrozenTarget, speculative_generate  # noqa: E402


TAPS = (2, 3, 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--draft_fields", type=json.loads, default={})
    args = parser.parse_args()

    write_target(args.folder / "target")
    target = FrozenTarget.from_pretrained(str(args.folder / "target"), tap_ids=list(TAPS), dtype=torch.float32)
    draft = make_draft(target, 150, TAPS, config_class=EagleMLAConfig, **args.draft_fields)
    draft.save_pretrained(args.folder / "draft")

    result = {"token_ids": [], "drafts": 0, "accepted_per_position": [0, 0, 0], "num_speculative_tokens": 3}
    result["prompts"] = random_prompts(24, 4, seed=2, vocab=target.vocab_size)[:8].tolist()
    for prompt in result["prompts"]:
        found = speculative_generate(target, draft, torch.tensor([prompt]), max_new_tokens=32, num_speculative_tokens=3)
        result["token_ids"] += found.answers
        result["drafts"] += found.drafts[0]
        counts = zip(result["accepted_per_position"], found.accepted_per_position[0], strict=True)
        result["accepted_per_position"] = [a + b for a, b in counts]
    result["accepted_tokens"] = sum(result["accepted_per_position"])
    (args.folder / "measured.json").write_text(json.dumps(result))


def write_target(folder: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=7,
        first_k_dense_replace=7,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=48,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.08,
        rope_parameters=dict(YARN),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    DeepseekV3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
