"""A new draft starts in its target's terms."""

import torch
from tiny import tiny_llama, tiny_mapping

from hf_eagle import EagleConfig, FrozenTarget, new_draft


def test_it_starts_with_the_targets_rows_and_its_last_tap_passed_through():
    target = FrozenTarget(tiny_llama())
    config = EagleConfig.from_target(target.config, 40)
    mapping, drafts = tiny_mapping(), []
    for head in (None, target.head_weight()):
        torch.manual_seed(0)
        drafts.append(new_draft(config, target.embedding_weight(), mapping, head))
    random, started = drafts
    ids = mapping.t2d.nonzero()[:, 0]
    assert torch.equal(started.lm_head.weight, target.head_weight()[ids])
    assert not torch.equal(random.lm_head.weight, started.lm_head.weight)
    taps = torch.randn(5, 3 * target.hidden_size)
    last = taps[:, 2 * target.hidden_size :]
    torch.testing.assert_close(started.combine_features(taps) - random.combine_features(taps), last)


def test_taps_of_another_width_are_left_to_training():
    target = FrozenTarget(tiny_llama())
    config = EagleConfig.from_target(target.config, 40, target_hidden_size=48)
    torch.manual_seed(0)
    random = new_draft(config, target.embedding_weight(), tiny_mapping())
    torch.manual_seed(0)
    started = new_draft(config, target.embedding_weight(), tiny_mapping(), target.head_weight())
    assert torch.equal(random.fc.weight, started.fc.weight)
