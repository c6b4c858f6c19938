"""A target that is a PEFT adapter on a base: merged before anything else sees it."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_files import write_tiny_target
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_eagle import FrozenTarget
from hf_eagle.drafts.vocabulary import tokenizer_fingerprint
from hf_eagle.targets.loading import load_causal_lm, load_tokenizer, save_merged


IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def write_adapter(folder, base, config=None, seed=3):
    """An adapter that changes what the base says."""
    config = config or LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter_target")
    write_tiny_target(folder / "base")
    return folder / "base", write_adapter(folder / "adapter", folder / "base")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_the_merged_target_is_the_adapted_model(folders):
    base, adapter = folders
    target = FrozenTarget.from_pretrained(str(adapter), tap_ids=[2, 4, 5])
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    torch.testing.assert_close(logits(target.model), logits(wanted), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(target.model), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)
    # nothing of the adapter is left: it runs as fast as its base, and can be sharded and compiled like it
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert type(target.model) is type(plain) and list(target.model.state_dict()) == list(plain.state_dict())
    assert all(type(m) is nn.Linear for n, m in target.model.named_modules() if n.endswith("_proj"))
    assert not any(p.requires_grad for p in target.model.parameters())
    # which target it is, for whoever notes it down
    assert target.model.name_or_path == target.model.config._name_or_path == str(adapter)
    assert target(IDS).taps.shape == (1, 6, 3 * 32)


def test_the_asked_for_dtype_is_the_merged_models(folders):
    base, adapter = folders
    half, whole = (load_causal_lm(str(adapter), dtype=dtype) for dtype in (torch.bfloat16, "auto"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    # the same change of weights, to bfloat16's rounding
    change = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    up, down = (change[f"base_model.model.{name}.lora_{which}.weight"] for which in "BA")
    wanted = load_file(base / "model.safetensors")[f"{name}.weight"] + 2 * up @ down
    torch.testing.assert_close(whole.get_parameter(f"{name}.weight"), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(half.get_parameter(f"{name}.weight").float(), wanted, rtol=1e-2, atol=4e-3)


def test_an_adapter_on_an_adapter(folders, tmp_path):
    base, adapter = folders
    merged = load_causal_lm(str(adapter))
    merged.save_pretrained(tmp_path / "merged")
    write_adapter(tmp_path / "second", tmp_path / "merged", seed=8)
    wanted = logits(load_causal_lm(str(tmp_path / "second")))
    change_config(tmp_path / "second", base_model_name_or_path=str(adapter))
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / "second"))), wanted)


def test_the_tokenizer_is_the_adapters_own_or_its_bases(folders, tmp_path):
    base, adapter = folders
    of_base = AutoTokenizer.from_pretrained(base)
    assert tokenizer_fingerprint(load_tokenizer(str(adapter))) == tokenizer_fingerprint(of_base)
    assert load_tokenizer(str(adapter)).chat_template == of_base.chat_template
    assert load_tokenizer(str(base)).chat_template == of_base.chat_template
    own = shutil.copytree(adapter, tmp_path / "own")
    of_base.chat_template = "its own"
    of_base.save_pretrained(own)
    assert load_tokenizer(str(own)).chat_template == "its own"


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


class TestRefusals:
    @pytest.fixture
    def adapter(self, folders, tmp_path):
        return shutil.copytree(folders[1], tmp_path / "adapter")

    def refused(self, adapter, message, error=ValueError):
        with pytest.raises(error, match=message):
            FrozenTarget.from_pretrained(str(adapter))

    def test_no_base(self, adapter):
        change_config(adapter, base_model_name_or_path=None)
        self.refused(adapter, "adapter_config.json names no `base_model_name_or_path`: write the base model there")

    def test_a_base_that_is_not_there(self, adapter):
        change_config(adapter, base_model_name_or_path=str(adapter / "gone"))
        self.refused(adapter, "is an adapter on .*gone, which cannot be loaded .*: correct `base_model", OSError)

    def test_a_base_of_another_shape(self, adapter):
        weights = load_file(adapter / "adapter_model.safetensors")
        save_file(
            {name: tensor.repeat(1, 2) for name, tensor in weights.items()}, adapter / "adapter_model.safetensors"
        )
        self.refused(adapter, "does not fit its base .*base: .*size mismatch")

    def test_a_base_of_another_kind(self, adapter):
        change_config(adapter, target_modules=["c_attn"])
        self.refused(adapter, "does not fit its base .*base: Target modules .*c_attn.* not found")

    def test_weights_that_are_missing(self, adapter):
        weights = load_file(adapter / "adapter_model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if "layers.3" not in name}
        save_file(kept, adapter / "adapter_model.safetensors")
        self.refused(adapter, "does not fit its base .*base: Found missing adapter keys")

    def test_what_is_no_change_of_weights(self, folders, tmp_path):
        write_adapter(tmp_path, folders[0], PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
        self.refused(tmp_path, "is of type PROMPT_TUNING, which is no change of weights and cannot be merged")

    def test_a_whole_model_beside_it(self, adapter, folders):
        shutil.copy(folders[0] / "model.safetensors", adapter)
        self.refused(adapter, r"holds both a whole model \(model.safetensors\) and an adapter")


def test_a_merged_copy_is_made_once_and_never_over_another(folders, tmp_path):
    base, adapter = folders
    save_merged(str(adapter), tmp_path / "merged", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(load_causal_lm(str(adapter)).eval()), rtol=0, atol=0)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "merged")) == tokenizer_fingerprint(load_tokenizer(base))
    written = (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns
    save_merged(str(adapter), tmp_path / "merged", dtype=torch.float32)
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns == written
    other = write_adapter(tmp_path / "other", base, seed=4)
    with pytest.raises(FileExistsError, match=f"merged is in the way of merging `target` {other}: delete it"):
        save_merged(str(other), tmp_path / "merged")
