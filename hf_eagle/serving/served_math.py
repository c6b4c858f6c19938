"""What vLLM computes with a draft folder, written out in plain torch from its source (see `rules_vllm.py`).

It uses nothing of hf_eagle's own drafts: it looks tensors up by their names in the file, and spells out every step in
float32 for one sequence. It is slow and small on purpose.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import silu


Tensors = Mapping[str, torch.Tensor]
RESTATED_ROPES = ("default", "linear", "llama3", "yarn")


class ServedDraft(ABC):
    """A served draft on one sequence.

    Args:
        config: `config.json`.
        tensors: the weights by their names in the file, float32.
        embedding: `(vocab, hidden)`, the target's.
        head: `(vocab, hidden)`, the target's, for kinds without one of their own.
    """

    def __init__(self, config: dict, tensors: Tensors, embedding: torch.Tensor, head: torch.Tensor):
        self.config, self.embedding, self.head = config, embedding, head
        self.tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}

    @property
    @abstractmethod
    def feature_width(self) -> int:
        """Width of a row of the target's features."""

    @abstractmethod
    def drafted_logits(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Logits of what is drafted, over the target's vocabulary, minus infinity for tokens that cannot be drafted.

        Args:
            ids: `(rows + steps,)`, the token after each row of features, and after each row that is drafted.
            features: `(rows, feature_width)`, the target's.

        Returns:
            `(logits, vocab)`; how many rows of logits there are depends on the kind.
        """

    def as_trained(self, logits: torch.Tensor) -> torch.Tensor:
        """The server's logits, plus what a server may leave out because it keeps the order of tokens."""
        return logits

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.tensors[f"{name}.weight"].T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean = x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]
        return x / mean.sqrt() * self.tensors[f"{name}.weight"]

    def _mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """SwiGLU; `(rows, hidden)`."""
        gated = silu(self._linear(x, f"{name}.gate_proj")) * self._linear(x, f"{name}.up_proj")
        return self._linear(gated, f"{name}.down_proj")


class ServedChain(ServedDraft):
    """A draft that runs on its own output, a token at a time. `kinds/` defines what enters and leaves its layer."""

    def __init__(self, config: dict, tensors: Tensors, embedding: torch.Tensor, head: torch.Tensor):
        super().__init__(config, tensors, embedding, head)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    @abstractmethod
    def combine(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features `(rows, feature_width)` -> `(rows, hidden)`."""

    @abstractmethod
    def _enter(self, embeds: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention reads `(rows, width)`, and the residual `(rows, hidden)`."""

    @abstractmethod
    def _leave(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits over the target's vocabulary and what is fed back, from the layer's output `(rows, hidden)`."""

    def drafted_logits(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """All rows of the target's features at once, then one drafted row a step; `(rows + steps, vocab)`."""
        rows = len(features)
        logits, fed_back = self.run(ids[:rows], self.combine(features), 0)
        found = [logits]
        for row in range(rows, len(ids)):
            logits, fed_back = self.run(ids[row : row + 1], fed_back[-1:], row)
            found.append(logits)
        return torch.cat(found)

    def run(self, ids: torch.Tensor, hidden: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the next rows after those run before.

        Args:
            ids: `(rows,)`, each row's next token.
            hidden: `(rows, hidden)`, combined features or what was fed back.
            first: position of the first row.

        Returns:
            Logits over the target's vocabulary, minus infinity for tokens that cannot be drafted; and what is fed back.
        """
        x, residual = self._enter(self.embedding[ids], hidden)
        residual = residual + self._attention(x, torch.arange(first, first + len(ids)))

        x = self._norm(residual, "layers.0.post_attention_layernorm")
        return self._leave(residual + self._mlp(x, "layers.0.mlp"))

    def _attention(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Llama's, with grouped queries; `(rows, hidden)`."""
        config = self.config
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        queries, keys, values = (
            self._linear(x, f"layers.0.self_attn.{name}_proj").unflatten(-1, (-1, head_dim)) for name in "qkv"
        )

        queries, keys = (rotated(config, part, positions) for part in (queries, keys))

        groups = heads // keys.shape[1]
        mixed = self._mix(
            queries, keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), head_dim**-0.5
        )
        return self._linear(mixed, "layers.0.self_attn.o_proj")

    def _mix(self, queries, keys, values, scale: float) -> torch.Tensor:
        """Causal attention over all rows so far, or the last of them; `(rows, heads * width)`."""
        self.keys.append(keys)
        self.values.append(values)
        keys, values = torch.cat(self.keys), torch.cat(self.values)

        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        place, of_query = torch.arange(len(keys)), torch.arange(len(keys) - len(queries), len(keys))[:, None]
        seen = place <= of_query
        if "sliding_attention" in (self.config.get("layer_types") or ()):
            seen &= place > of_query - self.config["sliding_window"]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE as vLLM reads it: the new spelling, or the old one if that is missing."""
    return config.get("rope_parameters") or {"rope_theta": config["rope_theta"], **(config.get("rope_scaling") or {})}


def rotated(config: dict[str, Any], heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Llama's and Qwen's RoPE of `(rows, heads, width)`: the halves of a head are rotated against each other."""
    half = heads.shape[-1] // 2
    cos, sin = rotation(config, heads.shape[-1], positions, llama_size)
    cos, sin = (torch.cat([part, part], dim=-1)[:, None] for part in (cos, sin))
    return heads * cos + torch.cat([-heads[..., half:], heads[..., :half]], dim=-1) * sin


def rotation(
    config: dict[str, Any], width: int, positions: torch.Tensor, yarn_size: Callable[[dict], float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `(rows, width / 2)` of vLLM's RoPE.

    Args:
        config: `config.json`.
        width: width of what is rotated.
        positions: `(rows,)`.
        yarn_size: YaRN's factor on both, from the RoPE fields.

    Raises:
        ValueError: for a type that is not restated here.
    """
    rope = rope_of(config)
    rope_type, base = rope.get("rope_type", "default"), rope.get("rope_theta", 10000.0)
    # for text, which is all that is compared, m-RoPE's three positions are equal
    if rope_type not in RESTATED_ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"RoPE of type {rope_type} is not restated.")

    frequencies, size = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width), 1.0
    if rope_type == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope_type == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif rope_type == "yarn":
        frequencies, size = _yarn(frequencies, rope, width, base), yarn_size(rope)
    angles = positions[:, None].float() * frequencies
    return angles.cos() * size, angles.sin() * size


def llama_size(rope: dict) -> float:
    """YaRN's factor on cosines and sines in Llama's attention."""
    return rope.get("attention_factor") or mscale(rope["factor"], 1.0)


def mscale(factor: float, strength: float) -> float:
    """YaRN's factor against attention scores that flatten in a longer context."""
    return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0


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
