"""A tiny target and a fresh DFlash draft for it."""

import torch
from tiny import tiny_llama

from hf_eagle.arguments.blocks import BlockDraftArguments
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.dflash.configuration import config_for
from hf_eagle.targets.target import FrozenTarget


MASK = 1  # which no chat holds; the row of token 0, padding, is zero


def options_of(**given) -> dict:
    """Arguments of a DFlash draft by name."""
    return {"tap_ids": None, **vars(BlockDraftArguments()), "mask_token_id": MASK, "block_size": 5, **given}


def shaken(draft, seed: int = 3):
    """The draft, with norms that differ from one: those would hide a forgotten norm."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return draft


def tiny_block_pair(target=None, seed: int = 0, fields=(), **options):
    """A frozen target, by default random with 8 layers, and a fresh draft for it."""
    target = FrozenTarget(tiny_llama(seed=seed)) if target is None else target
    config = config_for(target.config, options_of(**options), **{"initializer_range": 0.2, **dict(fields)})
    target.tap_ids = config.tap_ids
    torch.manual_seed(seed + 1)
    return target, shaken(new_draft(config, target.embedding_weight(), head_weight=target.head_weight()))
