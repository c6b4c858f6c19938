"""Targets that take images and videos: what is tapped, where tokens stand, what is refused."""

import numpy as np
import pytest
import torch
from tiny_vision import (
    CHATS,
    NAMES,
    film,
    image,
    picture,
    processed,
    save_as_published,
    text,
    tiny_vision_model,
    video_patches,
    vision_processor,
)

from hf_eagle.drafts.eagle3.taps import describe_taps
from hf_eagle.targets.architectures import default_tap_ids
from hf_eagle.targets.decoder_parts import find_decoder
from hf_eagle.targets.loading import load_causal_lm
from hf_eagle.targets.target import FrozenTarget
from hf_eagle.targets.teacher_check import check_teacher


TAPS = [1, 2, 4, 7]


def inputs_of_layers(model, batch) -> list[torch.Tensor]:
    """What every decoder layer, and the final norm, is called with in the model's plain forward."""
    seen, decoder = [], find_decoder(model)
    plain = [module.forward for module in (*decoder.layers, decoder.norm)]

    def recording(forward):
        def call(hidden_states, *args, **kwargs):
            seen.append(hidden_states.clone())
            return forward(hidden_states, *args, **kwargs)

        return call

    modules = (*decoder.layers, decoder.norm)
    for module, forward in zip(modules, plain, strict=True):
        module.forward = recording(forward)
    with torch.no_grad():
        logits = model(**batch).logits
    for module in modules:
        del module.forward
    return seen, logits


@pytest.mark.parametrize("name", NAMES)
def test_taps_are_the_inputs_of_layers(name):
    model, batch = tiny_vision_model(name), processed(vision_processor(name), CHATS)
    target = FrozenTarget(model, TAPS)
    seen, logits = inputs_of_layers(model, batch)
    features = target(**batch)
    assert len(seen) == 11
    torch.testing.assert_close(features.taps, torch.cat([seen[i] for i in TAPS], -1), rtol=0, atol=0)
    torch.testing.assert_close(target.logits(features.last_hidden), logits, rtol=0, atol=0)


def test_taps_lie_behind_deepstack():
    """A layer's output is not the next one's input where an image or a video is."""
    model, batch = tiny_vision_model(), processed(vision_processor(), CHATS)
    target, outputs = FrozenTarget(model, [1, 2, 3, 4]), []
    check_teacher(target)  # runs the model once, on a row of its own
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    taps = target(**batch).taps.chunk(4, -1)
    media = batch["mm_token_type_ids"] > 0
    for level, tap in enumerate(taps):
        moved = (tap != outputs[level]).any(-1)
        assert torch.equal(moved, media if level < 3 else torch.zeros_like(media))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_a_mixed_batch_are_as_they_are_alone(name, side):
    model, processor = tiny_vision_model(name), vision_processor(name)
    target, batch = FrozenTarget(model, TAPS), processed(processor, CHATS, side)
    features = target(**batch)
    for row, messages in enumerate(CHATS):
        alone = processed(processor, [messages])
        with torch.no_grad():
            wanted, logits = inputs_of_layers(model, alone)
        place = batch["attention_mask"][row].bool()
        torch.testing.assert_close(features.taps[row, place], torch.cat([wanted[i] for i in TAPS], -1)[0])
        torch.testing.assert_close(target.logits(features.last_hidden[row, place]), logits[0])
        if "image_grid_thw" in alone or "video_grid_thw" in alone:
            asked = {k: v for k, v in alone.items() if not k.startswith("pixel")}
            positions, moved = model.model.get_rope_index(**asked)
            assert torch.equal(features.position_ids[:, row, place], positions[:, 0])
            assert torch.equal(target.rope_index(**alone)[1], moved.flatten())
            assert moved.item() < 0  # an image takes fewer positions than tokens
        else:
            counted = torch.arange(int(place.sum())).expand(3, -1)
            assert torch.equal(features.position_ids[:, row, place], counted)


@pytest.mark.parametrize("name", NAMES)
def test_every_pixel_counts(name):
    target, batch = FrozenTarget(tiny_vision_model(name), [4, 5, 7]), processed(vision_processor(name), CHATS)
    before = target(**batch)
    for pixels, kind in (("pixel_values", 1), ("pixel_values_videos", 2)):
        changed = dict(batch, **{pixels: batch[pixels].clone()})
        changed[pixels][-1, -1] += 1  # of the last image or video, which is in the last conversation
        after = target(**changed)
        moved = (after.taps != before.taps).any(-1)
        places, length = (batch["mm_token_type_ids"][3] == kind).nonzero(), int(batch["attention_mask"][3].sum())
        assert not moved[:3].any() and not moved[3, : places.min()].any()
        assert moved[3, places.max() : length].all()


def test_seconds_of_a_film_reach_the_positions():
    """Qwen2.5-VL's time axis goes by seconds: a slower film is longer, and another one to the target."""
    model, batch = tiny_vision_model("qwen2.5-vl"), processed(vision_processor("qwen2.5-vl"), [CHATS[2]])
    target, slower = FrozenTarget(model, TAPS), {**batch, "second_per_grid_ts": torch.tensor([3.0])}
    once, thrice = target(**batch), target(**slower)
    asked = {k: v for k, v in slower.items() if not k.startswith("pixel")}
    assert torch.equal(thrice.position_ids, model.model.get_rope_index(**asked)[0])
    film = batch["mm_token_type_ids"][0] == 2
    spans = [int(x.position_ids[0, 0, film].max() - x.position_ids[0, 0, film].min()) for x in (once, thrice)]
    assert spans[1] == 3 * spans[0] > 0
    assert not torch.equal(once.taps[0, film], thrice.taps[0, film])


def test_text_alone_is_run_as_text():
    """Also packed: what has no image needs no model of images."""
    model, processor = tiny_vision_model(), vision_processor()
    target, batch = FrozenTarget(model, TAPS), processed(processor, [CHATS[1]] * 2)
    batch.pop("mm_token_type_ids")
    features = target(**batch)
    torch.testing.assert_close(features.taps, torch.cat([inputs_of_layers(model, batch)[0][i] for i in TAPS], -1))
    assert features.position_ids is None
    rows = torch.cat([batch["input_ids"][:1], batch["input_ids"][1:]], dim=1)
    documents = torch.arange(2).repeat_interleave(batch["input_ids"].shape[1])[None]
    packed = target(rows, documents=documents)
    torch.testing.assert_close(packed.taps, features.taps.view(1, -1, features.taps.shape[-1]))


def test_what_is_refused():
    model, processor = tiny_vision_model(), vision_processor()
    target, batch = FrozenTarget(model, TAPS), processed(processor, CHATS)
    with pytest.raises(ValueError, match="`second_per_grid_ts`, which the forward of Qwen3VLForCond.* does not take"):
        target(**batch, second_per_grid_ts=[1.0])
    with pytest.raises(ValueError, match="no `mm_token_type_ids`"):
        target(**{k: v for k, v in batch.items() if k != "mm_token_type_ids"})
    with pytest.raises(ValueError, match="`documents` packs plain text, but .*pixel_values"):
        target(**batch, documents=batch["attention_mask"])


@pytest.mark.parametrize("name", NAMES)
def test_output_hidden_states_are_taken_where_they_are_the_inputs_of_layers(name):
    """Every entry of every target: the same numbers as by hooks, or a refusal."""
    model, batch = tiny_vision_model(name), processed(vision_processor(name), CHATS)
    target, refused = FrozenTarget(model, tap_method="output_hidden_states"), []
    for tap_id in range(target.num_layers):
        hooked = FrozenTarget(model, [tap_id])(**batch).taps
        try:
            target.tap_ids = [tap_id]
        except ValueError as problem:
            assert 'use `tap_method="hooks"`, or 0 and taps from 4 on' in str(problem)
            refused.append(tap_id)
            with torch.no_grad():
                assert not torch.equal(model(**batch, output_hidden_states=True).hidden_states[tap_id], hooked)
        else:
            assert torch.equal(target(**batch).taps, hooked)
    assert refused == ([] if name == "qwen2.5-vl" else [1, 2, 3])
    FrozenTarget(model, default_tap_ids(model.config), "output_hidden_states")


def test_default_taps():
    for name, first in zip(NAMES, (4, 4, 2), strict=True):
        config = tiny_vision_model(name, layers=12).config
        assert default_tap_ids(config) == default_tap_ids(config.get_text_config()) == [first, 6, 9]
        assert "discovery" not in describe_taps(config, [first, 6, 9])
    with pytest.raises(ValueError, match=r"\(4, N // 2, N - 3\) need a target of at least 10 layers, this one has 9"):
        default_tap_ids(tiny_vision_model(layers=9).config)
    assert default_tap_ids(tiny_vision_model(layers=10).config) == [4, 5, 7]


@pytest.mark.parametrize("name", NAMES)
def test_loading(name, tmp_path):
    """By the same function as every target."""
    model = tiny_vision_model(name)
    save_as_published(model, tmp_path)
    loaded = load_causal_lm(str(tmp_path))
    assert type(loaded) is type(model)
    target = FrozenTarget.from_pretrained(str(tmp_path), tap_ids=TAPS)
    batch = processed(vision_processor(name), CHATS)
    torch.testing.assert_close(target(**batch).taps, FrozenTarget(model, TAPS)(**batch).taps, rtol=0, atol=0)


def test_plain_video_patches_are_those_of_images():
    """The tests' own patches, beside those of transformers' images: an image is a film of two equal frames."""
    still = picture(1, 24, 16)
    one = processed(vision_processor(), [[{"role": "user", "content": [image(1, 24, 16), text("a")]}]])
    frames = torch.as_tensor(film(1, 2, 24, 16))
    frames[:] = torch.as_tensor(np.array(still))
    processor = vision_processor().image_processor
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    patches, grid = video_patches(frames.numpy())
    pixels = (patches.view(-1, 3, 2 * 16).add(1) / 2 - mean[:, None]) / std[:, None]
    torch.testing.assert_close(pixels.flatten(1), one["pixel_values"], rtol=1e-4, atol=1e-5)
    assert one["image_grid_thw"].tolist() == [grid]
