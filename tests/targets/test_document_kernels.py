"""One kernel for all documents of a batch against one a document, which stays the reference; graphs of a target."""

import logging
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_varlen import older_varlen, plain_varlen
from tiny import pad_batch, random_chats, tiny_llama
from tiny_families import tiny_family
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import MistralConfig, MistralForCausalLM

from hf_eagle import EagleDataCollator, FrozenTarget, pack_dataset
from hf_eagle.targets import document_kernels
from hf_eagle.targets.document_kernels import attend_documents, needs_own_keys


HALF = (torch.bfloat16, torch.float16)
FAMILIES = ("llama", "qwen3", "sliding", "deepseek-v3")
KERNELS = {"2.11": older_varlen, "newer": plain_varlen}


@pytest.fixture
def one_kernel(monkeypatch):
    """Counts calls of the kernel for all documents, which a CPU has for once, for float32 too."""
    calls = []

    def counted(*args, **options):
        calls.append(options)
        return plain_varlen(*args, **options)

    counted.__signature__ = document_kernels.inspect.signature(plain_varlen)
    monkeypatch.setattr(document_kernels, "_WITH_VARLEN", ("cpu",))
    monkeypatch.setattr(document_kernels, "_HALF", (*HALF, torch.float32))
    monkeypatch.setattr(document_kernels, "_failed", False)
    monkeypatch.setattr(document_kernels, "_varlen", lambda: counted)
    return calls


def rows_of(bounds, heads, kv_heads, key_dim, value_dim, dtype=torch.float32) -> list[torch.Tensor]:
    generator, tokens = torch.Generator().manual_seed(bounds[-1]), bounds[-1]
    shapes = (heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim)
    return [(2 * torch.randn(1, count, tokens, width, generator=generator)).to(dtype) for count, width in shapes]


def one_by_one(query, key, value, window) -> torch.Tensor:
    """A document alone, with all scores: `(heads, length, dim)`."""
    key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], 0) for x in (key, value))
    places = torch.arange(query.shape[1])
    behind = places[:, None] - places
    hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
    return (query @ key.transpose(1, 2) * 0.3).masked_fill(hidden, float("-inf")).softmax(-1) @ value


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(
    LENGTHS,
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
    st.sampled_from([None, 1, 2, 5]),
    st.sampled_from([8, 16, 24]),
)
def test_each_way_is_a_document_alone(lengths, kv_heads, group, window, value_dim):
    bounds = [0, *accumulate(lengths)]
    query, key, value = rows_of(bounds, kv_heads * group, kv_heads, 16, value_dim)
    wanted = torch.cat(
        [one_by_one(*(x[0][:, start:stop] for x in (query, key, value)), window) for start, stop in pairwise(bounds)], 1
    ).transpose(0, 1)[None]
    there = torch.tensor(bounds, dtype=torch.int32)

    ways = {"one by one": {}, "with own keys": {"needs_own_keys": lambda *args, **options: True}}
    for name, kernel in KERNELS.items():
        ways[name] = {"_WITH_VARLEN": ("cpu",), "_HALF": (torch.float32,), "_varlen": lambda kernel=kernel: kernel}
    for way, patched in ways.items():
        with pytest.MonkeyPatch.context() as patch:
            for name, x in patched.items():
                patch.setattr(document_kernels, name, x)
            found = attend_documents(query, key, value, bounds, there, 0.3, window)
            compiled = document_kernels.attend_documents_compiled(
                query, key, value, torch.tensor(bounds), there, 0.3, window
            )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, way=way: f"{way}: {m}")
        assert torch.equal(compiled, found) and compiled.is_contiguous()
        assert not document_kernels._failed


def test_what_a_graph_holds_of_it_has_the_shape_of_its_result():
    arguments = *rows_of([0, 3, 8], 4, 2, 16, 8), torch.tensor([0, 3, 8]), torch.tensor([0, 3, 8], dtype=torch.int32)
    torch.library.opcheck(document_kernels.attend_documents_compiled, (*arguments, 0.3, None))


# ---- which of them ----


@pytest.mark.parametrize(
    ("device", "dtype", "width", "at_once"),
    [
        ("cuda", torch.bfloat16, 128, True),
        ("cuda", torch.float16, 64, True),
        ("cuda", torch.bfloat16, 192, True),
        ("cuda", torch.float32, 128, False),
        ("cuda", torch.bfloat16, 20, False),
        ("cuda", torch.bfloat16, 512, False),
        ("cpu", torch.bfloat16, 128, False),
        ("xpu", torch.bfloat16, 128, False),
        ("mps", torch.float16, 128, False),
    ],
)
@pytest.mark.parametrize("kernel", [None, plain_varlen])
def test_one_kernel_is_chosen_by_device_and_heads(device, dtype, width, at_once, kernel, monkeypatch):
    monkeypatch.setattr(document_kernels, "_varlen", lambda: kernel)
    query = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 4, 7, width))
    assert document_kernels._takes_varlen(query, query, query) == (at_once and kernel is not None)


@pytest.mark.parametrize(
    ("key", "value", "at_once"),
    [
        ({}, {}, True),
        ({"heads": 2}, {"heads": 2}, True),
        ({"heads": 3}, {"heads": 3}, False),
        ({"heads": 2}, {"heads": 4}, False),
        ({"dtype": torch.float32}, {}, False),
        ({}, {"dtype": torch.float32}, False),
        ({}, {"dtype": torch.float16}, False),
        ({"width": 128}, {}, False),
        ({}, {"width": 128}, False),
        ({}, {"width": 32}, False),
    ],
)
def test_one_kernel_is_for_keys_and_values_like_the_queries(key, value, at_once, monkeypatch):
    monkeypatch.setattr(document_kernels, "_varlen", lambda: plain_varlen)

    def rows(heads=4, width=64, dtype=torch.bfloat16):
        return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, heads, 7, width))

    assert document_kernels._takes_varlen(rows(), rows(**key), rows(**value)) == at_once


def test_pytorchs_kernel_takes_what_it_is_given():
    """Of the version that is installed: by name and by kind, since only a GPU runs it."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="PyTorch 2.9 has none")
    known = document_kernels.inspect.signature(varlen.varlen_attn).parameters
    if document_kernels._varlen() is None:
        assert "window_size" not in known
        return
    wanted = document_kernels.inspect.signature(older_varlen).parameters
    assert {name: x.kind for name, x in wanted.items()} == {name: known[name].kind for name in wanted}


@pytest.mark.parametrize("problem", [RuntimeError("no such kernel\nat line 3"), NotImplementedError("not here")])
def test_a_kernel_that_fails_is_done_without(problem, one_kernel, monkeypatch, caplog):
    tried = []

    def fails(*args, **options):
        tried.append(args)
        raise problem

    monkeypatch.setattr(document_kernels, "_varlen", lambda: fails)
    bounds = [0, 3, 8]
    rows, there = rows_of(bounds, 4, 2, 16, 8), torch.tensor(bounds, dtype=torch.int32)
    first, second = (attend_documents(*rows, bounds, there, 0.3, None) for _ in range(2))
    monkeypatch.setattr(document_kernels, "_WITH_VARLEN", ())
    assert torch.equal(first, second) and torch.equal(first, attend_documents(*rows, bounds, there, 0.3, None))
    assert len(tried) == 1 and len(caplog.records) == 1
    assert "The target attends once a document, and slower" in caplog.text


def test_a_device_without_memory_is_no_reason_to_change(one_kernel, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(document_kernels, "_varlen", lambda: full)
    rows = rows_of([0, 3, 8], 4, 2, 16, 8)
    with pytest.raises(torch.OutOfMemoryError):
        attend_documents(*rows, [0, 3, 8], torch.tensor([0, 3, 8], dtype=torch.int32), 0.3, None)
    assert not document_kernels._failed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no kernel for all documents; its twin is above")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (192, 128)])
def test_pytorchs_kernel_is_a_document_alone(key_dim, value_dim, window):
    bounds = [0, 3, 260, 261, 400]
    rows = [x.cuda() for x in rows_of(bounds, 4, 2, key_dim, value_dim, torch.bfloat16)]
    if not document_kernels._takes_varlen(rows[0], rows[1], rows[1]):  # values get the width of keys
        pytest.skip("this version of PyTorch has no kernel for all documents")
    there = torch.tensor(bounds, dtype=torch.int32).cuda()
    found = attend_documents(*rows, bounds, there, 0.1, window).float()
    wanted = attend_documents(*(x.float() for x in rows), bounds, there, 0.1, window)
    assert not document_kernels._failed
    assert (found - wanted).norm() < 0.02 * wanted.norm()


# ---- whole targets ----


def target_of(family: str) -> FrozenTarget:
    torch.manual_seed(0)
    if family != "sliding":
        return FrozenTarget(tiny_llama(layers=3) if family == "llama" else tiny_family(family), [0, 1, 2])
    sizes = {name: getattr(tiny_llama().config, name) for name in ("vocab_size", "hidden_size", "pad_token_id")}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(**sizes, **heads, intermediate_size=48, sliding_window=4, initializer_range=0.2)
    return FrozenTarget(MistralForCausalLM(config), [0, 1, 2])


def packed(chats: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    rows = pack_dataset(Dataset.from_list(random_chats(chats, seed=seed)), length)
    return EagleDataCollator(0)(list(rows))


def seen_by(target: FrozenTarget, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {
        name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "documents") if name in batch
    }
    features, kept = target(**inputs), batch["attention_mask"].bool()
    return torch.cat([features.taps[kept], features.last_hidden[kept]], dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["packed", "padded"])
def test_a_layer_is_one_kernel(family, form, request):
    target = target_of(family)
    batch = packed(9, 48, 3) if form == "packed" else pad_batch(random_chats(3, seed=3))
    wanted = seen_by(target, batch)
    calls = request.getfixturevalue("one_kernel")
    torch.testing.assert_close(seen_by(target, batch), wanted, rtol=1e-4, atol=1e-5)
    assert len(calls) == target.num_layers


@pytest.mark.parametrize(
    ("family", "way"),
    [("llama", "one by one"), ("llama", "one kernel"), ("sliding", "one by one"), ("sliding", "one kernel")],
)
def test_a_compiled_target_has_one_graph_for_all_documents(family, way, request):
    """Of many documents or one, of one length or of several, packed and padded."""
    if way == "one kernel":
        request.getfixturevalue("one_kernel")
    torch._dynamo.reset()
    plain, compiled = target_of(family), target_of(family)
    counter = CompileCounterWithBackend("eager")
    compiled.compile(backend=counter)

    indices = torch.arange(12).expand(2, -1)
    even = {"input_ids": indices + 5, "attention_mask": torch.ones_like(indices), "documents": indices // 4}
    batches = [
        packed(9, 48, 0),
        packed(3, 80, 1),
        even,
        packed(2, 100, 3),
        pad_batch(random_chats(3)),
        packed(20, 48, 4),
    ]
    for batch in batches:
        torch.testing.assert_close(seen_by(compiled, batch), seen_by(plain, batch), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# ---- float32 on a GPU ----


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "needed"),
    [
        ("cuda", torch.float32, False, True),
        ("cuda", torch.bfloat16, False, False),
        ("cuda", torch.bfloat16, True, True),
        ("cpu", torch.float32, True, False),
    ],
)
def test_where_groups_of_heads_cannot_share_keys(device, dtype, masked, needed):
    assert needs_own_keys(torch.device(device), dtype, masked) == needed


@pytest.mark.parametrize("shared", [True, False])
def test_groups_get_keys_of_their_own_where_sharing_is_quadratic(shared, monkeypatch):
    """PyTorch's fused kernels are then asked for as many keys as queries."""
    asked, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **options):
        asked.append((query.shape[1], key.shape[1], value.shape[1], options["enable_gqa"]))
        return attend(query, key, value, **options)

    monkeypatch.setattr(document_kernels, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(document_kernels, "needs_own_keys", lambda *args, **options: not shared)
    seen_by(target_of("llama"), packed(9, 48, 3))
    assert set(asked) == ({(4, 2, 2, True)} if shared else {(4, 4, 4, False)})


@pytest.mark.parametrize("family", ["llama", "equal heads", "eager"])
def test_the_models_own_attention_says_that_it_is_quadratic(family, monkeypatch, caplog):
    """By segments nothing is said, since keys are repeated there."""
    monkeypatch.setattr("hf_eagle.targets.target.needs_own_keys", lambda device, dtype: dtype == torch.float32)
    target = FrozenTarget(tiny_llama(kv_heads=4 if family == "equal heads" else 2), [1])
    if family == "eager":
        target.model.set_attn_implementation("eager")
    ids = torch.arange(3, 15)[None]
    with caplog.at_level(logging.WARNING):
        target(ids, torch.ones_like(ids), documents=ids // 5)
        assert "quadratic" not in caplog.text
        for _ in range(2):
            target(ids, torch.ones_like(ids))
    said = [record.getMessage() for record in caplog.records if "quadratic" in record.getMessage()]
    assert len(said) == (family == "llama")
    assert not said or said[0].endswith("in float32 on cpu. Load it in bfloat16 (`target_dtype`).")
