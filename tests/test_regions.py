"""Compiled regions against the same text run eagerly: results, gradients, and how often each is compiled."""

import logging
import shutil
from collections import Counter

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig

from hf_eagle import regions
from hf_eagle.benchmark.shapes import Shapes
from hf_eagle.benchmark.workload import Step, build_draft, chat_batch
from hf_eagle.drafts.layers import EagleMLP, EagleRMSNorm, Rotation
from hf_eagle.losses.fused_head import FusedHeadLoss, LossRows


compiler = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="nothing compiles C++ here")
CONFIG = LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2)
LLAMA = Shapes(48, 112, 3, 1, 16, 200, 150, 8)
LATENT = Shapes(48, 112, 4, 4, 8, 200, 150, 8, 24, 40, 12, 4, 12)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Graphs of each region, by its name; regions are compiled anew, with inductor unless the test says otherwise."""
    counted, compile_with = {}, torch.compile

    def compiled(function, dynamic):
        counter = counted[function.__name__] = CompileCounterWithBackend(counted.get("backend", "inductor"))
        return compile_with(function, backend=counter, dynamic=dynamic)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(regions, "_compiled", {})
    yield counted
    regions.compile_regions("auto")


def graphs(counted) -> dict[str, int]:
    return {name: counter.frame_count for name, counter in counted.items() if name != "backend"}


def norm(rows):
    x = torch.randn(rows, 24, requires_grad=True)
    module = EagleRMSNorm(24, eps=1e-5)
    return [y := module(x), *torch.autograd.grad((y * torch.randn(rows, 24)).sum(), [x, module.weight])]


def mlp(rows):
    x, module = torch.randn(rows, 24, requires_grad=True), EagleMLP(CONFIG)
    return [y := module(x), *torch.autograd.grad((y * torch.randn(rows, 24)).sum(), [x, *module.parameters()])]


def rotation(rows):
    x, (cos, sin) = torch.randn(rows, 3, 8, requires_grad=True), torch.randn(2, rows, 1, 8)
    y = Rotation.apply(x, cos, sin, True)
    return [y, *torch.autograd.grad((y * torch.randn(rows, 3, 8)).sum(), [x])]


def loss(name):
    def run(rows):
        probs = torch.randn(11, 40).softmax(-1)
        where, mass, share = torch.randint(0, 11, (rows,)), torch.rand(11) * 0.5 + 0.5, torch.rand(rows)
        seen = LossRows(name, probs, probs.argmax(-1), mass, where, torch.rand(rows), share)
        x, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
        total, losses, hits = FusedHeadLoss.apply(x, weight, seen, True)
        return [total, losses, hits, *torch.autograd.grad(total, [x, weight])]

    return run


REGIONS = {"norm": norm, "mlp": mlp, "rotation": rotation}
REGIONS |= {name: loss(name) for name in ("ce", "lk_alpha", "lk_lambda")}


@compiler
@pytest.mark.parametrize("name", REGIONS)
def test_a_compiled_region_equals_its_text_for_any_number_of_rows(name, counted):
    for rows in (7, 30, 1, 64):
        found = []
        for mode in ("off", "on"):
            regions.compile_regions(mode)
            torch.manual_seed(rows)
            found.append(REGIONS[name](rows))
        for eager, compiled in zip(*found, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert set(graphs(counted).values()) == {1}


@pytest.mark.parametrize("sizes", [LLAMA, LATENT], ids=["llama", "latent"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_run_makes_at_most_two_graphs_of_a_region(sizes, autocast, counted):
    """Batches of all sizes, in training and in evaluation."""
    counted["backend"] = "eager"
    regions.compile_regions("on")
    torch.manual_seed(0)
    draft = build_draft(sizes, torch.device("cpu"))
    step = Step(draft, None, 4, autocast)
    for rows, length in ((1, 64), (2, 48), (1, 200)):
        step.target.features = step.target.teacher = None
        batch = step.planned(chat_batch(sizes, rows, length, 0.5, 1, torch.device("cpu")))
        step.run_target(batch)
        step.forward(batch).backward()
        draft.eval()
        with torch.no_grad():
            step.forward(batch)
        draft.train()
    made = graphs(counted)
    assert set(made) == {"_norm", "_norm_backward", "_swiglu", "_swiglu_backward", "_judged"} | {
        *(("_rotated", "_rotated_back") if sizes is LLAMA else ())
    }
    assert max(made.values()) <= 2, list(made.items())


def test_a_compiler_that_fails_is_told_once_and_done_without(counted, caplog, monkeypatch):
    def fails(graph, inputs):
        raise OSError("no compiler")

    counted["backend"] = fails
    monkeypatch.setattr(regions, "_WITH_TRITON", ("cpu",))
    with caplog.at_level(logging.WARNING):
        torch.manual_seed(0)
        found = norm(7)
        mlp(7)
    regions.compile_regions("off")
    torch.manual_seed(0)
    for ours, eager in zip(found, norm(7), strict=True):
        assert torch.equal(ours, eager)
    assert Counter(record.name for record in caplog.records)["hf_eagle.regions"] == 1
    assert "The draft is trained uncompiled, and slower" in caplog.text


def test_nothing_is_compiled_on_a_cpu_unless_asked(counted):
    for mode in ("auto", "off"):
        regions.compile_regions(mode)
        norm(7)
    regions.compile_regions("on")
    with torch.no_grad():
        EagleRMSNorm(24).eval()(torch.randn(7, 24))  # a round of decoding
    assert not any(graphs(counted).values())
