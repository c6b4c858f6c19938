"""Targets that are shown images in other forms than Qwen-VL's: what is taught, also of padded rows, what is refused."""

import pytest
import torch
from test_vision_target import inputs_of_layers
from tiny_pictures import CHATS, FILM_CHATS, FILMS, NAMES, any_model, any_processor, pictured, tiny_pictures_model
from tiny_vision import NAMES as VISION
from tiny_vision import tiny_vision_model
from transformers import AutoConfig, Gemma4Config, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from hf_eagle.targets.media_inputs import FORMS, MEDIA, media_arguments, why_not_shown
from hf_eagle.targets.target import FrozenTarget


TAPS = [2, 4, 5]
# types whose tokens of one image see each other both ways, by an argument that names them
BOTH_WAYS = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}


def exact(batch: dict) -> dict:
    """The same with pixels in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_taught_is_the_models_own(name):
    """Taps, and the logits of all tokens, with images of several sizes; and images matter."""
    target, batch = FrozenTarget(tiny_pictures_model(name), TAPS), pictured(any_processor(name), CHATS[:1])
    seen, logits = inputs_of_layers(target.model, batch)
    features = target(**batch)

    torch.testing.assert_close(features.taps, torch.cat([seen[i] for i in TAPS], -1), rtol=0, atol=0)
    torch.testing.assert_close(target.logits(features.last_hidden), logits)
    other = target(**batch | {"pixel_values": -batch["pixel_values"]})
    assert not torch.allclose(other.taps, features.taps, atol=1e-2)


@pytest.mark.parametrize("name", FILMS)
def test_what_is_taught_of_videos_is_the_models_own(name):
    target, batch = FrozenTarget(tiny_pictures_model(name), TAPS), pictured(any_processor(name), FILM_CHATS)
    seen, logits = inputs_of_layers(target.model, batch)
    features, real = target(**batch), batch["attention_mask"].bool()
    taps = torch.cat([seen[i] for i in TAPS], -1)
    torch.testing.assert_close(features.taps[real], taps[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target.logits(features.last_hidden[real]), logits[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_a_mixed_batch_are_as_they_are_alone(name, side):
    """With images and without, padded on either side; in float64, since rounding grows from layer to layer.

    Recurrent layers compute in float32 all the same, in chunks that padding on the left moves.
    """
    model, processor = tiny_pictures_model(name, dtype=torch.float64), any_processor(name)
    model.set_experts_implementation("eager")
    target, batch = FrozenTarget(model, TAPS), exact(pictured(processor, CHATS, side))
    near = {"rtol": 0, "atol": 2e-3 if target.mixers and side == "left" else 1e-6}
    assert (batch["attention_mask"] == 0).any()
    features = target(**batch)

    for row, messages in enumerate(CHATS):
        wanted, logits = inputs_of_layers(target.model, exact(pictured(processor, [messages])))
        place = batch["attention_mask"][row].bool()
        own = torch.cat([wanted[i] for i in TAPS], -1)[0]
        torch.testing.assert_close(features.taps[row, place], own, **near)
        torch.testing.assert_close(target.logits(features.last_hidden[row, place]), logits[0], **near)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_tokens_of_an_image_see_each_other_both_ways(name):
    """As the model itself runs with all that its processor returns; without the types, a causal mask would pass."""
    target, batch = FrozenTarget(tiny_pictures_model(name), TAPS), pictured(any_processor(name), CHATS[:1])
    types = BOTH_WAYS[name]
    causal = inputs_of_layers(target.model, {k: x for k, x in batch.items() if k != types})[1]
    assert not torch.allclose(target.logits(target(**batch).last_hidden), causal, atol=1e-2)

    with pytest.raises(ValueError, match=f"holds media but no `{types}`, by which Gemma.*: pass on all"):
        target(**{k: x for k, x in batch.items() if k != types})


@pytest.mark.parametrize("name", [*VISION, *NAMES])
def test_the_table_names_what_forwards_take(name):
    """No argument that this version of transformers drops; and none in place of which it would take another."""
    model = any_model(name)
    form = FORMS[model.config.model_type]
    made = pictured(any_processor(name), FILM_CHATS if any("video" in x for x in form.arguments) else CHATS)
    assert set(media_arguments(model)) == {*form.arguments, form.types} - {None}
    assert set(made) - {"input_ids", "attention_mask"} <= set(media_arguments(model))
    assert set(media_arguments(model)) - set(made) <= {"second_per_grid_ts"}  # which processors may leave out


def test_every_type_of_the_table_is_tested_and_has_a_form_for_images():
    tested = {any_model(name).config.model_type for name in (*VISION, *NAMES)}
    assert tested == set(FORMS)
    assert all(type(AutoConfig.for_model(name)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING for name in FORMS)


@pytest.mark.parametrize("name", NAMES)
def test_media_that_a_model_ignores_are_refused(name):
    """Also what its forward has a name for, and no use (`image_sizes` of InternVL)."""
    target, batch = FrozenTarget(tiny_pictures_model(name), TAPS), pictured(any_processor(name), CHATS[:1])
    for other in MEDIA:
        if other not in media_arguments(target.model):
            with pytest.raises(ValueError, match=f"`{other}`, which the forward of .* does not take .it takes"):
                target(**batch, **{other: batch["input_ids"]})
    with pytest.raises(ValueError, match="`documents` packs plain text, but .*pixel_values"):
        target(**batch, documents=batch["attention_mask"])


def test_other_types_are_refused_by_name():
    """One of images that is not in the table, and the text part of one that is."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 96, **small, "pad_token_id": 0},
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **small},
        image_token_index=5,
    )
    ids, pixels = torch.arange(20, 30)[None], torch.zeros(1, 3, 8, 8)
    for model, kind in ((LlavaForConditionalGeneration(config), "llava"), (text_part("gemma3"), "gemma3_text")):
        target, said = FrozenTarget(model), "`pixel_values`, which .* cannot be shown .images and videos.*gemma3,.*"
        with pytest.raises(ValueError, match=f"{said} it is a {kind}.: use another target"):
            target(ids, pixel_values=pixels)
        assert target(ids).last_hidden.shape == (1, 10, 32)  # text it takes


def test_a_model_without_the_part_that_sees_is_refused():
    config = Gemma4Config(text_config=tiny_pictures_model("gemma4").config.text_config, vision_config=None)
    assert "a gemma4 without `vision_config`" in why_not_shown(config)


def text_part(name):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(tiny_pictures_model(name).config.get_text_config())


def test_text_alone_is_packed():
    """What has no image needs no form for images, whatever the target."""
    target = FrozenTarget(tiny_vision_model(), TAPS)
    for target in (FrozenTarget(tiny_pictures_model(name), TAPS) for name in NAMES):
        ids, documents = torch.arange(20, 32)[None], torch.arange(2).repeat_interleave(6)[None]
        packed = target(ids, documents=documents).taps
        alone = torch.cat([target(part).taps for part in ids.split(6, dim=1)], 1)
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
