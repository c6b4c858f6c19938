"""Features of conversations with images and videos: stored once, found by what was shown, read without a pixel."""

import pytest
import torch
from PIL import Image
from test_vision_training import batch_of, make_trainer
from tiny_vision import CHATS, vision_processor, write_records

from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.media import processor_fingerprint
from hf_eagle.data.vision_dataset import build_vision_dataset
from hf_eagle.store.cache import fill, open_cache
from hf_eagle.store.feature_store import FeatureStore
from hf_eagle.store.fingerprints import drop_layers


def opened(folder, write=False, **changes):
    """For `make_trainer`: a store of the run's data, in float32."""

    def cache(target, processor, data, tap_ids):
        target.tap_ids = tap_ids
        options = {"tap_ids": tap_ids, "max_length": 99, "dtype": "float32", "processor": processor, **changes}
        return open_cache(folder, target, processor.tokenizer, [data], write=write, **options)

    return cache


def filled(folder, batch_size):
    """The same, filled beforehand; then the target loses its layers, and the files are gone."""

    def cache(target, processor, data, tap_ids):
        found = opened(folder, write=True)(target, processor, data, tap_ids)
        fill(found, target, [data], EagleDataCollator.of(processor), batch_size)
        found.lock.release()
        found = opened(folder)(target, processor, data, tap_ids)
        drop_layers(target)
        for file in (folder.parent / "media").iterdir():
            file.unlink()
        return found

    return cache


def folder(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def gradients(trainer):
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "rope", "size"), [("qwen3-vl", "mrope", 4), ("qwen2.5-vl", "mrope", 1), ("qwen3-vl-moe", "1d", 1)]
)
def test_loss_and_gradients_are_the_live_ones_bit_for_bit(name, rope, size, tmp_path):
    """No file is left when training reads the store, and of the target no layer."""
    sizes = {"per_device_eval_batch_size": size}
    live, *_ = make_trainer(folder(tmp_path, "live"), name, rope=rope, **sizes)
    place = folder(tmp_path, "stored")
    stored, *_ = make_trainer(place, name, rope=rope, cache=filled(place / "features", size), **sizes)
    assert not list((place / "media").iterdir()) and "pixel_values" not in batch_of(stored)
    (loss, wanted), (found_loss, found) = gradients(live), gradients(stored)
    assert found_loss == loss and found.keys() == wanted.keys()
    for n, gradient in wanted.items():
        assert torch.equal(found[n], gradient), n


def test_the_first_epoch_fills_it(tmp_path):
    """Two epochs, of which the second asks the target for nothing; and the same losses as without a store."""
    ways = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "learning_rate": 1e-3}
    ways |= {"max_steps": -1, "num_train_epochs": 2}
    live, *_ = make_trainer(folder(tmp_path, "live"), **ways)
    live.train()
    place = folder(tmp_path, "stored")
    stored, *_ = make_trainer(place, cache=opened(place / "features", write=True), **ways)
    asked, ask = [], stored.target.features
    stored.target.features = lambda **inputs: asked.append(stored.state.epoch) or ask(**inputs)
    stored.train()
    histories = [[x["loss"] for x in t.state.log_history if "loss" in x] for t in (live, stored)]
    assert histories[0] == histories[1] and len(histories[0]) == 4
    assert len(asked) == 2 and len(FeatureStore(place / "features")) == len(CHATS)


def test_other_pictures_are_not_in_it(tmp_path):
    """A file that changed has the same name and as many tokens, and other features."""
    place = folder(tmp_path, "run")
    trainer, processor, data = make_trainer(place, cache=opened(place / "features", write=True))
    fill(trainer.feature_cache, trainer.target, [data], EagleDataCollator.of(processor), 2)
    trainer.feature_cache.lock.release()
    arguments = (trainer.target, processor, data, trainer.model.config.tap_ids)
    opened(place / "features")(*arguments)
    records = write_records(place / "media", CHATS)
    shown = Image.open(place / "media" / "1.png")
    shown.putpixel((0, 0), tuple(255 - x for x in shown.getpixel((0, 0))))
    shown.save(place / "media" / "1.png")
    again = build_vision_dataset(records, processor)
    assert again["input_ids"] == data["input_ids"] and again["media"] == data["media"]
    moved = [a != b for a, b in zip(again["media_fingerprint"], data["media_fingerprint"], strict=True)]
    assert moved == [True, False, False, False] and data[1]["media_fingerprint"] == ""
    with pytest.raises(ValueError, match="lacks 1 of the run's 4 different conversations"):
        opened(place / "features")(arguments[0], processor, again, arguments[3])


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`image_embeddings` is vision, which a `feature_store` does not hold"):
        there = folder(tmp_path, "vision")
        make_trainer(there, embeds="vision", cache=opened(there / "features", write=True))
    place = folder(tmp_path, "run")
    trainer, processor, data = make_trainer(place, cache=opened(place / "features", write=True))
    trainer.feature_cache.lock.release()
    arguments = (trainer.target, processor, data, trainer.model.config.tap_ids)
    with pytest.raises(ValueError, match="hold images or videos: pass the `processor`"):
        opened(place / "features", processor=None)(*arguments)
    with pytest.raises(ValueError, match="`media` without `media_fingerprint`: make them with `build_vision_dataset`"):
        opened(place / "features")(*arguments[:2], data.remove_columns("media_fingerprint"), arguments[3])
    other = vision_processor()
    other.image_processor.image_mean = [0.1] * 3
    assert processor_fingerprint(other) != processor_fingerprint(processor)
    with pytest.raises(ValueError, match=r"was made with a processor \(of data with media\) of fingerprint"):
        opened(place / "features", processor=other)(*arguments)
