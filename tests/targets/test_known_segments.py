"""What is known of a batch before it is sent to a device: it changes nothing but the waits."""

import pickle
import sys

import pytest
import torch
from tiny import pad_batch, random_chats, tiny_llama
from tiny_pictures import any_model, any_processor
from tiny_targets import tiny_family
from tiny_vision import CHATS, NAMES, processed, tiny_vision_model, vision_processor

from hf_eagle.data.collators import mark_padding
from hf_eagle.targets.document_kernels import length_of_all
from hf_eagle.targets.media_inputs import MEDIA, RopeIndex, rope_index
from hf_eagle.targets.packed_attention import Segments
from hf_eagle.targets.target import FrozenTarget
from hf_eagle.targets.vision_sizes import SizesOfMedia


def batches() -> dict[str, dict[str, torch.Tensor]]:
    padded = {name: x for name, x in pad_batch(random_chats(3, seed=2)).items() if name != "loss_mask"}
    even = {name: x[:, :9] for name, x in padded.items()} | {"attention_mask": torch.ones(3, 9, dtype=torch.long)}
    indices = torch.arange(12).expand(2, -1)
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    packed = {"input_ids": ids, "documents": indices // 5, "position_ids": indices % 5}
    return {"padded": padded, "of one length": even, "packed": packed, "packed evenly": packed | evenly(indices)}


def evenly(indices: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"documents": indices // 4, "position_ids": indices % 4}


@pytest.mark.parametrize("name", batches())
@pytest.mark.parametrize("family", ["llama", "mistral, sliding", "gpt_oss", "qwen3_moe", "eager"])
def test_known_documents_change_no_feature(family, name):
    """Of targets that run by segments, and of those that keep their own attention."""
    if family == "mistral, sliding":
        from transformers import MistralConfig, MistralForCausalLM

        sizes = {name: getattr(tiny_llama().config, name) for name in ("vocab_size", "hidden_size", "pad_token_id")}
        torch.manual_seed(0)
        config = MistralConfig(
            **sizes, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            sliding_window=3, initializer_range=0.2,
        )  # fmt: skip
        model = MistralForCausalLM(config)
    else:
        model = tiny_llama() if family in ("llama", "eager") else tiny_family(family)
    if family == "eager":
        model.set_attn_implementation("eager")
    target, batch = FrozenTarget(model, [1, 2]), batches()[name]
    mask = batch.get("attention_mask")
    documents = mark_padding(batch.get("documents"), mask, like=batch["input_ids"])

    wanted, found = target(**batch), target(**batch, segments=Segments.of(documents))
    kept = documents >= 0
    for part in ("taps", "last_hidden"):
        torch.testing.assert_close(getattr(found, part)[kept], getattr(wanted, part)[kept], rtol=1e-5, atol=1e-5)


def test_a_plan_may_be_used_twice():
    target, batch = FrozenTarget(tiny_llama(), [1]), batches()["padded"]
    segments = Segments.of(batch["attention_mask"] - 1)
    first, second = (target(**batch, segments=segments).last_hidden for _ in range(2))
    assert torch.equal(first, second) and segments.attended == 0


@pytest.mark.parametrize(("bounds", "length"), [([0, 4, 8], 4), ([0, 4, 9], None), ([0, 7], 7), ([0], None)])
def test_documents_of_one_length(bounds, length):
    assert length_of_all(bounds) == length


QWENS = (*NAMES, "qwen3.5", "qwen3.5-moe")


@pytest.mark.parametrize("name", QWENS)
def test_positions_of_media_need_no_weights(name):
    """A collator in a worker computes those of the model."""
    model, batch = any_model(name), processed(any_processor(name), CHATS, side="left")
    media = {part: batch[part] for part in MEDIA if part in batch}
    alone = pickle.loads(pickle.dumps(RopeIndex(model)))
    assert torch.equal(alone(batch), rope_index(model, batch["input_ids"], batch["attention_mask"], **media)[0])
    assert alone({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}) is None


def test_positions_that_need_the_model_are_left_to_it():
    class NeedsItsLayers(torch.nn.Module):
        config = None

        def get_rope_index(self, input_ids, image_grid_thw=None, attention_mask=None):
            return self.visual

    model = torch.nn.Module()
    model.model, model.model.visual = NeedsItsLayers(), torch.nn.Linear(1, 1)
    batch = {"input_ids": torch.ones(1, 2), "image_grid_thw": torch.ones(1, 3), "mm_token_type_ids": torch.ones(1, 2)}
    assert RopeIndex(model)(batch) is None
    assert RopeIndex(tiny_llama())(batch) is None


@pytest.mark.parametrize("name", QWENS)
def test_a_tower_that_is_told_the_sizes_sees_the_same_and_computes_nothing_from_them(name, monkeypatch):
    model, batch = any_model(name), processed(any_processor(name), CHATS, side="left")
    make, target = pickle.loads(pickle.dumps(SizesOfMedia(model))), FrozenTarget(model, [2, 4, 6])
    sizes, wanted = make(batch), target(**batch)
    assert {"image_grid_thw", "video_grid_thw", "image_cu_seqlens", "video_cu_seqlens"} <= set(sizes.read)
    assert make({"input_ids": batch["input_ids"]}) is None

    for function in ("get_vision_position_ids", "get_vision_cu_seqlens"):
        of_module = sys.modules[type(model.model.visual).__module__]
        monkeypatch.setattr(of_module, function, only_told(function), raising=False)
    found = target(**batch, vision_sizes=sizes)
    assert torch.equal(found.taps, wanted.taps) and torch.equal(found.last_hidden, wanted.last_hidden)


def only_told(function):
    """A function of transformers that must be given its result."""

    def told(*args, kwargs=None, **others):
        return kwargs.pop(function.removeprefix("get_vision_"))

    return told


@pytest.mark.parametrize("change", ["another family", "flash", "an older transformers"])
def test_the_sizes_are_left_to_a_tower_that_takes_no_such_arguments(change, monkeypatch):
    model = tiny_vision_model("qwen3-vl")
    if change == "another family":
        model.config.model_type = "banana_vl"
    elif change == "flash":
        model.model.visual.config._attn_implementation = "flash_attention_2"
    else:
        module = sys.modules[type(model.model.visual).__module__]
        monkeypatch.delattr(module, "get_vision_interpolation_indices_and_weights")
    assert SizesOfMedia(model)(processed(vision_processor("qwen3-vl"), CHATS)) is None
    assert SizesOfMedia(tiny_llama())({}) is None
