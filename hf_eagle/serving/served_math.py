"""What vLLM computes with a draft folder, written out in plain torch from its source (see `rules_vllm.py`).

Nothing here comes from hf_eagle's own drafts: the tensors are taken by their names in the file, and every step is spelt
out in float32 for one sequence. It is slow and small on purpose.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import silu


Tensors = Mapping[str, torch.Tensor]
RESTATED_ROPES = ("default", "linear", "llama3", "yarn")


class ServedDraft:
    """One sequence of a draft, served.

    Args:
        config: `config.json`.
        tensors: the weights by their names in the file, float32.
        kind: `eagle1`, `eagle3` or `mla`.
        embedding: `(vocab, hidden)`, the target's.
        head: `(vocab, hidden)`, the target's, which EAGLE-1 uses.
    """

    def __init__(self, config: dict, tensors: Tensors, kind: str, embedding: torch.Tensor, head: torch.Tensor):
        self.config, self.kind, self.embedding, self.head = config, kind, embedding, head
        self.tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def combine(self, features: torch.Tensor) -> torch.Tensor:
        """`(rows, width)` of the target -> `(rows, hidden)`."""
        if self.kind == "eagle1":
            return features
        if self.config.get("fc_norm"):
            chunks = features.chunk(sum(name.startswith("fc_norm.") for name in self.tensors), dim=-1)
            features = torch.cat([self._norm(chunk, f"fc_norm.{i}") for i, chunk in enumerate(chunks)], dim=-1)
        return features @ self.tensors["fc.weight"].T

    def run(self, ids: torch.Tensor, hidden: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows behind those run before.

        Args:
            ids: `(rows,)`, of each row the next token.
            hidden: `(rows, hidden)`, combined features or what was fed back.
            first: position of the first row.

        Returns:
            Logits over the target's vocabulary, minus infinity for tokens that cannot be drafted, and what is fed back.
        """
        embeds = self.embedding[ids]
        if self.kind == "eagle1":
            x = torch.cat([embeds, hidden], dim=-1) @ self.tensors["fc.weight"].T
            residual = x
        else:
            x = torch.cat(
                [self._norm(embeds, "layers.0.input_layernorm"), self._norm(hidden, "layers.0.hidden_norm")], -1
            )
            residual = hidden
        positions = torch.arange(first, first + len(ids))
        attend = self._latent_attention if self.kind == "mla" else self._attention
        residual = residual + attend(x, positions)
        x = self._norm(residual, "layers.0.post_attention_layernorm")
        gated = silu(self._linear(x, "layers.0.mlp.gate_proj")) * self._linear(x, "layers.0.mlp.up_proj")
        out = residual + self._linear(gated, "layers.0.mlp.down_proj")
        if self.kind == "eagle1":
            return (out @ self.head.T) * (self.config.get("logit_scale") or 1.0), out
        normed = self._norm(out, "norm")
        return self._over_target(self._linear(normed, "lm_head")), normed if self.config.get("norm_output") else out

    def _over_target(self, logits: torch.Tensor) -> torch.Tensor:
        if "d2t" not in self.tensors:
            return logits
        targets = torch.arange(logits.shape[-1]) + self.tensors["d2t"].long()
        everything = logits.new_full((len(logits), self.config["vocab_size"]), float("-inf"))
        everything[:, targets] = logits
        return everything

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.tensors[f"{name}.weight"].T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean = x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]
        return x / mean.sqrt() * self.tensors[f"{name}.weight"]

    def _attention(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        config = self.config
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        queries, keys, values = (
            self._linear(x, f"layers.0.self_attn.{name}_proj").unflatten(-1, (-1, head_dim)) for name in "qkv"
        )
        cos, sin, _ = rotation(config, head_dim, positions)
        cos, sin = (torch.cat([part, part], dim=-1)[:, None] for part in (cos, sin))
        queries, keys = (
            r * cos + torch.cat([-r[..., head_dim // 2 :], r[..., : head_dim // 2]], -1) * sin for r in (queries, keys)
        )
        groups = heads // keys.shape[1]
        mixed = self._mix(
            queries, keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), head_dim**-0.5
        )
        return self._linear(mixed, "layers.0.self_attn.o_proj")

    def _latent_attention(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        config, name = self.config, "layers.0.self_attn"
        nope, rope, value = (config[field] for field in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        queries = self._linear(
            self._norm(self._linear(x, f"{name}.q_a_proj"), f"{name}.q_a_layernorm"), f"{name}.q_b_proj"
        )
        queries = queries.unflatten(-1, (-1, nope + rope))
        latent, shared = self._linear(x, f"{name}.kv_a_proj_with_mqa").split([config["kv_lora_rank"], rope], -1)
        made = self._linear(self._norm(latent, f"{name}.kv_a_layernorm"), f"{name}.kv_b_proj")
        keys, values = made.unflatten(-1, (-1, nope + value)).split([nope, value], -1)
        cos, sin, factor = rotation(config, rope, positions, latent=True)

        def rotate(pairs: torch.Tensor) -> torch.Tensor:  # neighbours, not halves
            even, odd = pairs[..., 0::2], pairs[..., 1::2]
            c, s = cos[:, None], sin[:, None]
            return torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(-2)

        queries = torch.cat([queries[..., :nope], rotate(queries[..., nope:])], -1)
        keys = torch.cat([keys, rotate(shared[:, None]).expand(-1, keys.shape[1], -1)], -1)
        return self._linear(self._mix(queries, keys, values, (nope + rope) ** -0.5 * factor), f"{name}.o_proj")

    def _mix(self, queries, keys, values, scale: float) -> torch.Tensor:
        """Causal attention over all rows so far; `(rows, heads * width)`."""
        self.keys.append(keys)
        self.values.append(values)
        keys, values = torch.cat(self.keys), torch.cat(self.values)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        before = torch.arange(len(keys)) <= torch.arange(len(keys) - len(queries), len(keys))[:, None]
        weights = scores.masked_fill(~before, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


def rotation(config: dict[str, Any], width: int, positions: torch.Tensor, latent: bool = False):
    """Cosines and sines `(rows, width / 2)` of vLLM's RoPE, and the factor of YaRN on the scores of latent attention.

    Raises:
        ValueError: for a type that is not restated here.
    """
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"], **(config.get("rope_scaling") or {})}
    kind, base = rope.get("rope_type", "default"), rope.get("rope_theta", 10000.0)
    # of text, which is all that is compared, m-RoPE's three positions are one
    if kind not in RESTATED_ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"RoPE of type {kind} is not restated.")
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    size, factor = 1.0, 1.0
    if kind == "linear":
        frequencies = frequencies / rope["factor"]
    elif kind == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif kind == "yarn":
        frequencies = _yarn(frequencies, rope, width, base)
        stretched = rope["factor"]
        if latent:
            size = _mscale(stretched, rope.get("mscale", 1.0)) / _mscale(stretched, rope.get("mscale_all_dim", 0.0))
            factor = _mscale(stretched, rope.get("mscale_all_dim", 0.0)) ** 2
        else:
            size = rope.get("attention_factor") or _mscale(stretched, 1.0)
    angles = positions[:, None].float() * frequencies
    return angles.cos() * size, angles.sin() * size, factor


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(frequencies: torch.Tensor, rope: dict) -> torch.Tensor:
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wave = 2 * math.pi / frequencies
    smooth = (length / wave - low) / (high - low)
    between = (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
    return torch.where(
        wave < length / high, frequencies, torch.where(wave > length / low, frequencies / rope["factor"], between)
    )


def _yarn(frequencies: torch.Tensor, rope: dict, width: int, base: float) -> torch.Tensor:
    length = rope["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension(rope.get("beta_slow") or 1)), width - 1)
    ramp = ((torch.arange(width // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / rope["factor"] * ramp + frequencies * (1 - ramp)
