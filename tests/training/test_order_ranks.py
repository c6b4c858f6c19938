"""Several ranks train on, and count, what one process does: the same rows in the same steps, resumed or not."""

import json
import math
import shutil
from collections import Counter, defaultdict

import pytest
import torch
from tiny import pad_batch, random_chats
from workers import losses, run_worker

from hf_eagle.losses.supervision import supervised_steps


STEPS = 12
CELLS = {
    "random": {},
    "grouped": {"strategy": "group_by_length"},
    "rebalanced": {"strategy": "batch_rebalance"},
    "packed": {"packed": True},
    # streams are shuffled or packed before they are trained on; what the parser refuses is tested there
    "stream": {"stream": "rows"},
    "packed_stream": {"stream": "rows", "packed": True},
    "chat_stream": {"stream": "chats", "records": 15},  # of which two have no answer
    "empty_stream": {"stream": "rows", "records": 15, "empty": [3, 8]},  # alone in their batches on two ranks
    # of which not all blocks are drawn
    "blocks": {"method": "dflash", "strategy": "batch_rebalance"},
    "packed_block_stream": {"method": "dflash", "stream": "rows", "packed": True},
}
OBJECTIVES = {"eagle3": {"ttt_steps": 2}, "eagle1": {}, "dflash": {"num_anchors": 2}}
SAMPLERS = ["random", "grouped", "rebalanced"]
ROWS = 4  # a step
SIZES = list(range(1, 10))
SPLITS = ((2, 1), (2, 3), (3, 2), (3, 4))


def run(cell, name, ranks, batch=None, method="eagle3", records=13, **spec):
    """A run of three passes and a bit: 13 chats leave a step of one row, which not every rank has a part of."""
    how = dict(CELLS[cell])
    method = how.pop("method", method)
    fields = {"max_steps": STEPS, "save_steps": 3, **OBJECTIVES[method]}
    fields |= {"learning_rate": 3e-3, "per_device_train_batch_size": batch or ROWS // ranks}
    fields["gradient_accumulation_steps"] = ROWS // (ranks * fields["per_device_train_batch_size"])
    fields["train_sampling_strategy"] = how.pop("strategy", "random")
    return {"name": f"{cell}_{name}", "method": method, "records": records, "args": fields, **spec, **how}


def launch(out, ranks, runs, **spec):
    for each in runs:
        (out / each["name"]).mkdir(parents=True)
    run_worker(out, ranks=ranks, worker="order_worker.py", runs=runs, **spec)


def seen(folder) -> dict[int, Counter]:
    """Of each step, how often each row counted, on all ranks together."""
    steps = defaultdict(Counter)
    for path in folder.glob("seen_*.json"):
        for step, rows in json.loads(path.read_text()):
            steps[step].update(map(tuple, rows))
    return dict(steps)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every way to order rows: alone; one rank, then two, then one, replicated and not; noise that parts the ranks."""
    out = tmp_path_factory.mktemp("runs")
    noisy = {"method": "eagle1", "records": 16}
    launch(out, 1, [
        *(run(cell, "alone", 1) for cell in CELLS),
        *(run(cell, "noisy_alone", 1, **noisy) for cell in SAMPLERS),
    ])  # fmt: skip
    launch(out, 2, [
        *(run(cell, "two", 2, batch=1, resume=[f"{cell}_alone", 6], stop_at=9) for cell in CELLS),
        *(run(cell, "noisy", 2, **noisy) for cell in SAMPLERS),
    ])  # fmt: skip
    sharded = [run(cell, "fsdp2", 2, resume=[f"{cell}_alone", 6], stop_at=9) for cell in CELLS]
    launch(out, 2, sharded, fsdp2=True)
    launch(out, 1, [
        *(run(cell, "back", 1, resume=[f"{cell}_two", 9]) for cell in CELLS),
        *(run(cell, "back_fsdp2", 1, batch=2, resume=[f"{cell}_fsdp2", 9]) for cell in CELLS),
    ])  # fmt: skip
    return out


@pytest.mark.parametrize("draft", ["ddp", "fsdp2"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_run_goes_on_with_the_same_rows_on_other_ranks(cell, draft, runs):
    """Resumed in the second pass on two ranks, and in the third on one, where it accumulates or does not."""
    names = ("two", "back") if draft == "ddp" else ("fsdp2", "back_fsdp2")
    wanted, rows = losses(runs / f"{cell}_alone"), seen(runs / f"{cell}_alone")
    assert sorted(wanted) == list(range(1, STEPS + 1))
    for name, steps in zip(names, (range(6, 9), range(9, STEPS)), strict=True):
        found = seen(runs / f"{cell}_{name}")
        assert found == {step: rows[step] for step in steps}
        curve = losses(runs / f"{cell}_{name}")
        assert sorted(curve) == list(range(1, steps.stop + 1))
        assert curve == pytest.approx({step: wanted[step] for step in curve}, rel=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_every_row_counts_once_a_pass(cell, runs):
    steps = seen(runs / f"{cell}_alone")
    whole = sum(steps.values(), Counter())
    a_pass = math.ceil(len(whole) / ROWS)
    assert len(whole) % ROWS
    for first in range(0, STEPS - a_pass + 1, a_pass):
        assert sum((steps[step] for step in range(first, first + a_pass)), Counter()) == Counter(whole.keys())


@pytest.mark.parametrize("cell", SAMPLERS)
def test_noise_does_not_make_ranks_draw_other_orders(cell, runs):
    """EAGLE-1's noise is drawn from torch's own generator, as much of it as a rank's batches are long."""
    found = seen(runs / f"{cell}_noisy")
    assert found == seen(runs / f"{cell}_noisy_alone")
    for first in range(0, STEPS, 4):
        assert sum((found[step] for step in range(first, first + 4)), Counter()).most_common(1)[0][1] == 1
        assert len(sum((found[step] for step in range(first, first + 4)), Counter())) == 16


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The sums of evaluations on 1 to 9 rows, by how many ranks and rows a batch; one with a draft under FSDP2."""
    found = {}
    for ranks, batch in ((1, 4), *SPLITS):
        out = tmp_path_factory.mktemp("evaluated")
        fsdp2 = (ranks, batch) == (3, 4)
        run_worker(out, ranks=ranks, worker="order_worker.py", sizes=SIZES, eval_batch=batch, fsdp2=fsdp2)
        found[ranks, batch] = json.loads((out / "evaluations.json").read_text())
        shutil.rmtree(out)
    return found


@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_an_evaluation_counts_what_one_process_counts(split, method, evaluated):
    for size in map(str, SIZES):
        wanted, found = dict(evaluated[1, 4][method][size]), dict(evaluated[split][method][size])
        for name in ("rows", "correct"):
            assert found.pop(name) == wanted.pop(name), (size, name)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-6), (size, name)


@pytest.mark.parametrize("size", SIZES)
def test_an_evaluation_counts_the_rows_that_there_are(size, evaluated):
    """By the plain rule, whatever the batches were."""
    batch = pad_batch(random_chats(max(SIZES), seed=9)[:size])
    documents = torch.where(batch["attention_mask"].bool(), 0, -1)
    rows = supervised_steps(batch["loss_mask"], documents, 7).flatten(1).sum(1)
    for sums in evaluated.values():
        assert sums["eagle3"][str(size)]["rows"] == rows.tolist()
        assert sums["eagle1"][str(size)]["rows"] == rows[:1].tolist()
        assert sums["dflash"][str(size)]["rows"] == rows[:4].tolist()


@pytest.mark.parametrize("fsdp2", [False, True])
def test_a_loss_that_is_no_number_on_one_rank_ends_the_evaluation_on_all(fsdp2, tmp_path):
    """If that rank raised at once, the others would wait for its batches; and the next evaluation is sound."""
    run_worker(tmp_path, ranks=2, worker="order_worker.py", broken=[0, 1], fsdp2=fsdp2)
    found = [json.loads((tmp_path / f"broken_{rank}.json").read_text()) for rank in range(2)]
    for broken in range(2):
        for rank in range(2):
            said, loss_behind = found[rank][broken]
            whose = "this" if rank == broken else "another"
            assert said.startswith(f"The loss on held-out data is nan at step 0, by batches of {whose} rank "), said
            assert math.isfinite(loss_behind)
