"""Tiny drafts with latent attention, built in code."""

import torch
from tiny import tiny_llama, tiny_mapping

from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle3.configuration_latent import EagleMLAConfig
from hf_eagle.targets.target import FrozenTarget


# key and value widths differ: 16 and 12
SIZES = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
# Kimi's, of factor 64
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 64.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def tiny_mla_pair(draft_vocab_size: int | None = 40, tap_ids=None, seed: int = 0, **draft_fields):
    """A frozen tiny Llama and a fresh draft with latent attention for it."""
    target = FrozenTarget(tiny_llama(seed=seed))
    fields = {**SIZES, "initializer_range": 0.2, **draft_fields}
    config = EagleMLAConfig.from_target(target.config, draft_vocab_size, tap_ids, **fields)
    target.tap_ids = config.tap_ids
    torch.manual_seed(seed + 1)
    mapping = None if draft_vocab_size is None else tiny_mapping(draft_vocab_size)
    draft = new_draft(config, target.embedding_weight(), mapping)
    with torch.no_grad():  # norms of one would hide a forgotten one
        for name, parameter in draft.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return target, draft
