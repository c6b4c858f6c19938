"""Products with few rows are the products of `linear`, and the layers are given back as they were."""

import pytest
import torch
from chain_models import make_target
from torch import nn
from torch.nn.functional import linear

from hf_eagle.targets.few_rows import MOST_ROWS, few_rows_linear, few_rows_products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, MOST_ROWS, MOST_ROWS + 1, 40])
def test_equals_linear(rows, bias):
    generator = torch.Generator().manual_seed(rows)
    weight, offset = torch.randn(48, 32, generator=generator), torch.randn(48, generator=generator)
    x = torch.randn(1, rows, 32, generator=generator)
    with torch.no_grad():
        found = few_rows_linear(x, weight, offset if bias else None)
    assert found.shape == (1, rows, 48) and found.is_contiguous()
    torch.testing.assert_close(found, linear(x, weight, offset if bias else None), rtol=1e-5, atol=1e-5)


def test_other_types_and_gradients_go_the_usual_way():
    weight, x = torch.randn(8, 4, requires_grad=True), torch.randn(2, 4)
    assert torch.equal(few_rows_linear(x, weight), linear(x, weight)) and few_rows_linear(x, weight).requires_grad
    with torch.no_grad():
        low = (x.bfloat16(), weight.bfloat16())
        assert torch.equal(few_rows_linear(*low), linear(*low))
        assert few_rows_linear(x[:0], weight).shape == (0, 8)


def test_layers_are_changed_inside_only_and_wrapped_ones_never():
    model = make_target().model
    wrapped = model.model.layers[0].mlp.gate_proj
    wrapped.forward = wrapped_forward = nn.Linear.forward.__get__(wrapped)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(RuntimeError, match="leave"), few_rows_products(model):
            changed = [m for m in model.modules() if "forward" in m.__dict__]
            inside = model(ids).logits
            raise RuntimeError("leave")
        assert torch.equal(model(ids).logits, before)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(changed) == len(linears) > 4
    assert [m for m in model.modules() if "forward" in m.__dict__] == [wrapped]
    assert wrapped.forward is wrapped_forward
    torch.testing.assert_close(inside, before, rtol=1e-4, atol=1e-4)
