"""Training on images and videos: the whole path from files to gradients, beside the loop reference."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference_vision import vision_loss
from tiny import tiny_llama
from tiny_pictures import any_model, any_processor
from tiny_vision import CHATS, NAMES, chat, image, text, tiny_vision_model, video, vision_processor, write_records

from hf_eagle import EagleTrainer, EagleTrainingArguments, load_draft
from hf_eagle.arguments.groups import DraftArguments
from hf_eagle.arguments.objective import refuse_other_methods
from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.vision_dataset import build_vision_dataset
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle1.configuration import Eagle1Config
from hf_eagle.drafts.eagle3.configuration import EagleConfig, draft_config
from hf_eagle.drafts.kinds import KINDS
from hf_eagle.drafts.vocabulary import VocabularyMapping
from hf_eagle.targets.target import FrozenTarget


STEPS = 3
BATCHES = {
    "images": [CHATS[0], chat([image(7, 8, 8)], "the other cat")],
    "video": [CHATS[2]],
    "mixed": CHATS,
    "text": [CHATS[1]],
}


def make_trainer(folder, name="qwen3-vl", chats=CHATS, rope="mrope", embeds="token", cache=None, **fields):
    """A trainer over conversations in files, with a target and a draft of its own.

    Args:
        cache: makes, of target, processor and data, what is asked in the target's place.
    """
    (folder / "media").mkdir()
    processor = any_processor(name)
    target = FrozenTarget(any_model(name))
    torch.manual_seed(1)
    ids = torch.randperm(target.vocab_size)[:200]
    config = EagleConfig.from_target(
        target.model.config, len(ids), rope=rope, image_embeddings=embeds, initializer_range=0.2
    )
    mapping = VocabularyMapping.from_token_ids(ids, target.vocab_size)
    draft = new_draft(config, target.embedding_weight(), mapping)
    data = build_vision_dataset(write_records(folder / "media", chats), processor)
    args = EagleTrainingArguments(
        output_dir=str(folder / "run"), ttt_steps=STEPS, oov_rows="renormalize", report_to="none", disable_tqdm=True,
        **{"per_device_train_batch_size": len(chats), "max_steps": 1, "logging_steps": 1, **fields},
    )  # fmt: skip
    target.to(args.device)  # where the run will have it: a store is to be filled there
    trainer = EagleTrainer(
        model=draft,
        args=args,
        target=target,
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor.tokenizer,
        data_collator=EagleDataCollator.of(processor),
        feature_cache=cache and cache(target, processor, data, config.tap_ids),
    )
    return trainer, processor, data


def batch_of(trainer):
    """As the loop of training gets it, columns dropped and tensors moved."""
    return trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))


@pytest.mark.parametrize(
    ("name", "kind", "rope", "embeds"),
    [
        *((name, "mixed", "mrope", "token") for name in NAMES),
        *(("qwen3-vl", kind, "mrope", "token") for kind in ("images", "video", "text")),
        ("qwen3-vl", "mixed", "1d", "token"),
        *(("qwen3-vl", kind, "1d", "vision") for kind in ("images", "video", "text")),
        ("qwen2.5-vl", "images", "mrope", "vision"),
    ],
)
def test_loss_and_gradients_equal_the_loop_reference(name, kind, rope, embeds, tmp_path):
    chats = BATCHES[kind]
    trainer, processor, data = make_trainer(tmp_path, name, chats, rope, embeds, per_device_eval_batch_size=len(chats))
    trainer.model.train()
    output, counts = trainer.step(trainer.model, batch_of(trainer))
    sums, correct, rows = vision_loss(
        trainer.model, trainer.target.model, processor, chats, list(data), STEPS, oov_rows="renormalize"
    )
    assert counts.tolist() == rows and output.correct.tolist() == correct
    torch.testing.assert_close(output.loss_sums, sums.detach(), rtol=2e-5, atol=1e-5)
    output.loss.backward()
    ours = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    weights = torch.tensor([0.8**s for s in range(STEPS)])
    ((weights / weights.sum()) * sums / torch.tensor(rows)).sum().backward()
    for n, p in trainer.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(ours[n], p.grad, rtol=1e-3, atol=2e-6, msg=lambda m, n=n: f"{n}: {m}")


def test_the_two_ropes_differ_where_there_are_images(tmp_path):
    losses = {}
    for rope in ("1d", "mrope"):
        for kind in ("images", "text"):
            folder = tmp_path / f"{rope}-{kind}"
            folder.mkdir()
            trainer, *_ = make_trainer(folder, chats=BATCHES[kind], rope=rope)
            losses[rope, kind] = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    assert losses["1d", "text"] == losses["mrope", "text"]
    assert abs(losses["1d", "images"] - losses["mrope", "images"]) > 1e-4


def test_what_images_are_embedded_as(tmp_path):
    """It matters where there are images, and only there; it is written where it is not the default, and kept."""
    losses = {}
    for embeds in ("token", "vision"):
        for kind in ("images", "text"):
            folder = tmp_path / f"{embeds}-{kind}"
            folder.mkdir()
            trainer, *_ = make_trainer(folder, chats=BATCHES[kind], embeds=embeds)
            losses[embeds, kind] = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
        trainer.save_model()
        written = json.loads((folder / "run" / "config.json").read_text())
        assert written.get("image_embeddings", "token") == load_draft(folder / "run").config.image_embeddings == embeds
    assert losses["token", "text"] == losses["vision", "text"]
    assert abs(losses["token", "images"] - losses["vision", "images"]) > 1e-4


def test_where_no_server_embeds_images(caplog):
    config, text_only = tiny_vision_model().config, tiny_llama().config
    vision = {"image_embeddings": "vision"}
    assert draft_config(config, **vision).image_embeddings == "vision" and "as SGLang serves" in caplog.text
    with pytest.raises(ValueError, match="`image_embeddings` is vision, but the target takes no images"):
        draft_config(text_only, **vision)
    with pytest.raises(ValueError, match="`image_embeddings` is vision, but a draft with latent attention"):
        draft_config(config, "mla", **vision)
    with pytest.raises(ValueError, match="`image_embeddings` of an EAGLE-1 draft must be token, got vision"):
        Eagle1Config.from_target(config, **vision)
    with pytest.raises(ValueError, match="`image_embeddings` is vision, which means nothing to an EAGLE-1/2 draft"):
        refuse_other_methods(KINDS["eagle1"], DraftArguments(method="eagle1", **vision))
    with pytest.raises(ValueError, match="`image_embeddings` must be one of token, vision, got 'pixels'"):
        draft_config(config, image_embeddings="pixels")


@pytest.mark.parametrize("name", NAMES)
def test_pixels_reach_the_model_through_the_whole_path(name, tmp_path):
    """One pixel of a file, or of one frame, and the loss is another; the same files, the same loss."""
    chats = [chat([image(1), text("see")], "the cat and the cat"), chat([video(2)], "two and two and two")]
    trainer, *_ = make_trainer(tmp_path, name, chats)
    media = tmp_path / "media"

    def loss():
        return trainer.evaluate()["eval_loss"]

    before = loss()
    assert loss() == before
    shown = Image.open(media / "1.png")
    old = shown.getpixel((3, 3))
    shown.putpixel((3, 3), tuple(255 - x for x in old))
    shown.save(media / "1.png")
    assert loss() != before
    shown.putpixel((3, 3), old)
    shown.save(media / "1.png")
    assert loss() == before
    film = np.load(media / "3.npy")
    film[2, 5, 5] = 255 - film[2, 5, 5]
    np.save(media / "3.npy", film)
    assert loss() != before


def test_training_runs_and_evaluates(tmp_path):
    """Batches of one and two rows, some without media; the loss falls, and what is saved is a draft."""
    trainer, *_ = make_trainer(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=12, learning_rate=5e-3
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and sum(losses[-3:]) < 0.95 * sum(losses[:3])  # a random target says little
    trainer.save_model()
    assert load_draft(tmp_path / "run").config.mrope_section == [3, 3, 2]


def test_accumulation_changes_nothing(tmp_path, monkeypatch):
    """A batch of four conversations is as four batches of one, with media or without."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # to which a GPU rounds convolutions by default
    weights = []
    for number, size in enumerate((4, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        trainer, *_ = make_trainer(
            folder, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, learning_rate=1e-2,
            optim="sgd", lr_scheduler_type="constant",
        )  # fmt: skip
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    for n in weights[0]:
        torch.testing.assert_close(weights[0][n], weights[1][n], rtol=1e-5, atol=1e-6)


def test_the_script(tmp_path, monkeypatch, caplog, capsys):
    """From a folder and files; without torchvision the processor takes images only."""
    processor = vision_processor()
    tiny_vision_model().save_pretrained(tmp_path / "target")
    processor.tokenizer.save_pretrained(tmp_path / "target")
    processor.image_processor.save_pretrained(tmp_path / "target")
    (tmp_path / "media").mkdir()
    records = write_records(tmp_path / "media", [CHATS[0], CHATS[1], BATCHES["images"][1]])
    for record in records:
        for message in record["messages"]:
            if isinstance(message["content"], str):
                message["content"] = [text(message["content"])]
    lines = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "chats.jsonl").write_text(lines)
    script = str(Path(__file__).resolve().parents[2] / "scripts" / "train_eagle.py")
    options = (
        f"--target {tmp_path}/target --train_data {tmp_path}/chats.jsonl --output_dir {tmp_path}/out --max_steps 2"
    )
    options += " --ttt_steps 2 --max_length 512 --draft_rope mrope --logging_steps 1 --use_cpu"
    options += " --per_device_train_batch_size 2"
    monkeypatch.setattr(sys, "argv", [script, *options.split()])
    runpy.run_path(script, run_name="__main__")
    assert load_draft(tmp_path / "out").config.mrope_section == [3, 3, 2]
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    stored = f" --feature_store {tmp_path}/features --store_dtype float32 --train_sampling_strategy sequential"
    for name in ("cache_features", "train_eagle"):  # features of pictures, made by the one and read by the other
        words = options.replace("/out", "/stored") + stored
        other = script.replace("train_eagle", name)
        monkeypatch.setattr(sys, "argv", [other, *words.split()])
        runpy.run_path(other, run_name="__main__")
    again = json.loads((tmp_path / "stored" / "trainer_state.json").read_text())["log_history"]
    assert [x["step"] for x in again if "loss" in x] == [1, 2]
    for more, said in (("--packing", "`packing` packs text"), ("--streaming", "`streaming` reads text")):
        monkeypatch.setattr(sys, "argv", [script, *options.replace("/out", "/other").split(), more])
        with pytest.raises(SystemExit):
            runpy.run_path(script, run_name="__main__")
        assert said in capsys.readouterr().err
