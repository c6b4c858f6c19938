"""RoPE with three positions a token, as in Qwen-VL's text models and both servers."""

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class EagleMRotaryEmbedding(LlamaRotaryEmbedding):
    """Every pair of a head is rotated by one of a token's positions in time, height and width.

    `mrope_section` says how many pairs belong to each axis. Interleaved (Qwen3-VL), pairs go round the axes,
    `thwthw...`, until height and width have theirs, and time gets the rest. Otherwise (Qwen2.5-VL) each axis has one
    block of pairs. If the three positions are equal, as in text, this is plain RoPE.
    """

    def __init__(self, config):
        super().__init__(config)
        self.axes = axes_of_pairs(config.mrope_section, config.rope_parameters.get("mrope_interleaved", False))

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables `(batch, n, head_dim)` in the dtype of `x` for `position_ids` `(3, batch, n)`."""
        axes = torch.tensor(self.axes).to(x.device, non_blocking=True)
        positions = position_ids.to(x.device)[axes].movedim(0, -1).float()  # (batch, n, pairs)

        angles = positions * self.inv_freq.to(x.device, torch.float32)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def axes_of_pairs(section: list[int], interleaved: bool) -> list[int]:
    """0, 1 or 2 (time, height, width) for each of `sum(section)` pairs."""
    if not interleaved:
        return [axis for axis, pairs in enumerate(section) for _ in range(pairs)]
    return [pair % 3 if pair < 3 * section[pair % 3] else 0 for pair in range(sum(section))]
