"""A target that is a PEFT adapter on a base: merged before anything else sees it."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_files import save_changed, write_tiny_target
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, T5Config

from hf_eagle import FrozenTarget
from hf_eagle.drafts.vocabulary import tokenizer_fingerprint
from hf_eagle.targets.loading import load_causal_lm, load_config, load_tokenizer, takes_media
from hf_eagle.targets.merged_folder import save_merged


IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def write_adapter(folder, base, config=None, seed=3):
    """An adapter that changes what the base says."""
    config = config or LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    save_changed(adapted, folder, seed)
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

    @pytest.mark.parametrize("length", [1, 2, 3])
    def test_adapters_that_name_each_other(self, folders, tmp_path, length):
        names = [tmp_path / f"adapter-{n}" for n in range(length)]
        for name, base in zip(names, [*names[1:], names[0]], strict=True):
            change_config(shutil.copytree(folders[1], name), base_model_name_or_path=str(base))
            for file in name.glob("tokenizer*"):
                file.unlink()
        text = f"`target` {names[0]} is an adapter that ends at no base model, since {names[-1]} names {names[0]} again"
        for load in (load_causal_lm, load_tokenizer, takes_media):
            with pytest.raises(ValueError, match=text):
                load(str(names[0]))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"r": "eight"}, "must hold a whole number or null as `r`, but holds text"),
            ({"r": 1.5}, "as `r`, but holds a number"),
            ({"lora_alpha": []}, "must hold a number or null as `lora_alpha`, but holds a list"),
            ({"target_modules": [1]}, r"must hold .* as `target_modules\[0\]`, but holds a whole number"),
            ({"base_model_name_or_path": 7}, "must hold text or null as `base_model_name_or_path`"),
            ({"peft_type": "NO_SUCH"}, "NO_SUCH"),
            ({"rank_pattern": {"x": "y"}}, "as `rank_pattern"),
            ({"layers_to_transform": {}}, "."),
        ],
    )
    def test_a_config_that_holds_something_else(self, adapter, fields, message):
        change_config(adapter, **fields)
        self.refused(adapter, f"`target` {adapter}.*{message}")

    def test_a_config_that_is_no_object(self, adapter):
        for content in ("[]", "null", "{oops", ""):
            (adapter / "adapter_config.json").write_text(content)
            self.refused(adapter, f"`target` {adapter} cannot be read: .*adapter_config.json")

    def test_weights_that_are_cut(self, adapter):
        weights = adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        self.refused(adapter, f"`target` {adapter} cannot be read: adapter_model.safetensors is cut")

    def test_a_base_that_is_broken(self, adapter, folders):
        base = shutil.copytree(folders[0], adapter.parent / "base")
        (base / "config.json").write_text("[]")
        change_config(adapter, base_model_name_or_path=str(base))
        self.refused(
            adapter, f"`target` {adapter} is an adapter on {base}, which cannot be loaded .*config.json must hold"
        )

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


# ---- files that are broken, or of something else ----


def one_sentence(load, folder, error=ValueError, argument="target"):
    with pytest.raises(error) as problem:
        load(str(folder))
    text = str(problem.value)
    assert text.startswith(f"`{argument}` {folder} ") and text.endswith(".") and "\n" not in text
    return text


@pytest.fixture
def base(folders, tmp_path):
    return shutil.copytree(folders[0], tmp_path / "base")


@pytest.mark.parametrize("load", [load_config, load_causal_lm, load_tokenizer, takes_media])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "config.json must hold an object, but holds a list"),
        ("{oops", "config.json cannot be read as JSON"),
        ('{"model_type": "no_such"}', "no_such"),
        ('{"model_type": 7}', "7"),
        (
            '{"model_type": "llama", "max_position_embeddings": "x"}',
            "config.json is not accepted .*max_position_embeddings",
        ),
        ('{"model_type": "llama", "hidden_size": []}', "config.json is not accepted .*hidden_size"),
    ],
)
def test_a_config_that_is_not_accepted(base, load, content, message):
    (base / "config.json").write_text(content)
    if load is load_tokenizer and content in ('{"model_type": "no_such"}', '{"model_type": 7}'):
        return  # a tokenizer says itself of which class it is
    with pytest.raises((OSError, ValueError), match=f"^`target` {base} .*{message}"):
        load(str(base))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{oops", "tokenizer.json cannot be read as JSON"),
        ("tokenizer.json", "[]", "tokenizer.json must hold an object"),
        ("tokenizer.json", "{}", "tokenizer.json has no `added_tokens`: restore the file"),
        ("tokenizer.json", '{"model": {"type": "no_such"}}', "tokenizer.json has no `added_tokens`: restore the file"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must hold an object"),
        ("tokenizer_config.json", '{"tokenizer_class": "NoSuch", "model_max_length": {}}', "."),
        ("tokenizer_config.json", '{"model_max_length": [1, 2]}', "'int' and 'list'"),
        ("tokenizer_config.json", '{"model_max_length": "many"}', "'int' and 'str'"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja is no text"),
    ],
)
def test_a_tokenizer_that_is_broken(base, name, content, message):
    (base / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        load_tokenizer(str(base))
    except (OSError, ValueError) as problem:
        assert str(problem).startswith(f"`target` {base} cannot be read") and "\n" not in str(problem)
        assert message.strip("\\") in str(problem)
    else:
        assert message == "."  # which transformers makes do with


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{oops", "cannot be read as JSON"),
        ("[]", "must hold an object, but holds a list"),
        ('{"eos_token_id": "</s>"}', "as `eos_token_id`, but holds text"),
        ('{"eos_token_id": [2, "x"]}', r"as `eos_token_id\[1\]`, but holds text"),
        ('{"pad_token_id": 1.5}', "as `pad_token_id`, but holds a number"),
    ],
)
def test_a_generation_config_that_cannot_be_read_is_not_passed_over(base, content, message):
    """The ends of answers come from it."""
    (base / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"^`target` {base} cannot be read.*{message}"):
        load_causal_lm(str(base))
    (base / "generation_config.json").unlink()
    load_causal_lm(str(base))


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_weights_are_read_if_they_are_tensors_alone(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    wanted = logits(load_causal_lm(str(base)))
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    assert torch.equal(logits(load_causal_lm(str(base))), wanted)
    torch.save(tensors | {"model.norm.weight": Harmful(str(tmp_path / "made"))}, base / "pytorch_model.bin")
    for content in (None, b"\x80\x02cos\nsystem\n.", b"no pickle", b""):
        if content is not None:
            (base / "pytorch_model.bin").write_bytes(content)
        text = one_sentence(load_causal_lm, base, (OSError, ValueError))
        assert "weights_only" not in text and not (tmp_path / "made").exists()
    (base / "pytorch_model.bin").unlink()
    assert "no file named model.safetensors" in one_sentence(load_causal_lm, base, OSError)


def test_what_is_no_causal_language_model(base):
    BertForMaskedLM(
        BertConfig(vocab_size=310, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ).save_pretrained(base)
    assert "is no causal language model, its `model_type` is bert" in one_sentence(load_causal_lm, base)
    T5Config().save_pretrained(base)
    assert "is no causal language model, its `model_type` is t5" in one_sentence(load_causal_lm, base)
    BertConfig(is_decoder=True, vocab_size=310, hidden_size=32, num_attention_heads=4).save_pretrained(base)
    assert "BertLMHeadModel" in one_sentence(load_causal_lm, base)  # of this kind, but with other weights


@pytest.mark.parametrize(
    "load", [load_config, load_causal_lm, load_tokenizer, takes_media, FrozenTarget.from_pretrained]
)
def test_what_is_not_there(load, tmp_path):
    for path in ("/no/such/model", str(tmp_path / "gone"), "./gone"):
        assert "does not exist: correct the path" in one_sentence(load, path, OSError)
    assert "is no folder here, and the Hub does not give it" in one_sentence(load, "nobody/no-such-model-0", OSError)
    assert "holds no config.json" in one_sentence(load, tmp_path, (OSError, ValueError))
    (tmp_path / "file").write_text("a file")
    assert "is a file" in one_sentence(load, tmp_path / "file", OSError)


def test_the_argument_is_the_callers():
    for load in (load_config, load_causal_lm, load_tokenizer):
        one_sentence(lambda path, load=load: load(path, argument="base"), "/no/such", OSError, "base")
