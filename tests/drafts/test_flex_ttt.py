"""`flex_attention` of a draft, compiled on a CPU in place of a GPU: how many graphs, and where it gives way."""

import pytest
import torch
from test_ttt_attention import random_inputs, run
from torch._dynamo.testing import CompileCounterWithBackend

from hf_eagle.benchmark.shapes import Shapes
from hf_eagle.benchmark.workload import Step, build_draft, chat_batch
from hf_eagle.drafts import flex_context, ttt_attention
from hf_eagle.drafts.flex_context import kernel_options, lengthened, why_not_flex
from hf_eagle.drafts.row_layout import RowLayout
from hf_eagle.drafts.ttt_attention import eager_ttt_attention, flex_ttt_attention


LLAMA = Shapes(64, 112, 4, 2, 16, 200, 150, 8)
LATENT = Shapes(48, 112, 4, 4, 8, 200, 150, 8, 24, 40, 12, 4, 12)
# rows, length and supervised share of batches: all rows supervised, few rows, one, as many blocks as heads
BATCHES = [(1, 300, 1.0), (1, 64, 0.5), (1, 3, 0.5), (2, 250, 0.6)]


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs of attention, compiled as on a GPU, but to operations that a CPU has."""
    torch._dynamo.reset()
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_context._attend, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex_context, "_kernel", lambda device_type: compiled)
    yield counter
    flex_context._failures.clear()
    flex_context.say_eager.cache_clear()


def layout_of(rows: torch.Tensor, length: int) -> RowLayout:
    """Rows of one sequence of documents of 70 tokens."""
    return RowLayout.of(rows, torch.arange(length)[None] // 70)


def gradients(loss: torch.Tensor, draft: torch.nn.Module) -> dict[str, torch.Tensor]:
    draft.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_eagle")]


# ---- how often ----


@pytest.mark.parametrize("sizes", [LLAMA, LATENT], ids=["llama", "latent"])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_batches_of_all_sizes_make_two_graphs(sizes, first, graphs):
    """Training and evaluation, whichever batch comes first; loss and gradients equal those of eager attention."""
    torch.manual_seed(0)
    draft = build_draft(sizes, torch.device("cpu"))
    step = Step(draft, None, 2)
    for rows, length, share in BATCHES[first:] + BATCHES[:first]:
        step.target.features = step.target.teacher = None
        batch = step.planned(chat_batch(sizes, rows, length, share, 1, torch.device("cpu")))
        step.run_target(batch)

        seen = []
        for step.attention in ("eager", "flex_attention"):
            loss = step.forward(batch)
            seen.append({"loss": loss.detach()} | gradients(loss, draft))
        for name, wanted in seen[0].items():
            torch.testing.assert_close(seen[1][name], wanted, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

        draft.eval()
        with torch.no_grad():
            torch.testing.assert_close(step.forward(batch), seen[0]["loss"], rtol=1e-4, atol=1e-5)
        draft.train()
    assert graphs.frame_count == 2


@pytest.mark.parametrize("trained", [(0,), (1, 2), (2,), (0, 1, 2), ()], ids=str)
def test_parts_that_are_not_trained_make_no_graph(trained, graphs):
    """With an adapter on some weights, the first step's queries or keys may depend on nothing that is trained."""
    layout = layout_of(torch.arange(20, 50), 300)
    run(flex_ttt_attention, layout, random_inputs(layout, 4, 2, 16, 16, 0), 0.3)
    layout = layout_of(torch.arange(10, 290), 300)
    parts = [x.requires_grad_(i in trained) for i, x in enumerate(random_inputs(layout, 4, 2, 16, 16, 0))]
    asked = [x for x in parts if x.requires_grad]

    out, wanted = (attend(*parts, [], [], layout, 0.3) for attend in (flex_ttt_attention, eager_ttt_attention))
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    if asked:
        for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), asked) for x in (out, wanted)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 255, 256, 300])
def test_few_rows_are_two_blocks(rows, graphs):
    """The added rows see what the last one sees, so that none sees nothing; the added keys are seen by none."""
    layout = layout_of(torch.arange(310 - rows, 310), 310)
    ids, blocks = layout.flex_mask(0).ids, layout.flex_mask(0).tensors.values()
    assert [len(x) for x in ids] == [max(256, len(x)) for x in (layout.rows, layout.rows, layout.keys, layout.keys)]
    assert min(size for x in blocks for size in x.shape[2:]) >= 2
    assert lengthened(torch.ones(rows, 2, 3)).shape == (max(256, rows), 2, 3)

    inputs = random_inputs(layout, 2, 1, 16, 16, 1)
    found, wanted = (run(attend, layout, inputs, 0.3) for attend in (flex_ttt_attention, eager_ttt_attention))
    for ours, theirs in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_own_keys_are_not_repeated_for_the_heads_of_a_group(graphs):
    layout, kept = layout_of(torch.arange(300), 300), []
    for steps in (1, 2):
        query, key, value, *own = random_inputs(layout, 8, 1, 16, 16, steps)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}),
            lambda x: x,
        ):
            flex_ttt_attention(query, key, value, own[:steps], own[steps:], layout, 0.3)
        kept.append(sum(sizes.values()))
    key_and_value, shares = 2 * 16, 2 * 8  # of a row: its own, and the weight that each head gives them
    assert kept[1] - kept[0] <= 4 * 300 * (key_and_value + shares)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="for the GPU's kernels; the twins are above")
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (192, 128)])
def test_on_a_gpu_batches_of_all_sizes_make_one_graph(key_dim, value_dim):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for rows in (300, 1, 40, 257):
        layout = layout_of(torch.arange(310 - rows, 310), 310).to("cuda")
        made = random_inputs(layout, 4, 4, key_dim, value_dim, 2, torch.bfloat16)
        inputs = [x.detach().cuda().requires_grad_() for x in made]
        exact = [x.detach().float().requires_grad_() for x in inputs]
        found, wanted = run(flex_ttt_attention, layout, inputs, 0.1), run(eager_ttt_attention, layout, exact, 0.1)
        for ours, theirs in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
            assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and not flex_context._failures


# ---- where it cannot run ----


@pytest.mark.parametrize(
    ("device", "key_dim", "value_dim", "why"),
    [
        ("cuda", 16, 16, None),
        ("cuda", 128, 128, None),
        ("cuda", 192, 128, None),
        ("cuda", 256, 16, None),
        ("xpu", 64, 64, None),
        ("cpu", 8, 8, None),
        ("cuda", 8, 8, "it needs heads of at least 16, and this draft's have 8"),
        ("cuda", 24, 12, "it needs heads of at least 16, and this draft's have 12"),
        ("xpu", 15, 64, "it needs heads of at least 16, and this draft's have 15"),
        ("cuda", 320, 64, "it takes heads of at most 256, and this draft's have 320"),
        ("mps", 64, 64, "it has no backward pass on mps"),
    ],
)
def test_heads_that_it_takes(device, key_dim, value_dim, why):
    assert why_not_flex(torch.device(device), key_dim, value_dim) == why


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_where_it_cannot_run_eager_does_and_one_line_says_so(implementation, graphs, monkeypatch, caplog):
    monkeypatch.setattr(flex_context, "why_not_flex", lambda device, *widths: f"it refuses {widths}")
    attend = ttt_attention.ttt_attention(implementation, torch.device("cuda"))
    layout = layout_of(torch.arange(20, 50), 80)
    inputs = random_inputs(layout, 4, 2, 8, 12, 1)
    shared = [inputs[0], *(ttt_attention.shared_by_steps(attend, x) for x in inputs[1:3])]

    for key, value in (inputs[1:3], shared[1:]):
        found = attend(inputs[0], key, value, [inputs[3]], [inputs[4]], layout, 0.3)
        assert torch.equal(found, run(eager_ttt_attention, layout, inputs, 0.3)[0])
    assert said(caplog) == [
        "The draft attends without `flex_attention`, slower and in quadratic memory: it refuses (8, 12)."
    ]


def test_what_does_not_compile_is_tried_once(graphs, monkeypatch, caplog):
    tried = []

    def fails(graph, inputs):
        tried.append(graph)
        raise RuntimeError("out of resource: shared memory")

    compiled = torch.compile(flex_context._attend, fullgraph=True, backend=fails)
    monkeypatch.setattr(flex_context, "_kernel", lambda device_type: compiled)
    monkeypatch.setattr(flex_context, "why_not_flex", lambda device, *widths: flex_context._failures.get(device.type))

    layout = layout_of(torch.arange(20, 50), 80)
    inputs = random_inputs(layout, 4, 2, 16, 16, 1)
    for _ in range(2):
        out, _ = run(flex_ttt_attention, layout, inputs, 0.3)
        assert torch.equal(out, run(eager_ttt_attention, layout, inputs, 0.3)[0])
    (line,) = said(caplog)
    assert "PyTorch does not compile it here (" in line and "shared memory" in line
    assert len(tried) == 1


def test_more_graphs_than_pytorch_keeps_are_said(graphs, caplog):
    """Rather than to run uncompiled, as PyTorch does, silently."""
    layout = layout_of(torch.arange(20, 50), 80)
    inputs = random_inputs(layout, 4, 2, 16, 16, 1)
    with torch._dynamo.config.patch(recompile_limit=1):
        run(flex_ttt_attention, layout, inputs, 0.3)
        with torch.no_grad():
            query, key, value, *own = inputs
            flex_ttt_attention(query, key, value, own[:1], own[1:], layout, 0.3)
    assert len(said(caplog)) == 1 and "PyTorch does not compile it here (" in caplog.text


# ---- blocks that fit ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(192, 128), (129, 64), (128, 192), (256, 256)])
def test_wide_heads_get_blocks_that_fit_shared_memory(key_dim, value_dim, dtype):
    """A query's block, and those of keys and values in as many stages, of widths rounded up to powers of two."""
    options = kernel_options(key_dim, value_dim, dtype)
    key_width, value_width = (2 ** (width - 1).bit_length() for width in (key_dim, value_dim))
    numbers = options["fwd_BLOCK_M"] * key_width
    numbers += options["fwd_num_stages"] * options["fwd_BLOCK_N"] * (key_width + value_width)
    assert numbers * dtype.itemsize <= 99 * 1024
    assert all(x <= 32 for name, x in options.items() if name.startswith("bwd_BLOCK"))


@pytest.mark.parametrize("width", [16, 64, 80, 128])
def test_other_heads_get_the_blocks_that_pytorch_chooses(width):
    assert kernel_options(width, width, torch.bfloat16) == {}


def test_latent_heads_as_wide_as_deepseeks(graphs):
    layout = layout_of(torch.arange(20, 50), 80)
    inputs = random_inputs(layout, 2, 2, 192, 128, 1)
    found, wanted = (run(attend, layout, inputs, 0.05) for attend in (flex_ttt_attention, eager_ttt_attention))
    for ours, theirs in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
