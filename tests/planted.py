"""Faults that a sound folder hides, planted in a draft: each is undone by one change."""

import torch
from torch import nn


SCALED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}


def reorder(name, order):
    """What a linear module takes side by side, in another order; the taps' own norms go with them."""

    def plant(draft):
        module = draft.get_submodule(name)
        parts = module.weight.detach().chunk(len(order), dim=1)
        module.weight = nn.Parameter(torch.cat([parts[place] for place in order], dim=1))
        if getattr(draft, "fc_norm", None) is not None:
            draft.fc_norm = nn.ModuleList([draft.fc_norm[place] for place in order])

    return plant


def swap(*pairs):
    """The weights of two norms, exchanged."""

    def plant(draft):
        for names in pairs:
            first, second = map(draft.get_submodule, names)
            first.weight, second.weight = second.weight, first.weight

    return plant


def rotate(**fields):
    """Another RoPE."""
    return lambda draft: draft.rotate_by({**draft.config.rope_parameters, **fields})


def shift(step):
    """Taps of other layers."""

    def plant(draft):
        ids = [number + step for number in draft.config.tap_ids]
        if draft.config.eagle_aux_hidden_state_layer_ids is None:
            draft.config.target_layer_ids = [number - 1 for number in ids]
        else:
            draft.config.eagle_aux_hidden_state_layer_ids = ids

    return plant


def permute_head(draft):
    """Rows in another order, as of a draft vocabulary that was sorted by count."""
    order = torch.randperm(len(draft.lm_head.weight), generator=torch.Generator().manual_seed(3))
    draft.lm_head.weight = nn.Parameter(draft.lm_head.weight.detach()[order])


def flag(name, value):
    """A field of the config."""
    return lambda draft: setattr(draft.config, name, value)
