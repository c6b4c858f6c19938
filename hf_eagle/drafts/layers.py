"""The parts of every draft's layer; norm and MLP keep only what the backward pass cannot recompute cheaply.

The unroll holds every step's activations at once, so they decide its memory. Results and parameters are those of
`LlamaRMSNorm` and `LlamaMLP`.
"""

import torch
from torch import nn
from torch.nn.functional import linear, silu
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class EagleRMSNorm(LlamaRMSNorm):
    """`x / rms(x) * weight` over the last dimension, computed in float32; keeps `x` and one number a row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon)


class EagleMLP(LlamaMLP):
    """SwiGLU; keeps the two projections and recomputes their product in the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if type(self.down_proj) is not nn.Linear:  # an adapter is more than its weight
            return self.down_proj(silu(gate) * up)

        return _DownOfSwiGLU.apply(gate, up, self.down_proj.weight)


class DraftLayer(nn.Module):
    """Attention and MLP with their residuals; a subclass adds what comes before attention.

    Args:
        config: the draft's.
        attention ([`DraftAttention`]): over inputs of the subclass's width.
    """

    def __init__(self, config, attention: nn.Module):
        super().__init__()
        self.self_attn = attention
        self.post_attention_layernorm = EagleRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = EagleMLP(config)

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Residual of the UN-normed `(..., hidden)` around attention `(..., heads, value_dim)`, then the MLP."""
        hidden = hidden + self.self_attn.o_proj(attended.flatten(-2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()

        d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_x = None
        if ctx.needs_input_grad[0]:
            d_normed = grad * weight
            mean = torch.linalg.vecdot(d_normed, normed).div_(x.shape[-1])[..., None]
            d_x = d_normed.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype)

        return d_x, d_weight, None


class _DownOfSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        with torch.autocast(gate.device.type, enabled=False):
            # the projections already have autocast's dtype, and autocast would keep a copy of the weight
            return linear(silu(gate).mul_(up), weight.to(gate.dtype))

    @staticmethod
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        gated = silu(gate)
        d_product = grad @ weight.to(grad.dtype)

        d_weight = None
        if ctx.needs_input_grad[2]:
            d_weight = (grad.flatten(0, -2).T @ (gated * up).flatten(0, -2)).to(weight.dtype)

        d_gate = torch.ops.aten.silu_backward(d_product * up, gate)
        return d_gate, d_product.mul_(gated), d_weight
