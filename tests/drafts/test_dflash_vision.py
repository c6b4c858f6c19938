"""DFlash drafts of targets that take images: pictures stand in the context, and places are counted as in text."""

import pytest
import reference_dflash
import torch
from test_vision_target import inputs_of_layers
from tiny_blocks import tiny_block_pair
from tiny_pictures import CHATS as PICTURE_CHATS
from tiny_pictures import any_model, any_processor
from tiny_vision import CHATS, NAMES, chat, image, processed, text, write_records

from hf_eagle import EagleTrainer, EagleTrainingArguments, load_draft
from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.vision_dataset import build_vision_dataset
from hf_eagle.decoding import speculative_generate
from hf_eagle.decoding.generate import target_generate
from hf_eagle.targets.target import FrozenTarget


SIZE, GAMMA = 4, 2.0


# families that are shown images in other forms, and whose embeddings are not scaled, as DFlash asks
OTHERS = ("qwen3.5", "llama4", "mistral3", "internvl")


def chats_of(name):
    """Conversations with the media that a family is shown."""
    return CHATS if name in NAMES else PICTURE_CHATS


def trainer_of(folder, name, **fields):
    """A trainer over conversations in files, and its data."""
    (folder / "media").mkdir()
    target, processor = FrozenTarget(any_model(name)), any_processor(name)
    data = build_vision_dataset(write_records(folder / "media", chats_of(name)), processor)
    held = {token for row in data for token in row["input_ids"]}
    unsaid = max(set(range(target.vocab_size)) - held)
    pair = tiny_block_pair(target, mask_token_id=unsaid, block_size=SIZE, draft_num_layers=2)

    known = {"per_device_train_batch_size": len(data), "per_device_eval_batch_size": len(data), "logging_steps": 1}
    known |= {"slot_decay": GAMMA, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    trainer = EagleTrainer(
        model=pair[1],
        args=EagleTrainingArguments(str(folder / "run"), **known | fields),
        target=target,
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor.tokenizer,
        data_collator=EagleDataCollator.of(processor),
    )
    return trainer, processor, data


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_loss_and_gradients_are_the_references(name, tmp_path):
    """Which looks at each conversation alone, and counts places along the text, whatever axes the target has."""
    trainer, processor, data = trainer_of(tmp_path, name)
    target, draft = trainer.target, trainer.model
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    draft.train()
    output, _ = trainer.step(draft, batch)
    output.loss.backward()

    draft.save_pretrained(tmp_path / "saved")
    reference = reference_dflash.Draft.load(tmp_path / "saved")
    sums = []
    for messages, row in zip(chats_of(name), data, strict=True):
        inputs, _ = inputs_of_layers(target.model, processed(processor, [messages]))
        features = torch.cat([inputs[layer + 1][0] for layer in reference.taps], -1)
        last = target.parts.final_norm(inputs[-1][0]).detach()
        ids, mask = torch.tensor(row["input_ids"]), row["loss_mask"]
        anchors = torch.tensor([a for a in range(1, len(mask) - 1) if mask[a] and mask[a + 1]], dtype=torch.long)

        given = (target.embedding_weight(), target.head_weight(), ids, features, last)
        asked = (torch.tensor(mask).bool(), anchors, SIZE, GAMMA)
        sums.append(torch.stack(reference_dflash.training_loss(reference, *given, *asked)))
    value, weight = torch.stack(sums).sum(0)
    (value / weight).backward()

    torch.testing.assert_close(output.loss, value / weight, rtol=1e-5, atol=1e-6)
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    found = {name: p.grad for name, p in draft.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_a_trained_draft_decodes_behind_pictures(tmp_path):
    """Losslessly, one prompt at a time and together; it is taught, saved and read back first."""
    trainer, processor, _ = trainer_of(tmp_path, "qwen3-vl", max_steps=12, learning_rate=1e-2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]
    trainer.save_model()
    target, draft = trainer.target, load_draft(tmp_path / "run", trainer.target)

    asked = [chat([image(1), text("hello"), image(2, 24, 16)]), chat("how are you?")]
    alone = []
    for messages in asked:
        inputs = processed(processor, [messages], "left", add_generation_prompt=True)
        wanted = target_generate(target, max_new_tokens=12, **inputs)
        alone.append(speculative_generate(target, draft, **inputs, max_new_tokens=12))
        assert alone[-1].answers == wanted

    together = processed(processor, asked, "left", add_generation_prompt=True)
    found = speculative_generate(target, draft, **together, max_new_tokens=12)
    assert found.answers == [output.answers[0] for output in alone]
    assert found.drafts == [output.drafts[0] for output in alone]
