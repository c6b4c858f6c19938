"""The parts of every draft's layer; norm and MLP keep only what the backward pass cannot recompute cheaply.

The unroll holds every step's activations at once, so they decide its memory. Results and parameters are those of
`LlamaRMSNorm` and `LlamaMLP`.
"""

import torch
from torch import nn
from torch.nn.functional import linear, silu
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, rotate_half

from ..regions import region


class EagleRMSNorm(LlamaRMSNorm):
    """`x / rms(x) * weight` over the last dimension, computed in float32; keeps `x` and one number a row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon, self.training)


class EagleMLP(LlamaMLP):
    """SwiGLU; keeps the two projections and recomputes their product in the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if type(self.down_proj) is not nn.Linear:  # an adapter is more than its weight
            return self.down_proj(silu(gate) * up)

        return _DownOfSwiGLU.apply(gate, up, self.down_proj.weight, self.training)


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
    def forward(ctx, x, weight, eps, training):
        normed, scale = _norm(x.reshape(-1, x.shape[-1]), weight, eps, training=training)
        ctx.save_for_backward(x, weight, scale)
        return normed.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        d_x, d_weight = _norm_backward(*(t.reshape(-1, t.shape[-1]) for t in (x, grad)), weight, scale)
        return d_x.view(x.shape), d_weight, None, None


@region
def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `(rows, width)`: the normed rows, and the factor of each, `(rows, 1)`."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype), scale


@region
def _norm_backward(x, grad, weight, scale) -> tuple[torch.Tensor, torch.Tensor]:
    normed, grad = x.float() * scale, grad.float()
    product = grad * normed
    d_weight = product.sum(0).to(weight.dtype)

    mean = product.mul_(weight).mean(-1, keepdim=True)
    return (grad * weight).addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), d_weight


class _DownOfSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight, training):
        ctx.save_for_backward(gate, up, weight)
        with torch.autocast(gate.device.type, enabled=False):
            # the projections already have autocast's dtype, and autocast would keep a copy of the weight
            return linear(_swiglu(gate, up, training=training), weight.to(gate.dtype))

    @staticmethod
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        product, d_gate, d_up = _swiglu_backward(grad @ weight.to(grad.dtype), gate, up)

        d_weight = None
        if ctx.needs_input_grad[2]:
            d_weight = (grad.flatten(0, -2).T @ product.flatten(0, -2)).to(weight.dtype)
        return d_gate, d_up, d_weight, None


@region
def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate).mul_(up)


@region
def _swiglu_backward(d_product: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The product, and the gradients of its factors."""
    gated = silu(gate)
    d_gate = torch.ops.aten.silu_backward(d_product * up, gate)
    return gated * up, d_gate, d_product.mul_(gated)


class Rotation(torch.autograd.Function):
    """RoPE of `(..., heads, dim)` by tables `(..., 1, dim)`, which are not trained."""

    @staticmethod
    def forward(ctx, x, cos, sin, training):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, training=training)

    @staticmethod
    def backward(ctx, grad):
        return _rotated_back(grad, *ctx.saved_tensors), None, None, None


@region
def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + rotate_half(x) * sin


@region
def _rotated_back(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return grad * cos - rotate_half(grad * sin)
