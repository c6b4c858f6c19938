"""The draft's norm and MLP against those of transformers, whose parameters they have: results and gradients."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from hf_eagle.drafts.layers import EagleMLP, EagleRMSNorm


CONFIG = LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2)
PAIRS = {
    "norm": lambda: (EagleRMSNorm(24, eps=1e-5), LlamaRMSNorm(24, eps=1e-5)),
    "mlp": lambda: (EagleMLP(CONFIG), LlamaMLP(CONFIG)),
}


def pair(name):
    torch.manual_seed(0)
    ours, theirs = PAIRS[name]()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(3, 7, 24, requires_grad=True)


def run(module, x, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("name", PAIRS)
def test_equal_in_float32(name):
    ours, theirs, x = pair(name)
    for a, b in zip(run(ours, x), run(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_near_under_autocast_with_gradients_in_float32(name):
    ours, theirs, x = pair(name)
    exact = run(theirs, x)
    for a, b in zip(run(ours, x, autocast=True), exact, strict=True):
        assert (a.float() - b).norm() < 0.02 * b.norm()
    assert all(gradient.dtype == torch.float32 for gradient in run(ours, x, autocast=True)[1:])


def test_the_norm_of_bfloat16_rounds_once():
    ours, _, x = pair("norm")
    half = x.detach().bfloat16()
    exact = LlamaRMSNorm.forward(ours, half.float())
    assert ours(half).dtype == torch.bfloat16
    torch.testing.assert_close(ours(half), exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_less_is_kept_than_transformers_keeps(name):
    kept = []
    *modules, x = pair(name)
    for module in modules:
        weights, numbers = {p.data_ptr() for p in module.parameters()}, []

        def keep(t, weights=weights, numbers=numbers):
            numbers.append(0 if t.data_ptr() in weights else t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            module(x)
        kept.append(sum(numbers))
    assert kept[0] < 0.7 * kept[1]
