"""The benchmark measures what it says: both ways compute the same, operations are counted right, the script runs."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_files import write_chats, write_tiny_target
from torch.utils.flop_counter import FlopCounterMode
from warm_python import warm_python

from hf_eagle.benchmark import measures
from hf_eagle.benchmark.shapes import Shapes, check_memory, check_turns
from hf_eagle.benchmark.workload import Step, build_block_draft, build_draft, chat_batch, random_target
from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle1.configuration import Eagle1Config


CPU = torch.device("cpu")
SHAPES = Shapes(64, 96, 4, 2, 16, 300, 128, 8)
LATENT = Shapes(64, 96, 4, 4, 16, 300, 128, 8, 24, 40, 16, 8, 12)
TINY = [
    *("--hidden_size", "64", "--intermediate_size", "96", "--num_attention_heads", "4", "--num_key_value_heads", "2"),
    *("--head_dim", "16", "--vocab_size", "300", "--draft_vocab_size", "128", "--num_hidden_layers", "8"),
    *("--ttt_steps", "3", "--length", "48", "--turns", "2", "--repeats", "1"),
]


def steps(shapes=SHAPES):
    torch.manual_seed(0)
    draft = build_draft(shapes, CPU)
    target = random_target(shapes, torch.float32, CPU, draft.config.tap_ids)
    batch = chat_batch(shapes, 2, 60, 0.4, 3, CPU)
    ways = [Step(draft, target, 4), Step(draft, target, 4, whole=True)]
    for step in ways:
        step.run_target(batch)
    # the target's argmax is left out of the draft vocabulary in most rows here: judge those too
    ways[0].training_step.training.objective.oov_rows = "renormalize"
    return draft, batch, *ways


def needed_flops(draft, plan):
    return draft.kind.part("costs").costs_of(draft.config).needed_flops(plan)


def test_the_plain_way_has_the_same_loss_and_gradients():
    draft, batch, fast, whole = steps()
    found = []
    for step in (fast, whole):
        draft.zero_grad()
        loss = step.forward(batch)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in draft.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_padding_of_any_id_is_measured_as_it_is_trained(whole):
    """A tokenizer's pad id may lie beyond the target's embeddings."""
    torch.manual_seed(0)
    draft = build_draft(SHAPES, CPU)
    step = Step(draft, random_target(SHAPES, torch.float32, CPU, draft.config.tap_ids), 2, whole=whole)
    rows = [{"input_ids": list(range(5, 5 + n)), "loss_mask": [0, 0] + [1] * (n - 2)} for n in (12, 7)]
    losses = []
    for pad in (0, SHAPES.vocab_size, 10**6):
        batch = step.planned(EagleDataCollator(pad)(rows))
        step.run_target(batch)
        losses.append(step.forward(batch).item())
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("shapes", [SHAPES, LATENT, dataclasses.replace(LATENT, q_lora_rank=None)])
def test_needed_operations_are_those_that_run(shapes):
    """PyTorch's counter sees every matrix product but those inside the CPU's flash kernel."""
    draft, batch, fast, _ = steps(shapes)
    with FlopCounterMode(display=False) as counter:
        fast.forward(batch).backward()
    needed = needed_flops(draft, fast.plan)
    assert 0.95 < (needed["projections"] + needed["head"]) / counter.get_total_flops() < 1.05


def test_needed_operations_of_eagle1_are_those_that_run():
    """As above; its loss also runs the target's head, which is among them."""
    torch.manual_seed(0)
    target = random_target(SHAPES, torch.float32, CPU, [])
    draft = new_draft(Eagle1Config.from_target(target.config), target.embedding_weight()).train()
    draft.attach(target)
    batch, step = chat_batch(SHAPES, 2, 60, 0.4, 3, CPU), Step(draft, target, 1)
    step.run_target(batch)
    with FlopCounterMode(display=False) as counter:
        step.forward(batch).backward()
    needed = needed_flops(draft, step.plan)
    assert 0.95 < (needed["projections"] + needed["head"]) / counter.get_total_flops() < 1.05


@pytest.mark.parametrize("shapes", [SHAPES, LATENT])
def test_attention_needs_half_of_what_the_plain_way_computes(shapes):
    """All rows of one document, one step: `eager` also computes what is masked; the counter does not see `sdpa`."""
    draft = build_draft(shapes, CPU)
    target = random_target(shapes, torch.float32, CPU, draft.config.tap_ids)
    batch = chat_batch(shapes, 1, 64, 0.999, 1, CPU)
    step, seen = Step(draft, target, 1), {}
    step.run_target(batch)
    for implementation in ("eager", "sdpa"):
        step.attention = implementation
        with FlopCounterMode(display=False) as counter:
            step.forward(batch).backward()
        seen[implementation] = counter.get_total_flops()
    needed = needed_flops(draft, step.plan)
    assert 0.95 < 2 * needed["attention"] / (seen["eager"] - seen["sdpa"]) < 1.05


@pytest.mark.parametrize("anchors", [4, 99])
def test_needed_operations_of_blocks_are_those_that_run(anchors):
    """As above, less the scores inside blocks, which are products of batches; its loss also runs the target's head."""
    torch.manual_seed(0)
    draft = build_block_draft(SHAPES, CPU, draft_num_layers=2, block_size=5)
    step = Step(draft, None, 1, num_anchors=anchors)
    batch = step.planned(chat_batch(SHAPES, 2, 60, 0.4, 3, CPU))
    step.run_target(batch)
    with FlopCounterMode(display=False) as counter:
        step.forward(batch).backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counted.items() if "bmm" not in str(operation))
    needed = needed_flops(draft, step.plan)
    assert int(step.counts[0]) == min(2 * anchors, 2 * 3 * 7)
    assert 0.95 < (needed["projections"] + needed["head"]) / products < 1.05


def test_peak_memory_sees_what_is_taken_and_given_back():
    added = measures.peak_memory(lambda: torch.ones(2**25).sum(), CPU)  # 128 MiB
    if added is None:
        pytest.skip("no /proc on this system")
    assert 120 * 2**20 < added < 200 * 2**20


@pytest.mark.parametrize("name", ["cpu", "cuda", "mps", "xpu"])
def test_the_time_of_a_call_is_the_devices(name, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waits.append(device))
    measures.seconds(lambda: waits.append("called"), torch.device(name))
    around = [] if name == "cpu" else [torch.device(name)]
    assert waits == [*around, "called", *around]


MLA = "--preset kimi-mla --q_lora_rank 24 --kv_lora_rank 32 --qk_nope_head_dim 16 --qk_rope_head_dim 8 --v_head_dim 16"


@pytest.mark.parametrize(
    "way",
    [
        ["--compare", "eager"],
        ["--dtype", "bfloat16", "--compare", "float32"],
        [*MLA.split(), "--compare", "eager"],
    ],
)
def test_the_script_compares(tmp_path, way):
    out = tmp_path / "out.json"
    done = run(*TINY, *way, "--target", "random", "--output_json", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result[f"speedup_vs_{way[-1]}"] > 0 and 0 < result["matmul_limit_share"] < 1
    assert result["supervised_rows"] > 0 and "supervised rows/s" in done.stdout
    if way[-1] == "eager":
        assert result["memory_ratio_vs_eager"] > 0


def test_the_script_sweeps_and_draws(tmp_path):
    done = run(*TINY, "--sweep", "ttt", "--output_json", str(tmp_path / "ttt.json"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ttt.png").stat().st_size > 5000
    assert [point["ttt_steps"] for point in json.loads((tmp_path / "ttt.json").read_text())["points"]] == [
        1,
        2,
        3,
        5,
        7,
    ]


def test_the_script_shows_blocks_beside_eagle3_at_many_lengths(tmp_path):
    """A table of operations, seconds and memory; anchors decide what blocks cost, the length decides EAGLE-3's."""
    how = ["--method", "dflash", "--block_size", "4", "--num_anchors", "8", "--compare", "eagle3"]
    done = run(*TINY, *how, "--sweep", "length", "--longest", "2100", "--output_json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "out.json").read_text())["points"]
    assert [point["length"] for point in points] == [512, 1024, 2048]
    assert [point["supervised_rows"] for point in points] == [8, 8, 8]

    operations = {way: [point["operations"][way] for point in points] for way in ("fast", "eagle3")}
    assert operations["fast"][2] < 4 * operations["fast"][0] and operations["eagle3"][2] > 4 * operations["eagle3"][0]
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[1:2] in (["fast"], ["eagle3"])]
    assert [(row[0], row[1]) for row in rows] == [(n, way) for n in ("512", "1,024", "2,048") for way in operations]
    assert rows[0][2] == f"{operations['fast'][0] / 1e9:,.1f}" and all(len(row) == 5 for row in rows)


def test_the_script_shows_a_window_beside_all_tokens(tmp_path):
    """What attention needs grows with the length, and beside it with its square."""
    how = ["--draft_sliding_window", "64", "--turns", "1", "--compare", "full", "--sweep", "length"]
    done = run(*TINY, *how, "--longest", "2048", "--output_json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "out.json").read_text())["points"]
    windowed, full = ([point["operations"][way] for point in points] for way in ("fast", "full"))
    assert windowed[2] < 4.1 * windowed[0] and full[2] > 6 * full[0]
    assert all(point["speedup_vs_full"] > 0 for point in points)


def test_the_script_measures_blocks_beside_a_target(tmp_path):
    done = run(*TINY, "--method", "dflash", "--draft_num_layers", "2", "--target", "random", "--dtype", "bfloat16",
               "--compare", "float32", "--output_json", str(tmp_path / "out.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["speedup_vs_float32"] > 0


@pytest.mark.parametrize("compare", ["padded", "trainer", "live"])
def test_the_script_compares_on_real_chats(tmp_path, compare):
    write_tiny_target(tmp_path / "target")
    write_chats(tmp_path / "chats.jsonl", number=20)
    options = ["--target", str(tmp_path / "target"), "--data", str(tmp_path / "chats.jsonl"), "--compare", compare]
    done = run(
        *options, "--ttt_steps", "2", "--length", "64", "--repeats", "1", "--output_json", str(tmp_path / "out.json")
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert any("_vs_" in key and value > 0 for key, value in result.items() if isinstance(value, float))
    if compare == "live":
        assert 0 < result["reading_share"] < 1 and "reading it costs" in done.stdout


def test_data_that_are_nothing_are_named(tmp_path):
    write_tiny_target(tmp_path / "target")
    done = run("--target", str(tmp_path / "target"), "--data", "{", "--length", "64", "--ttt_steps", "2")
    assert done.returncode == 1 and "error: `data`: { is neither a file nor a Hub data set" in done.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compare": "padded"}, "`compare` padded needs real chats: name a `data` file and a `target`"),
        ({"compare": "float32"}, "`compare` float32 needs `dtype` bfloat16"),
        ({"v_head_dim": 8}, "`v_head_dim` is 8, but the draft of `preset` smollm2 has no latent attention"),
        ({"length": 0}, "`length` must be at least 4"),
        ({"supervised_share": 1.0}, "`supervised_share` must be above 0 and below 1"),
        ({"batch_size": 10**9}, "`batch_size` must be at least 1 and at most 65,536"),
        ({"hidden_size": 2 * 10**9}, "`hidden_size` must be at least 1 and at most 131,072"),
        ({"num_attention_heads": 4}, "`num_attention_heads` 4 must be a multiple of `num_key_value_heads` 3"),
        ({"head_dim": 7}, "`head_dim` must be even"),
        ({"preset": "kimi-mla", "qk_rope_head_dim": 7}, "`qk_rope_head_dim` must be even"),
        ({"vocab_size": 64}, "`draft_vocab_size` 8192 must be at most `vocab_size` 64"),
        ({"length": 1}, "`length` must be at least 4 and at most 131,072"),
        ({"supervised_share": 1e-12}, "`supervised_share` 1e-12 of a turn of 512 tokens is less than two tokens"),
        ({"length": 32, "turns": 1000}, "`turns` must be at most 8 in rows of `length` 32, got 1000"),
        ({"turns": 1000, "sweep": "length"}, "`turns` must be at most 128 in rows of `length` 512, got 1000"),
        ({"target": "random", "hidden_size": 577}, "`hidden_size` 577 must be a multiple of `num_attention_heads` 9"),
        ({"target": "random", "num_hidden_layers": 6}, "`num_hidden_layers` must be at least 7"),
        ({"num_anchors": 9}, "`num_anchors` 9 does not go with `method` eagle3: leave it out"),
        ({"compare": "eagle3"}, "`compare` eagle3 does not go with `method` eagle3"),
        ({"compare": "full"}, "`compare` full is without a window: set `draft_sliding_window`"),
        ({"preset": "kimi-mla", "draft_sliding_window": 9}, "`draft_sliding_window` goes neither with `data` nor with"),
        ({"method": "dflash", "draft_sliding_window": 9}, "`draft_sliding_window` 9 does not go with `method` dflash"),
        ({"method": "dflash", "compare": "eager"}, "`compare` eager does not go with `method` dflash"),
        ({"method": "dflash", "preset": "kimi-mla"}, "`preset` kimi-mla does not go with `method` dflash"),
        ({"method": "dflash", "data": "x", "target": "a/model"}, "`data` x does not go with `method` dflash"),
        ({"method": "dflash", "block_size": 1}, "`block_size` must be at least 2"),
        ({"sweep": "length", "longest": 100}, "`longest` must be at least 512"),
        ({"data": "chats.jsonl"}, "`data` needs a tokenizer and features: name a `target`"),
        ({"target": "a/model"}, "`target` a/model is measured on real chats: name a `data` file"),
        ({"data": "chats.jsonl", "target": "a/model", "compare": "eager"}, "`data` goes with `compare` none, padded"),
        ({"data": "chats.jsonl", "target": "a/model", "sweep": "ttt"}, "and without a `sweep`"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, message, monkeypatch):
    monkeypatch.syspath_prepend("scripts")
    from benchmark_training_step import BenchmarkArguments

    with pytest.raises(ValueError, match=message):
        BenchmarkArguments(**fields)


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 40), st.integers(1, 10), st.floats(0.05, 0.95), st.integers(1, 5))
def test_rows_that_are_accepted_are_learned_from(length, turns, share, num_steps):
    try:
        check_turns(length, turns, share)
    except ValueError:
        return
    step = Step(build_draft(SHAPES, CPU), None, num_steps)
    batch = step.planned(chat_batch(SHAPES, 1, length, share, turns, CPU))
    step.run_target(batch)
    assert int(step.counts[0]) > 0 and math.isfinite(step.forward(batch).item())


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((2**16, 2**17, SHAPES), "batch_size"),
        ((1, 8, Shapes(2**17, 96, 4, 2, 16, 2**22, 128, 8)), "hidden_size"),
    ],
)
def test_what_no_memory_holds_is_refused_before_it_is_made(sizes, named):
    batch_size, length, shapes = sizes
    with pytest.raises(ValueError, match=f"^`{named}` .* GiB or more, but cpu has 16.0: give smaller ones"):
        check_memory(shapes, batch_size, length, 0, 2**34, "cpu")
    check_memory(shapes, batch_size, length, 0, None, "cpu")
    check_memory(SHAPES, 2, 64, 8, measures.room_of(CPU), "cpu")


def run(*options: str):
    return warm_python().run("scripts/benchmark_training_step.py", *options)
