"""Layers, final norm and head are found by what they do, whatever they are called; other models are refused by name."""

import pytest
import torch
from releases import skip_unknown
from tiny_families import DEEPSEEK, SMALL
from tiny_model_types import FACTORS, tiny_model_type
from tiny_new_families import FIELDS, tiny_new_family
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Kimi_K25Config, LlamaConfig, LlamaForCausalLM

from hf_eagle import FrozenTarget
from hf_eagle.targets.decoder_parts import find_decoder, find_decoder_parts
from hf_eagle.targets.loading import auto_class, load_config


IDS = torch.randint(3, 96, (1, 14), generator=torch.Generator().manual_seed(0))
# what each calls its layers and its final norm
NAMES = {
    "biogpt": ("layers", "layer_norm"),
    "blenderbot": ("layers", "layer_norm"),
    "bloom": ("h", "ln_f"),
    "ctrl": ("h", "layernorm"),
    "falcon_mamba": ("layers", "norm_f"),
    "gpt2": ("h", "ln_f"),
    "granite_swa": ("layers", "norm"),
    "inkling_text": ("layers", "norm"),
    "lfm3": ("layers", "embedding_norm"),
    "mbart": ("layers", "layer_norm"),
    "mpt": ("blocks", "norm_f"),
    "olmo": ("layers", "norm"),
    "opt": ("layers", "final_layer_norm"),
    "pegasus": ("layers", "layer_norm"),
    "recurrent_gemma": ("layers", "final_norm"),
    "rwkv": ("blocks", "ln_out"),
    "xglm": ("layers", "layer_norm"),
    "xlstm": ("blocks", "out_norm"),
}
OWN_WORDS = {"lfm2": "embedding_norm", "lfm2_moe": "embedding_norm", "nemotron_h": "norm_f", "jamba": "final_layernorm"}
OWN_WORDS |= {"bamba": "final_layernorm", "falcon_h1": "final_layernorm"}


def assert_exact(target, model):
    """Each layer's input, what is behind the final norm, and what the head makes of it, as transformers has them."""
    target.tap_ids = list(range(1, target.num_layers))
    seen = target(IDS)
    with torch.no_grad():
        own = model(input_ids=IDS, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(target.logits(seen.last_hidden), own.logits, rtol=1e-5, atol=1e-5)
    if len(own.hidden_states) == target.num_layers + 1:
        assert torch.equal(seen.taps, torch.cat(own.hidden_states[1:-1], -1))


@pytest.mark.parametrize("name", NAMES)
def test_parts_have_any_name(name):
    skip_unknown(name)
    model = tiny_model_type(name, **({"logit_scale": None} if name == "mpt" else {}))
    parts, decoder = find_decoder_parts(model), find_decoder(model)
    children = dict(decoder.named_children())
    assert (parts.layers, parts.final_norm) == tuple(children[part] for part in NAMES[name])
    if name not in ("falcon_mamba", "rwkv"):  # they return the outputs of layers, not the inputs
        assert_exact(FrozenTarget(model), model)


@pytest.mark.parametrize("name", FIELDS)
def test_hybrids_mixtures_and_sparse_attention_are_tapped_and_taught_exactly(name):
    model = tiny_new_family(name)
    target = FrozenTarget(model)
    assert target.parts.final_norm is getattr(find_decoder(model), OWN_WORDS.get(name, "norm"))
    assert_exact(target, model)


def test_kimi_is_tapped_through_its_model_of_pictures():
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = Kimi_K25Config(text_config={"model_type": "deepseek_v3", **DEEPSEEK}, vision_config=vision)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config).eval()
    assert_exact(FrozenTarget(model), model)


@pytest.mark.parametrize("width", [8, 32])
def test_a_norm_of_something_else_is_not_the_final_one(width):
    """Gemma 4 norms its embeddings per layer as well, perhaps over as many numbers as a hidden state has."""
    model = tiny_new_family("gemma4_text", hidden_size_per_layer_input=width)
    decoder = find_decoder(model)
    assert decoder.per_layer_projection_norm.weight.shape == (width,)
    assert find_decoder_parts(model).final_norm is decoder.norm


def test_heads_that_differ_from_layer_to_layer_do_not_stop_a_batch_without_padding():
    """Where Gemma 4 shares keys and values, its layers differ in their key heads, and no value holds for all."""
    model = tiny_new_family("gemma4_text")
    assert len({layer.num_key_value_heads for layer in model.config.per_layer_config}) == 2
    assert FrozenTarget(model, [1, 2])(IDS).taps.shape == (1, 14, 64)


REFUSED = {
    "bert": "BertModel has no single list of decoder layers and no norm that may be the final one",
    "marian": "MarianDecoder has no norm that may be the final one",
    "openai-gpt": "OpenAIGPTModel has no norm that may be the final one",
    "roberta-prelayernorm": "RobertaPreLayerNormModel has no single list of decoder layers",
    "xlm": "XLMModel has no single list of decoder layers",
    "hrm_text": "HrmTextModel has no single list of decoder layers",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_such_parts_is_refused_by_its_type_and_the_reason(name):
    model = tiny_model_type(name)
    with pytest.raises(ValueError) as refusal:
        FrozenTarget(model)
    said = str(refusal.value)
    assert said.startswith(f"The target {type(model).__name__} ({name}) cannot be tapped: its decoder {REFUSED[name]}")
    assert said.endswith("use another target.")


@pytest.mark.parametrize("name", ["bart", "trocr", "modernbert-decoder"])
def test_a_norm_that_the_head_does_not_follow_is_found_out_by_the_first_forward(name):
    """BART's only norm is over its embeddings; ModernBERT has a whole layer between norm and head."""
    target = FrozenTarget(tiny_model_type(name))
    with pytest.raises(ValueError, match="the head is given something else than the final norm's output"):
        target(IDS)


def test_layers_that_run_several_times_have_no_taps():
    target = FrozenTarget(tiny_model_type("dory"), [1, 2])
    with pytest.raises(ValueError, match=r"DoryForCausalLM \(dory\) runs its layer 1 several times in one forward"):
        target(IDS)


# what has other tokens than the vocabulary
OTHER_TOKENS = {"inkling2_text": "output head", "inkling2_loop_text": "output head", "moshi": "embedding table"}


@pytest.mark.parametrize("name", OTHER_TOKENS)
def test_tables_of_other_tokens_than_the_vocabulary_are_refused_by_type(name):
    skip_unknown(name)
    with pytest.raises(ValueError) as refusal:
        FrozenTarget(tiny_model_type(name))
    said = str(refusal.value)
    assert f"({name}) has " in said and f" tokens in its {OTHER_TOKENS[name]} and 96 in its `vocab_size`" in said
    assert said.endswith("use another target.")


@pytest.mark.parametrize("name", ["deepseek_v4", "hy_v4"])
def test_streams_side_by_side_have_no_taps_and_their_last_hidden_states_are_read(name):
    model = tiny_model_type(name)
    with pytest.raises(ValueError, match=rf"\({name}\) keeps what goes from layer to layer in 4 streams, .*eagle1"):
        FrozenTarget(model, [1, 2])
    target = FrozenTarget(model)
    with torch.no_grad():
        own = model(input_ids=IDS, use_cache=False)
    torch.testing.assert_close(target.logits(target(IDS).last_hidden), own.logits, rtol=1e-5, atol=1e-5)


class Streams(LlamaForCausalLM):
    """A Llama that passes two streams on, which its config does not say."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].register_forward_pre_hook(lambda module, args: (torch.stack([args[0]] * 2, 2), *args[1:]))
        self.model.layers[1].forward = lambda hidden, *args, **kwargs: hidden[:, :, 0]


def test_streams_that_no_config_names_are_seen_by_the_first_forward():
    target = FrozenTarget(Streams(LlamaConfig(**SMALL)), [1, 2])
    said = r"Streams \(llama\) keeps what goes from layer to layer as \(1, 14, 2, 32\), and a tap is one vector of 32"
    with pytest.raises(ValueError, match=said):
        target(IDS)


class Unused(LlamaForCausalLM):
    """A Llama whose only norm over the hidden size never runs."""

    def __init__(self, config):
        super().__init__(config)
        norm = self.model.norm
        self.model.norm = nn.Sequential(norm)
        self.model.spare_norm = type(norm)(config.hidden_size)


def test_a_norm_that_never_runs_is_refused_without_a_traceback():
    with pytest.raises(ValueError, match="its forward never runs its only norm that may be the final one"):
        FrozenTarget(Unused(LlamaConfig(**SMALL)))(IDS)


@pytest.mark.parametrize(
    ("name", "field"),
    [("recurrent_gemma", "logits_soft_cap"), ("xlstm", "output_logit_soft_cap")],
)
def test_soft_caps_have_several_names(name, field):
    model = tiny_model_type(name, **{field: 0.5})
    assert field not in FACTORS
    assert_exact(FrozenTarget(model), model)


def test_a_config_of_several_texts_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "musicgen", "text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, '
        '"decoder": {"model_type": "musicgen_decoder"}}'
    )
    with pytest.raises(ValueError, match="is a musicgen, which has several text configs.* use another target"):
        load_config(str(tmp_path))


def test_a_head_without_its_layers_is_not_taken_for_a_decoder():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4))
    assert find_decoder(model) is model.transformer
