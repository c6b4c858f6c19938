"""Training on images for targets of other forms than Qwen-VL's: from files to a draft, beside the loop reference."""

import pytest
import torch
from reference_vision import vision_loss
from test_vision_training import STEPS, batch_of, make_trainer
from tiny_pictures import CHATS, NAMES

from hf_eagle import load_draft


@pytest.mark.parametrize(("name", "rope"), [*((name, "1d") for name in NAMES), ("qwen3.5", "mrope")])
def test_loss_equals_the_loop_reference_and_a_draft_learns(name, rope, tmp_path):
    """Which looks at each conversation alone; then three steps, and the draft is read back from its folder."""
    more = {"per_device_eval_batch_size": len(CHATS), "max_steps": 3, "learning_rate": 1e-2, "optim": "sgd"}
    trainer, processor, data = make_trainer(tmp_path, name, CHATS, rope, **more)
    trainer.model.train()
    output, counts = trainer.step(trainer.model, batch_of(trainer))
    sums, correct, rows = vision_loss(
        trainer.model, trainer.target.model, processor, CHATS, list(data), STEPS, oov_rows="renormalize"
    )
    assert counts.tolist() == rows and output.correct.tolist() == correct
    torch.testing.assert_close(output.loss_sums, sums.detach(), rtol=1e-4, atol=1e-4)

    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    trainer.save_model()
    read = load_draft(tmp_path / "run", trainer.target)
    for parameter_name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter.cpu(), read.get_parameter(parameter_name)), parameter_name
