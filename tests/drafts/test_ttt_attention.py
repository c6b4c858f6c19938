"""Every implementation of the TTT attention against one softmax written row by row: outputs and all gradients."""

import pytest
import torch

from hf_eagle.drafts.row_layout import RowLayout
from hf_eagle.drafts.ttt_attention import eager_ttt_attention, flash_ttt_attention, flex_ttt_attention, ttt_attention


# two sequences: two packed documents and padding; one document with padding on the left
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 14 + [-1] * 3, [-1] * 4 + [0] * 22])
# several spans a document, one at its first row, single rows, rows side by side with the next document's
ROWS = torch.tensor([0, 1, 4, 7, 8, 9, 10, 13, 14, 15, 20, 26 + 9, 26 + 10, 26 + 11, 26 + 25])
IMPLEMENTATIONS = {"eager": eager_ttt_attention, "sdpa": flash_ttt_attention}


def row_by_row(query, key, value, own_keys, own_values, layout, scaling):
    """Which keys a row sees is decided here from `DOCUMENTS` alone."""
    length, documents = DOCUMENTS.shape[1], DOCUMENTS.flatten()
    place_of = {flat: place for place, flat in enumerate(layout.keys.tolist())}
    groups, out = query.shape[1] // key.shape[1], []
    for n, row in enumerate(layout.rows.tolist()):
        first = row - row % length
        if layout.window is not None:
            first = max(first, row + len(own_keys) - layout.window + 1)
        seen = [place_of[j] for j in range(first, row + 1) if documents[j] == documents[row]]
        heads = []
        for head in range(query.shape[1]):
            k = torch.stack([*key[seen, head // groups], *(own[n, head // groups] for own in own_keys)])
            v = torch.stack([*value[seen, head // groups], *(own[n, head // groups] for own in own_values)])
            heads.append(torch.softmax(k @ query[n, head] * scaling, 0) @ v)
        out.append(torch.stack(heads))
    return torch.stack(out)


def random_inputs(layout, heads, kv_heads, key_dim, value_dim, steps, dtype=torch.float32):
    torch.manual_seed(0)
    n, k = len(layout.rows), len(layout.keys)
    shapes = [(n, heads, key_dim), (k, kv_heads, key_dim), (k, kv_heads, value_dim)]
    shapes += [(n, kv_heads, key_dim)] * steps + [(n, kv_heads, value_dim)] * steps
    # large scores, so that the softmax is far from flat
    return [(2 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


def run(function, layout, inputs, scaling):
    query, key, value, *own = inputs
    half = len(own) // 2
    out = function(query, key, value, own[:half], own[half:], layout, scaling)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad((out * weights).sum(), inputs)


def assert_alike(function, reference, layout, inputs, scaling, atol=2e-5):
    """Outputs and all gradients; returns the output."""
    (out, grads), (wanted, wanted_grads) = (run(each, layout, inputs, scaling) for each in (function, reference))
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=atol)
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (3, 1)])
def test_equals_one_softmax_row_by_row(implementation, steps, heads, kv_heads):
    layout = RowLayout.of(ROWS, DOCUMENTS)
    inputs = random_inputs(layout, heads, kv_heads, 16, 16, steps)
    assert_alike(IMPLEMENTATIONS[implementation], row_by_row, layout, inputs, 0.3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(24, 16), (16, 24)])
def test_key_and_value_widths_may_differ(implementation, key_dim, value_dim):
    """As in multi-head latent attention."""
    layout = RowLayout.of(ROWS, DOCUMENTS)
    inputs = random_inputs(layout, 2, 2, key_dim, value_dim, 2)
    found = assert_alike(IMPLEMENTATIONS[implementation], row_by_row, layout, inputs, 0.2)
    assert found.shape[-1] == value_dim


@pytest.mark.parametrize(("implementation", "few"), [("eager", 0), ("sdpa", 0), ("sdpa", 2**17)])
def test_bfloat16_is_as_exact_as_bfloat16_can_be(implementation, few, monkeypatch):
    """Blocks of few scores have their backward in float32, others in bfloat16."""
    monkeypatch.setattr("hf_eagle.drafts.flash_cpu._FEW_SCORES", few)
    layout = RowLayout.of(ROWS, DOCUMENTS)
    inputs = random_inputs(layout, 4, 2, 16, 16, 3, torch.bfloat16)
    out, grads = run(IMPLEMENTATIONS[implementation], layout, inputs, 0.1)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    wanted, wanted_grads = run(row_by_row, layout, exact, 0.1)
    assert out.dtype == grads[0].dtype == torch.bfloat16
    for ours, theirs in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize(("steps", "heads", "kv_heads", "value_dim"), [(0, 4, 2, 16), (3, 4, 2, 16), (2, 3, 1, 24)])
def test_flex_attention_equals_one_softmax_row_by_row(monkeypatch, steps, heads, kv_heads, value_dim):
    """PyTorch has the backward of the uncompiled form for every device, and only refuses to run it on a CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    layout = RowLayout.of(ROWS, DOCUMENTS)
    inputs = random_inputs(layout, heads, kv_heads, 16, value_dim, steps)
    assert_alike(flex_ttt_attention, row_by_row, layout, inputs, 0.3)


def test_the_blocks_of_flex_attention_are_those_that_hold_a_seen_key():
    """What the compiled form skips, and what it takes whole, against the mask written out."""
    documents = torch.tensor([[0] * 300 + [1] * 500 + [2] * 100 + [-1] * 60, [0] * 700 + [1] * 260])
    spans = [(20, 50), (100, 300), (320, 340), (700, 800), (960, 1640), (1900, 1920)]
    layout = RowLayout.of(torch.cat([torch.arange(*span) for span in spans]), documents)
    seen = layout.document_of_row[:, None] == layout.document_of_key
    seen &= layout.keys <= layout.rows[:, None]
    mask = layout.flex_mask(0).blocks
    found = {"some": torch.zeros(mask.kv_num_blocks.shape[-1], mask.kv_indices.shape[-1], dtype=torch.bool)}
    found["all"] = found["some"].clone()
    for name, counts, ids in (
        ("some", mask.kv_num_blocks, mask.kv_indices),
        ("all", mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            found[name][row, ids[0, 0, row, :count]] = True
    for row in range(found["all"].shape[0]):
        for column in range(found["all"].shape[1]):
            block = seen[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)]
            assert found["all"][row, column] == block.all()
            # a block may be looked into for nothing, but none that holds something may be left out
            assert found["all"][row, column] or found["some"][row, column] or not block.any()
    assert found["all"].any() and found["some"].any() and not (found["all"] | found["some"]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention has no backward on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_on_an_accelerator_equals_eager(dtype):
    layout = RowLayout.of(ROWS.cuda(), DOCUMENTS.cuda())
    inputs = [x.detach().cuda().requires_grad_() for x in random_inputs(layout, 4, 2, 64, 64, 3, dtype)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    (out, grads), (wanted, wanted_grads) = (
        run(flex_ttt_attention, layout, inputs, 0.1),
        run(eager_ttt_attention, layout, exact, 0.1),
    )
    for ours, theirs in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        assert (ours.float() - theirs).norm() < (0.02 if dtype == torch.bfloat16 else 1e-3) * theirs.norm()


def test_a_long_document_in_many_blocks_of_the_kernel():
    """Longer than any block that the kernel works in, with a span that begins far from the document's start."""
    documents = torch.zeros(1, 1500, dtype=torch.long)
    layout = RowLayout.of(torch.cat([torch.arange(100, 400), torch.arange(700, 1490)]), documents)
    inputs = random_inputs(layout, 2, 1, 16, 16, 2)
    assert_alike(flash_ttt_attention, eager_ttt_attention, layout, inputs, 0.25, atol=1e-4)


def test_the_layout_keeps_the_keys_that_are_seen_and_no_others():
    layout = RowLayout.of(ROWS, DOCUMENTS)
    length, documents = DOCUMENTS.shape[1], DOCUMENTS.flatten()
    seen = {j for row in ROWS.tolist() for j in range(row - row % length, row + 1) if documents[j] == documents[row]}
    assert layout.keys.tolist() == sorted(seen)
    assert layout.keys[layout.row_in_keys].tolist() == ROWS.tolist()
    # the blocks of all spans together hold every (row, key) pair once
    pairs = []
    for rows, blocks in layout.spans:
        for keys, causal in blocks:
            for n in range(rows.start, rows.stop):
                last = keys.start + n - rows.start + 1 if causal else keys.stop
                pairs += [(n, k) for k in range(keys.start, last)]
    wanted = [
        (n, k)
        for n, row in enumerate(ROWS.tolist())
        for k, key in enumerate(layout.keys.tolist())
        if row - row % length <= key <= row and documents[key] == documents[row]
    ]
    assert sorted(pairs) == wanted


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
@pytest.mark.parametrize("window", [3, 7, 16, 200])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "flex_attention"])
def test_a_window_equals_one_softmax_row_by_row(monkeypatch, implementation, window, steps):
    if steps >= window:
        pytest.skip("a window is wider than an unroll has steps")
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    layout = RowLayout.of(ROWS, DOCUMENTS, window)
    inputs = random_inputs(layout, 4, 2, 16, 16, steps)
    assert_alike(IMPLEMENTATIONS.get(implementation, flex_ttt_attention), row_by_row, layout, inputs, 0.3, atol=5e-5)


@pytest.mark.parametrize("window", [70, 300, 700, 1400])
@pytest.mark.parametrize("function", [flash_ttt_attention, flex_ttt_attention])
def test_a_window_in_long_documents(monkeypatch, function, window):
    """Runs of rows that begin behind their window, at its edge, and far from it; some blocks of keys are skipped."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    documents = torch.tensor([[0] * 200 + [1] * 1300])
    layout = RowLayout.of(torch.cat([torch.arange(100, 400), torch.arange(700, 1490)]), documents, window)
    inputs = random_inputs(layout, 2, 1, 16, 16, 2)
    assert_alike(function, eager_ttt_attention, layout, inputs, 0.25, atol=1e-4)


@pytest.mark.parametrize("window", [3, 7, 16, 200])
def test_the_layout_keeps_the_keys_inside_some_row_s_window_and_no_others(window):
    layout = RowLayout.of(ROWS, DOCUMENTS, window)
    length, documents = DOCUMENTS.shape[1], DOCUMENTS.flatten()
    seen = {
        j
        for row in ROWS.tolist()
        for j in range(max(row - row % length, row - window + 1), row + 1)
        if documents[j] == documents[row]
    }
    assert layout.keys.tolist() == sorted(seen)
    assert layout.keys[layout.row_in_keys].tolist() == ROWS.tolist()


def test_the_work_of_a_window_grows_with_the_length_and_not_with_its_square():
    def pairs(length):
        layout = RowLayout.of(torch.arange(length), torch.zeros(1, length, dtype=torch.long), window=256)
        blocks = [(rows, keys) for rows, blocks in layout.spans_at(1) for keys, _ in blocks]
        return sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in blocks)

    assert pairs(8192) < 1.3 * 8192 * 256
    assert pairs(16384) < 2.05 * pairs(8192)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="`attn_implementation` of a draft must be one of eager, sdpa, flex_attention"):
        ttt_attention("flash_attention_2", torch.device("cpu"))
