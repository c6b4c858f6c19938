"""The fused head and loss against logits of all rows at once and autograd: losses, hits, and both gradients."""

from collections import defaultdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hf_eagle.losses import fused_head as fused_loss
from hf_eagle.losses.fused_head import FusedHeadLoss, LossRows, StreamedRows, acceptance_rates


aten = torch.ops.aten
ROWS, PLACES, VOCAB, HIDDEN = 23, 11, 40, 16


@pytest.fixture(params=[7, 3000, 2**20])
def elements(request, monkeypatch):
    """Chunks and blocks of one row, of some, of all."""
    monkeypatch.setattr(fused_loss, "CHUNK_ELEMENTS", 2 * request.param)
    monkeypatch.setattr(fused_loss, "BLOCK_ELEMENTS", request.param)


def rows_to_judge(loss: str) -> tuple[torch.Tensor, torch.Tensor, LossRows]:
    torch.manual_seed(0)
    probs = torch.randn(PLACES, VOCAB).mul(2).softmax(-1)
    rows = LossRows(
        loss=loss,
        probs=probs,
        argmax=probs.argmax(-1),
        mass=None if loss == "ce" else torch.rand(PLACES) * 0.5 + 0.5,
        where=torch.randint(0, PLACES, (ROWS,)),
        factor=torch.rand(ROWS),
        ce_share=torch.rand(ROWS) if loss == "lk_lambda" else None,
    )
    return torch.randn(ROWS, HIDDEN).requires_grad_(), torch.randn(VOCAB, HIDDEN).requires_grad_(), rows


def plain(normed, weight, rows):
    logits = normed @ weight.T
    log_q = logits.log_softmax(-1)
    p = rows.probs[rows.where]
    ce = -(p * log_q).sum(-1)
    alpha = None
    if rows.loss != "ce":
        alpha = torch.minimum(p * rows.mass[rows.where, None], log_q.exp()).sum(-1)
    losses = {
        "ce": lambda: ce,
        "lk_alpha": lambda: -alpha.log(),
        "lk_lambda": lambda: rows.ce_share * ce + (1 - rows.ce_share) * (1 - alpha),
    }[rows.loss]()
    return (losses * rows.factor).sum(), losses, logits.argmax(-1) == rows.argmax[rows.where], alpha


@pytest.mark.parametrize("loss", ["ce", "lk_alpha", "lk_lambda"])
def test_losses_hits_and_gradients_equal_autograd(loss, elements):
    normed, weight, rows = rows_to_judge(loss)
    total, losses, hits = FusedHeadLoss.apply(normed, weight, rows, True)
    grads = torch.autograd.grad(3 * total, (normed, weight))
    wanted, wanted_losses, wanted_hits, alpha = plain(normed, weight, rows)
    wanted_grads = torch.autograd.grad(3 * wanted, (normed, weight))
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(losses, wanted_losses)
    assert hits.tolist() == wanted_hits.tolist()
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    if alpha is not None:
        torch.testing.assert_close(acceptance_rates(normed, weight, rows), alpha)


@pytest.mark.parametrize("loss", ["ce", "lk_alpha", "lk_lambda"])
def test_autocast_is_near_and_keeps_gradients_in_float32(loss):
    normed, weight, rows = rows_to_judge(loss)
    rows.probs = rows.probs.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        total, losses, _ = FusedHeadLoss.apply(normed, weight, rows, True)
    grads = torch.autograd.grad(total, (normed, weight))
    wanted, wanted_losses, *_ = plain(normed, weight, rows)
    wanted_grads = torch.autograd.grad(wanted, (normed, weight))
    assert (losses - wanted_losses).abs().mean() < 0.02 * wanted_losses.mean()
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("loss", ["ce", "lk_alpha", "lk_lambda", "streamed"])
def test_of_equal_logits_the_first_one_is_the_drafts_choice(loss, half, elements):
    """Many tokens share a row of the head, so that nearly every row has a tie: a hit is what an argmax says."""
    normed, weight, rows = rows_to_judge("ce" if loss == "streamed" else loss)
    weight = weight.detach()[torch.randint(0, 6, (VOCAB,))]
    if loss == "streamed":
        hidden = torch.randn(PLACES, HIDDEN)
        wanted = (hidden @ weight.T).argmax(-1)
        rows = StreamedRows(hidden, lambda h: h @ weight.T, rows.where, rows.factor)
    else:
        # the best logit of a row that looks at this place, wherever it stands
        seen = torch.zeros(PLACES, dtype=torch.long).scatter(0, rows.where, torch.arange(ROWS))
        logits = (normed @ weight.T)[seen]
        best = (logits == logits.amax(-1, keepdim=True)).float()
        wanted = rows.argmax = torch.multinomial(best, 1)[:, 0]

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        _, _, hits = FusedHeadLoss.apply(normed, weight, rows, True)
        logits = torch.nn.functional.linear(normed, weight)
    assert logits.dtype == (torch.bfloat16 if half else torch.float32)
    tied = (logits == logits.amax(-1, keepdim=True)).sum(-1) > 1
    assert tied.float().mean() > 0.5
    assert hits.tolist() == (logits.argmax(-1) == wanted[rows.where]).tolist()
    as_good = logits.gather(1, wanted[rows.where, None])[:, 0] >= logits.amax(-1)
    assert loss == "streamed" or as_good.sum() > hits.sum()


def test_a_frozen_head_gets_no_gradient():
    normed, weight, rows = rows_to_judge("ce")
    weight.requires_grad_(False)
    total, *_ = FusedHeadLoss.apply(normed, weight, rows, True)
    total.backward()
    assert weight.grad is None and normed.grad.abs().sum() > 0


def test_no_tensor_of_all_rows_and_the_vocabulary_is_made(monkeypatch):
    monkeypatch.setattr(fused_loss, "CHUNK_ELEMENTS", 4 * VOCAB)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                t.shape[0]
                for t in (out if isinstance(out, tuple) else (out,))
                if isinstance(t, torch.Tensor) and t.dim() == 2 and t.shape[1] == VOCAB
            )
            return out

    normed, weight, rows = rows_to_judge("ce")
    with Sizes():
        FusedHeadLoss.apply(normed, weight, rows, True)[0].backward()
    assert set(sizes) <= {4, ROWS % 4, HIDDEN}  # chunks, the last one, and the head itself


@pytest.mark.parametrize("transform", [None, lambda logits: 3 * torch.tanh(logits / 3)], ids=["plain", "soft_cap"])
def test_distributions_made_chunk_by_chunk_equal_held_ones(transform, elements):
    normed, weight, rows = rows_to_judge("ce")
    weight.requires_grad_(False)
    hidden = torch.randn(PLACES, HIDDEN)
    probs = (hidden @ weight.T).softmax(-1)
    streamed = StreamedRows(hidden, lambda h: h @ weight.T, rows.where, rows.factor, transform)
    total, losses, hits = FusedHeadLoss.apply(normed, weight, streamed, True)
    (gradient,) = torch.autograd.grad(2 * total, normed)

    logits = normed @ weight.T if transform is None else transform(normed @ weight.T)
    ce = -(probs[rows.where] * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(losses, ce)
    assert hits.tolist() == (logits.argmax(-1) == probs.argmax(-1)[rows.where]).tolist()
    (wanted,) = torch.autograd.grad(2 * (ce * rows.factor).sum(), normed)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


# ---- on an accelerator ----

GIB = 2**30


@pytest.mark.parametrize(
    ("columns", "memory", "rows"),
    [
        (32_000, 141 * GIB, 4096),
        (32_000, 40 * GIB, 4096),
        (32_000, 24 * GIB, 3145),
        (152_000, 141 * GIB, 3890),
        (152_000, 80 * GIB, 2207),
        (152_000, 16 * GIB, 441),
        (262_144, GIB, 128),  # never fewer than on a CPU
        (2**26, GIB, 1),
    ],
)
def test_a_chunk_grows_with_the_memory_of_an_accelerator(columns, memory, rows):
    assert fused_loss.chunk_rows(columns, memory) == rows
    assert fused_loss.chunk_rows(columns, None) == max(1, fused_loss.CHUNK_ELEMENTS // columns) <= rows


class Uses(TorchDispatchMode):
    """Which operations read or write the values of each storage."""

    def __init__(self):
        super().__init__()
        self.of = defaultdict(list)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view and function is not aten.empty_like.default:
            seen = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs, out)) if isinstance(x, torch.Tensor)}
            for storage in seen:
                self.of[storage].append(function)
        return out


def use_of_the_heads_gradient(columns: int, half: bool) -> list:
    """What a step of 22,000 rows does with the head's gradient; of the tensors there are only shapes."""
    with FakeTensorMode(), Uses() as uses, torch.autocast("cpu", torch.bfloat16, enabled=half):
        normed, weight = (torch.empty(n, 4096, requires_grad=True) for n in (22_000, columns))
        probs = torch.empty(9_000, columns, dtype=torch.bfloat16 if half else torch.float32)
        argmax, where = (torch.empty(n, dtype=torch.long) for n in (9_000, 22_000))
        rows = LossRows("ce", probs, argmax, None, where, torch.empty(22_000))
        FusedHeadLoss.apply(normed, weight, rows, True)[0].backward()
        return uses.of[weight.grad.untyped_storage()._cdata]


@pytest.mark.parametrize("columns", [32_000, 152_000])
@pytest.mark.parametrize(
    ("half", "adds", "product"),
    [(False, None, aten.addmm_.default), (True, True, aten.addmm.dtype_out), (True, False, aten.add_.Tensor)],
    ids=["float32", "bfloat16", "bfloat16_without_such_products"],
)
def test_the_heads_gradient_is_passed_over_a_few_times_and_never_copied(columns, half, adds, product, monkeypatch):
    monkeypatch.setattr(fused_loss, "memory_of", lambda device: 79 * GIB)
    monkeypatch.setattr(fused_loss, "BLOCK_ELEMENTS", 2**31)
    monkeypatch.setattr(fused_loss, "_adds_to_float32", lambda device, dtype: adds)
    if adds and torch.__version__ < "2.10":  # compared as versions
        pytest.skip("such products came with torch 2.10")
    used = use_of_the_heads_gradient(columns, half)
    chunks = -(-22_000 // fused_loss.chunk_rows(columns, 79 * GIB))
    first = [] if adds is not False else [aten.copy_.default]
    assert used == [*first, *[product] * (chunks - len(first)), aten.mul_.Tensor]
    assert len(used) <= 12


def test_a_device_that_cannot_add_to_float32_says_so():
    assert not fused_loss._adds_to_float32(torch.device("cpu"), torch.bfloat16)


def test_a_second_backward_is_refused():
    normed, weight, rows = rows_to_judge("ce")
    total, *_ = FusedHeadLoss.apply(normed, weight, rows, True)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the draft again instead of a second `backward`"):
        total.backward()


@pytest.mark.parametrize("loss", ["ce", "lk_alpha", "lk_lambda"])
def test_gradients_of_float16_equal_autograd_behind_a_loss_scaler(loss):
    """Each row is one of 40,000, so that its gradient is too small for float16 until the backward pass brings the
    scaler's factor, which itself is too large for float16."""
    normed, weight, rows = rows_to_judge(loss)
    normed, rows.factor = normed.detach().half().requires_grad_(), rows.factor.add(0.5) / 40_000
    with torch.autocast("cpu", torch.float16):
        total, *_ = FusedHeadLoss.apply(normed, weight, rows, True)
    grads = torch.autograd.grad(2.0**16 * total, (normed, weight))
    exact = normed.detach().float().requires_grad_()
    wanted = torch.autograd.grad(2.0**16 * plain(exact, weight, rows)[0], (exact, weight))
    for ours, theirs in zip(grads, wanted, strict=True):
        assert (ours.float() - theirs).norm() < 0.003 * theirs.norm()
