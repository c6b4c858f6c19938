"""Tiny drafts written in the forms of other projects: their `config.json` and their tensor names, filled at random.

Every builder takes the target's embedding `(vocab, 32)` and returns `(config, tensors)`; `hf_eagle.foreign.forms` says
which of a project's files show the form.
"""

import json

import torch
from safetensors.torch import save_file
from tiny_mla import SIZES, YARN


HIDDEN, INNER, HEADS, KV_HEADS, DRAFT_VOCAB = 32, 40, 4, 2, 24
TAP_IDS = "eagle_aux_hidden_state_layer_ids"


def write(folder, config, tensors, weights="model.safetensors"):
    """One file, `pytorch_model.bin`, or two files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: x.clone().contiguous() for name, x in tensors.items()}
    if weights.endswith(".bin"):
        torch.save(tensors, folder / weights)
    elif weights == "model.safetensors":
        save_file(tensors, folder / weights)
    else:
        names, index = sorted(tensors), {}
        for number, part in enumerate((names[::2], names[1::2])):
            file = f"model-0000{number + 1}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def random_layer(prefix, head_dim=8, width=2 * HIDDEN, latent=False, seed=1):
    """Tensors of a layer that attends over rows of `width`; norms of ones would hide a forgotten one."""
    g = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return torch.randn(*shape, generator=g) * 0.25

    def norm(size=HIDDEN):
        return 1 + 0.3 * torch.randn(size, generator=g)

    layer = {
        "post_attention_layernorm": norm(),
        "mlp.gate_proj": matrix(INNER, HIDDEN),
        "mlp.up_proj": matrix(INNER, HIDDEN),
        "mlp.down_proj": matrix(HIDDEN, INNER),
    }
    if width == 2 * HIDDEN:
        layer |= {"input_layernorm": norm(), "hidden_norm": norm()}
    if latent:
        rank, kv_rank, plain, rotated, value = SIZES.values()
        layer |= {
            "self_attn.q_a_proj": matrix(rank, width),
            "self_attn.q_a_layernorm": norm(rank),
            "self_attn.q_b_proj": matrix(HEADS * (plain + rotated), rank),
            "self_attn.kv_a_proj_with_mqa": matrix(kv_rank + rotated, width),
            "self_attn.kv_a_layernorm": norm(kv_rank),
            "self_attn.kv_b_proj": matrix(HEADS * (plain + value), kv_rank),
            "self_attn.o_proj": matrix(HIDDEN, HEADS * value),
        }
    else:
        layer |= {
            "self_attn.q_proj": matrix(HEADS * head_dim, width),
            "self_attn.k_proj": matrix(KV_HEADS * head_dim, width),
            "self_attn.v_proj": matrix(KV_HEADS * head_dim, width),
            "self_attn.o_proj": matrix(HIDDEN, HEADS * head_dim),
        }
    return {f"{prefix}{name}.weight": x for name, x in layer.items()}


def around(vocab, taps=3, fc_norm=False, seed=2):
    """What an EAGLE-3 draft of `vocab` tokens has besides its layer."""
    g = torch.Generator().manual_seed(seed)
    found = {
        "fc.weight": torch.randn(HIDDEN, taps * HIDDEN, generator=g) * 0.2,
        "norm.weight": 1 + 0.3 * torch.randn(HIDDEN, generator=g),
        "lm_head.weight": torch.randn(vocab, HIDDEN, generator=g) * 0.3,
    }
    if fc_norm:
        found |= {f"fc_norm.{i}.weight": 1 + 0.3 * torch.randn(HIDDEN, generator=g) for i in range(taps)}
    return found


def vocabulary(target_vocab, by_frequency=False, seed=3):
    """`d2t` of offsets, ascending or in a random order as of frequencies, and `t2d`."""
    ids = torch.randperm(target_vocab, generator=torch.Generator().manual_seed(seed))[:DRAFT_VOCAB]
    ids = ids if by_frequency else ids.sort().values
    t2d = torch.zeros(target_vocab, dtype=torch.bool)
    t2d[ids] = True
    return {"d2t": ids - torch.arange(DRAFT_VOCAB), "t2d": t2d}


def llama_config(vocab, **fields):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS, "hidden_act": "silu"}
    plain = {"model_type": "llama", "num_hidden_layers": 1, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    return {**sizes, **plain, "max_position_embeddings": 2048, "vocab_size": vocab, "use_cache": True, **fields}


def eagle1(embedding):
    """As for Vicuna: no RoPE fields, no key-value heads, a bias, embeddings in the file."""
    config = llama_config(len(embedding), architectures=["LlamaForCausalLM"], torch_dtype="float16", pad_token_id=0)
    layer = random_layer("layers.0.", width=HIDDEN)
    for name in ("k", "v"):
        layer[f"layers.0.self_attn.{name}_proj.weight"] = layer["layers.0.self_attn.q_proj.weight"].roll(ord(name), 0)
    # without norms a larger one lets rounding grow from step to step
    fc = torch.randn(HIDDEN, 2 * HIDDEN, generator=torch.Generator().manual_seed(4)) * 0.08
    return config, {"embed_tokens.weight": embedding, "fc.weight": fc, "fc.bias": torch.zeros(HIDDEN), **layer}


def eagle3(embedding):
    """As for LLaMA-3.1: no RoPE fields, no embeddings (they are frozen and not saved)."""
    config = llama_config(
        len(embedding),
        architectures=["LlamaForCausalLM"],
        torch_dtype="float16",
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        draft_vocab_size=DRAFT_VOCAB,
    )
    return config, {**random_layer("midlayer."), **around(DRAFT_VOCAB), **vocabulary(len(embedding))}


def specforge(embedding, **fields):
    """As for Qwen3: heads wider than hidden / heads, output ids of the taps, embeddings in the file."""
    config = llama_config(
        len(embedding),
        architectures=["LlamaForCausalLMEagle3"],
        attention_bias=False,
        torch_dtype="bfloat16",
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        rope_theta=1000000,
        rope_scaling=None,
        sliding_window=None,
        draft_vocab_size=DRAFT_VOCAB,
        eagle_config={TAP_IDS: [0, 2, 6], "use_aux_hidden_state": True},
        **fields,
    )
    tensors = {**random_layer("midlayer.", 16), **around(DRAFT_VOCAB, fc_norm=config.get("fc_norm", False))}
    return config, {"embed_tokens.weight": embedding, **tensors, **vocabulary(len(embedding))}


def modelopt(embedding):
    """`layers.0.`, tokens by frequency, no `t2d`, the base of RoPE in two places."""
    config = llama_config(
        len(embedding),
        architectures=["LlamaForCausalLMEagle3"],
        attention_bias=False,
        mlp_bias=False,
        torch_dtype="bfloat16",
        num_key_value_heads=KV_HEADS,
        head_dim=8,
        rope_scaling={"rope_type": "default", "rope_theta": 500000.0},
        rope_theta=500000.0,
        draft_vocab_size=DRAFT_VOCAB,
        eagle_config={
            TAP_IDS: [1, 3, 4],
            "use_aux_hidden_state": True,
            "use_input_layernorm_in_first_layer": True,
            "use_last_layernorm": True,
            "use_mtp_layernorm": False,
            "next_layer_regular": True,
            "parallel_draft_step": 1,
            "parallel_draft_heads_num_layers": 1,
        },
    )
    d2t = vocabulary(len(embedding), by_frequency=True)["d2t"]
    return config, {**random_layer("layers.0."), **around(DRAFT_VOCAB), "d2t": d2t}


def speculators(embedding, **fields):
    """The layer's fields nested, entry ids of the taps, the verifier's head and embeddings in the file."""
    layer = llama_config(len(embedding), attention_bias=False, num_key_value_heads=KV_HEADS, head_dim=8)
    layer |= {"rope_parameters": {"rope_type": "default", "rope_theta": 70000.0}, "mlp_bias": False}
    config = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer,
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "a/target"}},
        "draft_vocab_size": DRAFT_VOCAB,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": True,
        "target_hidden_size": None,
        TAP_IDS: [1, 4, 7],
        "embed_requires_grad": False,
        **fields,
    }
    verifier = {"verifier_lm_head.weight": torch.randn(DRAFT_VOCAB, HIDDEN), "verifier_norm.weight": torch.ones(HIDDEN)}
    tensors = {**random_layer("layers.0."), **around(DRAFT_VOCAB, fc_norm=True), **vocabulary(len(embedding))}
    return config, {"embed_tokens.weight": embedding, **verifier, **tensors}


def nemo(embedding):
    """The target's config with its number of layers, no tap ids, `model.` before the names, tokens by frequency."""
    config = llama_config(
        len(embedding),
        architectures=["LlamaEagle3DraftModel"],
        num_hidden_layers=8,
        num_key_value_heads=KV_HEADS,
        head_dim=8,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        target_hidden_size=HIDDEN,
        draft_vocab_size=DRAFT_VOCAB,
        attn_implementation="eager",
        fc_norm=True,
        norm_output=True,
        parallel_drafting=False,
        dtype="bfloat16",
    )
    tensors = {"embed_tokens.weight": embedding, **random_layer("layers.0."), **around(DRAFT_VOCAB, fc_norm=True)}
    tensors = {name if name.startswith("lm_head") else f"model.{name}": x for name, x in tensors.items()}
    return config, {**tensors, **vocabulary(len(embedding), by_frequency=True)}


def torchspec(embedding):
    """Latent attention with YaRN, the whole vocabulary, output ids, no context length."""
    config = llama_config(
        len(embedding),
        architectures=["Eagle3DeepseekV2ForCausalLM"],
        torch_dtype="bfloat16",
        num_key_value_heads=HEADS,
        rms_norm_eps=1e-5,
        rope_theta=YARN["rope_theta"],
        rope_scaling={k: v for k, v in YARN.items() if k not in ("rope_theta", "rope_type")} | {"type": "yarn"},
        draft_vocab_size=len(embedding),
        eagle_config={TAP_IDS: [1, 3, 4], "use_aux_hidden_state": True, "use_mtp_layernorm": False},
        **SIZES,
    )
    config |= {"model_type": "kimi_k2", "_torchspec_version": "0.1.0"}
    del config["max_position_embeddings"]
    tensors = {**random_layer("midlayer.", latent=True), **around(len(embedding))}
    return config, {"embed_tokens.weight": embedding, **tensors}


FORMS = (eagle1, eagle3, specforge, modelopt, speculators, nemo, torchspec)


# ---- DFlash ----

BLOCK, MASK, OUTPUTS = 5, 7, [1, 3, 6]


def random_blocks(layers=1, head_dim=8, seed=5):
    """Tensors of a DFlash draft by z-lab's names."""
    g = torch.Generator().manual_seed(seed)
    found = {
        "fc.weight": torch.randn(HIDDEN, len(OUTPUTS) * HIDDEN, generator=g) * 0.2,
        "hidden_norm.weight": 1 + 0.3 * torch.randn(HIDDEN, generator=g),
        "norm.weight": 1 + 0.3 * torch.randn(HIDDEN, generator=g),
    }
    for number in range(layers):
        prefix = f"layers.{number}."
        found |= random_layer(prefix, head_dim, width=HIDDEN, seed=seed + number)
        sizes = {"input_layernorm": HIDDEN, "self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
        for name, size in sizes.items():
            found[f"{prefix}{name}.weight"] = 1 + 0.3 * torch.randn(size, generator=g)
    return found


def block_config(vocab, layers=1, **fields):
    sizes = {"num_hidden_layers": layers, "num_key_value_heads": KV_HEADS, "head_dim": 8, "attention_bias": False}
    rope = {"rope_theta": 20000.0, "rope_scaling": None}
    types = {"layer_types": ["full_attention"] * layers, "model_type": "qwen3", "architectures": ["DFlashDraftModel"]}
    return llama_config(vocab, **sizes, **rope, **types, block_size=BLOCK, num_target_layers=8, **fields)


def zlab_blocks(embedding, layers=2):
    """As z-lab publishes them, with its own code beside: the old spelling of RoPE alone."""
    config = block_config(
        len(embedding),
        layers,
        auto_map={"AutoModel": "dflash.DFlashDraftModel"},
        dtype="float32",
        dflash_config={"mask_token_id": MASK, "target_layer_ids": OUTPUTS},
    )
    return config, random_blocks(layers)


def specforge_blocks(embedding):
    """Its trainer writes z-lab's form; heads wider than hidden / heads, one layer."""
    config = block_config(
        len(embedding),
        torch_dtype="bfloat16",
        dflash_config={"mask_token_id": MASK, "target_layer_ids": OUTPUTS},
    )
    return config | {"head_dim": 16, "rope_theta": 1e6}, random_blocks(head_dim=16)


def speculators_blocks(embedding, **fields):
    """The layers' fields nested, ids of taps one higher, the verifier's embeddings, head and norm in the file."""
    nested = block_config(len(embedding), 2)
    nested |= {"rope_parameters": {"rope_type": "default", "rope_theta": 70000.0}}
    layer = {name: x for name, x in nested.items() if name not in ("architectures", "block_size", "rope_theta")}
    config = {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "transformer_layer_config": layer,
        "speculators_config": {"algorithm": "dflash", "verifier": {"name_or_path": "a/target"}},
        "draft_vocab_size": len(embedding),
        "target_hidden_size": None,
        "aux_hidden_state_layer_ids": [i + 1 for i in OUTPUTS],
        "mask_token_id": MASK,
        "block_size": BLOCK,
        "sample_from_anchor": False,
        "sliding_window_non_causal": False,
        **fields,
    }
    lent = {"embed_tokens.weight": embedding, "verifier_norm.weight": torch.ones(HIDDEN)}
    return config, {**lent, **random_blocks(2)}


def transformers_blocks(embedding):
    """`muse_glimmer_assistant`: all fields at top level, other names of `fc` and its norm."""
    config = block_config(len(embedding), 2, mask_token_id=MASK, target_layer_ids=OUTPUTS, sliding_window=2048)
    config |= {"model_type": "muse_glimmer_assistant", "architectures": ["MuseGlimmerAssistantModel"]}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 30000.0}}
    for name in ("rope_theta", "rope_scaling", "vocab_size", "num_target_layers"):
        del config[name]
    tensors = random_blocks(2)
    tensors["encoder.fc.weight"] = tensors.pop("fc.weight")
    tensors["encoder.output_norm_enc.weight"] = tensors.pop("hidden_norm.weight")
    return config, tensors


BLOCKS = (zlab_blocks, specforge_blocks, speculators_blocks, transformers_blocks)
