"""Features of images for targets of other forms than Qwen-VL's: stored once, and read without a pixel."""

import pytest
import torch
from test_vision_store import filled, gradients
from test_vision_training import make_trainer
from tiny_pictures import CHATS, NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_store_gives_the_live_loss_and_gradients(name, tmp_path):
    """No file is left when training reads the store, and of the target no layer."""
    sizes = {"per_device_eval_batch_size": len(CHATS)}
    for part in ("live", "stored"):
        (tmp_path / part).mkdir()
    live, *_ = make_trainer(tmp_path / "live", name, CHATS, "1d", **sizes)
    place = tmp_path / "stored"
    stored, *_ = make_trainer(place, name, CHATS, "1d", cache=filled(place / "features", len(CHATS)), **sizes)

    left = [parameter_name for parameter_name, _ in stored.target.model.named_parameters()]
    assert not any("layers" in name or "blocks" in name for name in left)  # nor of the tower that saw the pixels

    (loss, wanted), (found_loss, found) = gradients(live), gradients(stored)
    assert found_loss == loss and found.keys() == wanted.keys()
    for parameter_name, gradient in wanted.items():
        assert torch.equal(found[parameter_name], gradient), parameter_name
