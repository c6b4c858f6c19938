import json

import numpy as np
import pytest
import tiny_gguf
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_eagle.targets.gguf import convert_gguf


# from a weight's name in the checkpoint to its name in the file
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    held = tiny_gguf.write_tiny_gguf(folder / "tiny.gguf")
    return convert_gguf(folder, "tiny.gguf", folder / "out" / "tiny"), held


def in_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows, transformers a head's two halves: its rows 0 2 4 .. 1 3 5 .."""
    width = weight.shape[0] // heads
    order = [head * width + row for head in range(heads) for row in (*range(0, width, 2), *range(1, width, 2))]
    return weight[order]


def test_every_weight_is_the_files_own_dequantised(converted):
    folder, held = converted
    found = load_file(folder / "model.safetensors")

    expected = {"model.embed_tokens.weight": held["token_embd"], "model.norm.weight": held["output_norm"]}
    for layer in range(tiny_gguf.LAYERS):
        for ours, theirs in NAMES.items():
            weight = held[f"blk.{layer}.{theirs}"]
            if theirs in ("attn_q", "attn_k"):
                weight = in_halves(weight, tiny_gguf.HEADS if theirs == "attn_q" else tiny_gguf.KV_HEADS)
            expected[f"model.layers.{layer}.{ours}.weight"] = weight
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def test_config_is_an_ordinary_one(converted):
    config = json.loads((converted[0] / "config.json").read_text())
    assert config["rms_norm_eps"] == tiny_gguf.EPSILON  # not its nearest 32-bit number, 9.999999747378752e-06
    assert config["rope_parameters"]["rope_theta"] == tiny_gguf.THETA
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert "Tiny Odd Name" not in json.dumps(config)


def test_model_and_tokenizer_load_and_run(converted):
    folder, _ = converted
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1 and tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids("hello") in ids  # the merges are there

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([ids])).logits).all()


def test_epsilon_can_be_given(tmp_path):
    tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = convert_gguf(tmp_path, "tiny.gguf", tmp_path / "out", rms_norm_eps=1e-6)
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 1e-6


def test_missing_file_and_used_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="`gguf_file`.*none.gguf does not exist"):
        convert_gguf(tmp_path, "none.gguf", tmp_path / "out")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(FileExistsError, match="`output_dir`.*used is not empty"):
        convert_gguf(tmp_path, "tiny.gguf", tmp_path / "used")


def test_a_torn_file_leaves_nothing_behind(tmp_path):
    tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception):  # noqa: B017 (whatever the reader of the format raises)
        convert_gguf(tmp_path, "tiny.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
