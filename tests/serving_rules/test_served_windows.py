"""A draft's window: which targets give it theirs in vLLM, which is right, what training, import and repair write."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_serving_check import damaged, faults, put
from tiny import tiny_eagle1_pair, tiny_pair
from tiny_mla import tiny_mla_pair
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from hf_eagle import EagleConfig, load_draft
from hf_eagle.arguments.groups import DraftArguments, TargetArguments
from hf_eagle.drafts.eagle1.configuration import Eagle1Config
from hf_eagle.drafts.eagle3.configuration import draft_config
from hf_eagle.foreign.fields import draft_config as imported_config
from hf_eagle.foreign.kinds import KINDS
from hf_eagle.serving.check import check_draft, require_servable
from hf_eagle.serving.draft_folder import TargetFacts
from hf_eagle.serving.repair import repair_draft
from hf_eagle.targets.architectures import window_of_all_layers
from hf_eagle.training.parts import config_of_draft, take_window


SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 8, "intermediate_size": 48}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0}
SLIDING, FULL = "sliding_attention", "full_attention"
# config -> the window that vLLM gives every layer, also a draft's
TARGETS = {
    "Mistral 7B v0.1": (MistralConfig(**SIZES, sliding_window=64), 64),
    "Mistral 7B v0.2": (MistralConfig(**SIZES, sliding_window=None), None),
    "Phi-3 mini": (Phi3Config(**SIZES, sliding_window=47), 47),
    "Llama": (LlamaConfig(**SIZES), None),
    "Qwen2 without": (Qwen2Config(**SIZES, sliding_window=64), None),
    "Qwen2 from a layer on": (
        Qwen2Config(**SIZES, sliding_window=64, use_sliding_window=True, max_window_layers=4),
        None,
    ),
    "Qwen2, all layers": (Qwen2Config(**SIZES, sliding_window=64, use_sliding_window=True, max_window_layers=0), 64),
    "Gemma 3": (Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=64), None),
    "as long as the context": (MistralConfig(**SIZES, sliding_window=512), None),
    "none, as a zero": (MistralConfig(**SIZES, sliding_window=0), None),
}


@pytest.mark.parametrize("name", TARGETS)
def test_training_writes_a_window_where_vllm_would_else_give_the_targets(name, tmp_path):
    target, window = TARGETS[name]
    assert (TargetFacts.of(target).window, window_of_all_layers(target)) == (window, window)
    draft_config(target).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    given_window = {name: written[name] for name in ("layer_types", "sliding_window") if name in written}
    assert given_window == ({} if window is None else {"layer_types": [SLIDING], "sliding_window": 512})
    again = EagleConfig.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == written
    for other in (draft_config(target, "mla"), Eagle1Config.from_target(target)):
        assert not {"layer_types", "sliding_window"} & other.to_diff_dict().keys()


def sliding_pair():
    """A draft for a target whose layers all slide, and its target."""
    target, draft = tiny_pair(40)
    sizes = {name: getattr(target.config, name) for name in (*SIZES, "rms_norm_eps", "head_dim", "rope_parameters")}
    target.model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=64))
    target.config = target.model.config
    return target, draft


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """The target's config, and the folder of a draft as it was written before anybody knew."""
    target, draft = sliding_pair()
    folder = tmp_path_factory.mktemp("sliding") / "draft"
    draft.save_pretrained(folder)
    assert "layer_types" not in json.loads((folder / "config.json").read_text())
    return target, folder


def test_a_draft_without_a_window_beside_such_a_target_is_caught_and_mended(sliding, tmp_path):
    target, folder = sliding
    (found,) = faults(folder, target)
    assert found.startswith("vLLM: all layers of the target slide, and a draft without a window of its own gets the")
    assert "target's 64 tokens: beyond them it does not see keys that training showed, and fewer of its tokens" in found
    assert found.endswith('Fix: write `layer_types` ["sliding_attention"] and `sliding_window` 512, the whole context.')
    assert faults(folder) == []  # nothing is known of the target
    with pytest.raises(ValueError, match="would not be served as it was trained"):
        require_servable(folder, target.config)

    done = repair_draft(folder, tmp_path / "mended", target.config)
    assert len(done) == 2 and faults(tmp_path / "mended", target) == [] == faults(tmp_path / "mended")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "mended"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layer_types": [FULL]}, "all layers of the target slide"),  # which does not undo it
        ({"layer_types": [SLIDING], "sliding_window": 64}, "hides keys that training showed from a context of 512"),
        ({"layer_types": [SLIDING]}, "hides keys that training showed, but no `sliding_window` says"),
        ({"sliding_window": 512}, "all layers of the target slide"),  # which alone is ignored
        ({"layer_types": [SLIDING], "sliding_window": 512}, None),
        ({"layer_types": [SLIDING], "sliding_window": 100_000}, None),
    ],
)
def test_one_form_of_window_is_right(sliding, fields, words, tmp_path):
    target, folder = sliding
    damaged(folder, tmp_path / "draft", put(**fields))
    found = faults(tmp_path / "draft", target)
    assert (words is None and found == []) or any(words in line for line in found), found


@settings(max_examples=40, deadline=None)
@given(
    types=st.none() | st.lists(st.sampled_from([SLIDING, FULL]), min_size=1, max_size=6),
    window=st.none() | st.integers(0, 700),
    own=st.none() | st.integers(1, 700),
    slides=st.booleans(),
)
def test_no_key_is_hidden_exactly_if_nothing_is_found(sliding, tmp_path_factory, types, window, own, slides):
    """vLLM's own decision, replayed: what a draft's layer sees of a context of 512."""

    class Config(PreTrainedConfig):
        model_type = "remote"

    target = Config(**SIZES, layer_types=types, sliding_window=window)
    fields = {"layer_types": [SLIDING]} if slides else {}
    fields |= {} if own is None else {"sliding_window": own}
    folder = tmp_path_factory.mktemp("any") / "draft"
    damaged(sliding[1], folder, put(**fields))

    if slides:
        seen = own or 0  # without a number vLLM does not load it
    else:
        everywhere = types is None or all(one == SLIDING for one in types)
        seen = window if everywhere and window else 512
    found = [x for x in check_draft(folder, target) if "slid" in str(x)]
    assert any(x.level == "fault" for x in found) == (seen < 512), found

    # what is said besides: that a number alone does nothing
    ignored = own is not None and own < 512 and not slides
    assert any("without `layer_types` is ignored" in x.text for x in found) == ignored, found


def test_eagle1_has_no_such_cure_and_latent_attention_needs_none(tmp_path):
    """With `layer_types` EAGLE-1 is not loaded: such a draft is as intended, but served within the window only."""
    config = TARGETS["Mistral 7B v0.1"][0]
    tiny_eagle1_pair()[1].save_pretrained(tmp_path / "eagle1")
    (found,) = [x for x in check_draft(tmp_path / "eagle1", config) if "slide" in x.text]
    assert found.level == "limit" and found.fix.startswith("serve at most 64 tokens (`--max-model-len`), or train an")
    require_servable(tmp_path / "eagle1", config)
    repair_draft(tmp_path / "eagle1", tmp_path / "eagle1-mended", config)
    assert "layer_types" not in json.loads((tmp_path / "eagle1-mended" / "config.json").read_text())
    damaged(tmp_path / "eagle1", tmp_path / "wrong", put(layer_types=[SLIDING], sliding_window=512))
    told = "`layer_types` asks for sliding attention: loading fails"
    assert any(told in x.text for x in check_draft(tmp_path / "wrong"))

    tiny_mla_pair(40)[1].save_pretrained(tmp_path / "mla")
    assert not any("slide" in x.text for x in check_draft(tmp_path / "mla", config))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", ["eagle1", "eagle3"])
def test_import_writes_the_targets_context_and_window_whatever_a_recipe_had(kind, name):
    """Published recipes have 2048."""
    target, window = TARGETS[name]
    config = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64}
    made = imported_config(KINDS[kind], config, target, 96, None).to_diff_dict()
    assert made["max_position_embeddings"] == 512
    wanted = {} if window is None or kind == "eagle1" else {"layer_types": [SLIDING], "sliding_window": 512}
    assert {field: made[field] for field in ("layer_types", "sliding_window") if field in made} == wanted


def test_a_short_context_is_told_with_its_consequence(tmp_path):
    target, draft = tiny_pair(40)
    draft.save_pretrained(tmp_path / "draft")
    damaged(tmp_path / "draft", tmp_path / "short", put(max_position_embeddings=64))
    found = [line for line in faults(tmp_path / "short", target) if line.startswith("vLLM")]
    assert len(found) == 1 and "the draft does not run for any sequence of the batch, silently" in found[0]
    repair_draft(tmp_path / "short", tmp_path / "mended", target.config)
    assert faults(tmp_path / "mended", target) == []


def test_a_resumed_draft_of_an_earlier_version_gets_its_window(sliding, tmp_path):
    """Its weights are the same; without the window the run would end at its first save."""
    target, folder = sliding
    arguments = DraftArguments(draft_vocab_size=40), TargetArguments(target="nobody")
    asked = config_of_draft(target.config, *reversed(arguments))
    draft = load_draft(folder)
    take_window(draft.config, asked)
    draft.save_pretrained(tmp_path)
    require_servable(tmp_path, target.config)
    take_window(draft.config, draft_config(TARGETS["Llama"][0]))  # a target without: nothing is taken away
    assert draft.config.sliding_window == 512
