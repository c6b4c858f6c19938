"""The ends of a target are loaded alone, and are those of the whole target."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from tiny_targets import FAMILIES, tiny_family
from tiny_vision import tiny_vision_model

from hf_eagle import FrozenTarget
from hf_eagle.store.fingerprints import target_fingerprints
from hf_eagle.targets.ends import load_ends
from hf_eagle.targets.served import ServedTarget


@pytest.fixture
def save(tmp_path):
    def saved(model):
        model.save_pretrained(tmp_path / "target")
        return str(tmp_path / "target")

    return saved


@pytest.mark.parametrize("name", FAMILIES)
def test_embedding_norm_and_head_are_those_of_the_whole_target(name, save):
    path = save(tiny_family(name))
    ends, whole = ServedTarget(load_ends(path)), FrozenTarget.from_pretrained(path)
    hidden = torch.randn(2, 5, whole.hidden_size)

    assert torch.equal(ends.embedding_weight(), whole.embedding_weight())
    assert torch.equal(ends.head_weight(), whole.head_weight())
    assert torch.equal(ends.parts.final_norm(hidden), whole.parts.final_norm(hidden))
    assert torch.equal(ends.logits(hidden), whole.logits(hidden))
    for what in ("num_layers", "hidden_size", "vocab_size", "dtype"):
        assert getattr(ends, what) == getattr(whole, what)

    # nothing else is held
    parts = (whole.model.get_input_embeddings(), whole.parts.final_norm, whole.parts.head)
    sizes = {id(x): x.numel() for part in parts for x in part.parameters()}
    assert sum(x.numel() for x in ends.model.parameters()) == sum(sizes.values())
    assert not any(x.is_meta for x in (*ends.model.parameters(), *ends.model.buffers()))


def test_no_other_weight_is_read(save):
    """A layer's weights may be missing here: only the server needs them."""
    path = save(tiny_llama())
    file = f"{path}/model.safetensors"
    save_file({k: x for k, x in load_file(file).items() if ".layers." not in k}, file, {"format": "pt"})
    assert ServedTarget(load_ends(path)).num_layers == 8


@pytest.mark.parametrize("lost", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_an_end_that_is_missing_is_refused(lost, save):
    path = save(tiny_llama())
    file = f"{path}/model.safetensors"
    save_file({k: x for k, x in load_file(file).items() if k != lost}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"`target` .* lacks 1 of the 3 tensors .*{lost}"):
        load_ends(path)


def quantise(path, ignore):
    """The layers, or all linear layers, as a format of eight bits names them, with its config."""
    file = f"{path}/model.safetensors"
    tensors = {}
    for name, x in load_file(file).items():
        if name.endswith(("proj.weight", "lm_head.weight")) and not any(part in name for part in ignore):
            tensors |= {f"{name}_packed": x.to(torch.int8), f"{name}_scale": x.new_ones(1)}
        else:
            tensors[name] = x
    save_file(tensors, file, {"format": "pt"})
    config = json.loads(open(f"{path}/config.json").read())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "ignore": ignore, "format": "int-quantized"}
    open(f"{path}/config.json", "w").write(json.dumps(config))


def test_a_quantised_targets_ends_need_no_quantiser(save):
    model = tiny_llama()
    path = save(model)
    quantise(path, ["lm_head"])
    ends = ServedTarget(load_ends(path))
    assert torch.equal(ends.head_weight(), model.lm_head.weight)
    # features of other numbers are other features
    plain = ServedTarget(load_ends(save(model)))
    assert target_fingerprints(ends)["config"] != target_fingerprints(plain)["config"]


def test_a_quantised_head_is_refused(save):
    path = save(tiny_llama())
    quantise(path, [])
    with pytest.raises(ValueError, match="is quantised, also at its ends .*lm_head.weight.*: serve one whose"):
        load_ends(path)


def test_an_adapter_is_refused(tmp_path, save):
    base = save(tiny_llama())
    model = tiny_llama()
    model.name_or_path = base
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    adapter = tmp_path / "adapter" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match="is an adapter, which changes the layers that run in the server: merge it"):
        load_ends(str(tmp_path / "adapter"))


def test_a_target_that_takes_images_is_refused(save):
    with pytest.raises(ValueError, match="takes images, and `target_url` sends a server token ids alone"):
        load_ends(save(tiny_vision_model()))


def test_a_layer_that_is_not_here_says_so(save):
    with pytest.raises(RuntimeError, match="layers run in the server that `target_url` names: ask it"):
        load_ends(save(tiny_llama()))(torch.tensor([[1, 2]]))
