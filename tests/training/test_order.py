"""Orders and their dealing out: every row counts once a pass, in the same step on any number of ranks."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import is_older
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from hf_eagle.drafts.training_base import Draw
from hf_eagle.training.order import Dealing, DrawnOrder, check_dealt, drawn


STRATEGIES = ["random", "sequential", "group_by_length"]
if not is_older("accelerate", "1.14"):  # older ones refuse it, see `check_dealt`
    STRATEGIES.append("batch_rebalance")


def collate(rows):
    return {"rows": torch.tensor(rows), "loss_mask": torch.ones(len(rows), 3, dtype=torch.long), "plan": "made"}


def loader_of(strategy, lengths, batch, accumulation, ranks, rank, epoch, drop_last=False):
    """As `Trainer` and accelerate make it for one rank of several, each with a random state of its own."""
    step = batch * accumulation * ranks
    data = range(len(lengths))
    sampler = {
        "random": lambda: RandomSampler(data),
        "sequential": lambda: SequentialSampler(data),
        "group_by_length": lambda: LengthGroupedSampler(batch * accumulation, data, lengths),
        "batch_rebalance": lambda: BatchRebalanceSampler(
            lengths, step, ranks, accumulation, rank=rank, drop_last=drop_last
        ),
    }[strategy]()
    sampler = drawn(sampler, lambda: Draw(seed=3, epoch=epoch), step)

    rebalanced = strategy == "batch_rebalance"
    dealt = {"batch_sampler": sampler} if rebalanced else {"sampler": sampler, "batch_size": batch}
    dealt |= {} if rebalanced else {"drop_last": drop_last}
    loader = DataLoader(data, collate_fn=collate, **dealt)
    loader = prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)
    if rebalanced and ranks > 1:  # as `Trainer` does
        loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
    return loader


def own_rows(loader, args, accumulation) -> list[list[int]]:
    """The rows of each step that count on a rank."""
    torch.manual_seed(100 + args.process_index)
    dealing, batches = Dealing.of(loader, args), list(loader)
    size = len(batches) % accumulation or accumulation
    batches[-size:] = dealing.end_of_pass(batches[-size:])

    # the same, batch by batch
    assert dealing.batches == len(batches)
    again = [dealing.without_filler(batch, place) for place, batch in enumerate(batches)]
    kept = [batch["rows"][batch["loss_mask"].any(1)].tolist() for batch in batches]
    assert [batch["rows"][batch["loss_mask"].any(1)].tolist() for batch in again] == kept
    # a plan is made anew where, and only where, it does not hold any more
    assert all(("plan" in batch) == bool(batch["loss_mask"].all()) for batch in batches)
    return [sum(kept[n : n + accumulation], []) for n in range(0, len(kept), accumulation)]


def steps_of(strategy, lengths, batch, accumulation, ranks, epoch=0, **fields) -> list[list[int]]:
    """The rows of each step that count on any rank, sorted."""
    config, each = SimpleNamespace(split_batches=False), []
    for rank in range(ranks):
        args = SimpleNamespace(world_size=ranks, process_index=rank, accelerator_config=config)
        loader = loader_of(strategy, lengths, batch, accumulation, ranks, rank, epoch, **fields)
        each.append(own_rows(loader, args, accumulation))
    assert len({len(steps) for steps in each}) == 1, "the ranks take another number of steps"
    return [sorted(sum(step, [])) for step in zip(*each, strict=True)]


@given(
    strategy=st.sampled_from(STRATEGIES),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    split=st.sampled_from([(1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 1, 3), (2, 1, 3), (2, 2, 3), (3, 1, 4)]),
    epoch=st.integers(0, 3),
)
@settings(deadline=None, max_examples=150)
def test_steps_are_those_of_one_process(strategy, lengths, split, epoch):
    batch, accumulation, ranks = split
    found = steps_of(strategy, lengths, *split, epoch)
    assert sorted(sum(found, [])) == list(range(len(lengths)))
    for accumulated in (1, accumulation):
        alone = steps_of(strategy, lengths, batch * ranks * accumulation // accumulated, accumulated, 1, epoch)
        assert found == alone


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropping_the_last_rows_leaves_nothing_to_fill(strategy):
    found = steps_of(strategy, list(range(1, 12)), 2, 1, 2, drop_last=True)
    assert [len(step) for step in found] == [4, 4]
    assert len({row for step in found for row in step}) == 8


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "sequential"])
def test_every_epoch_has_an_order_of_its_own(strategy):
    orders = [steps_of(strategy, list(range(1, 41)), 2, 1, 2, epoch) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


@given(rows=st.integers(1, 200), seed=st.integers(0, 2**31), epoch=st.integers(0, 50))
@settings(deadline=None, max_examples=50)
def test_the_random_order_is_accelerates(rows, seed, epoch):
    """Runs that were begun under accelerate's sampler go on in the same order."""
    theirs = SeedableRandomSampler(range(rows), data_seed=seed)
    theirs.set_epoch(epoch)
    assert list(DrawnOrder(rows, lambda: Draw(seed, epoch))) == list(theirs)


def test_similar_lengths_stay_together():
    lengths = torch.randint(1, 500, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = steps_of("group_by_length", lengths, 2, 2, 2)
    spread = [max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in rows]
    assert sum(spread) / len(spread) < 100 < 300 < max(lengths) - min(lengths)


def test_batches_that_are_split_are_dealt_alike():
    """`split_batches`: a batch of the loader is that of all ranks together."""
    args = [
        SimpleNamespace(world_size=2, process_index=rank, accelerator_config=SimpleNamespace(split_batches=True))
        for rank in (0, 1)
    ]
    kept = []
    for rank in (0, 1):
        loader = DataLoader(range(9), batch_size=4, collate_fn=collate)
        options = {"num_processes": 2, "process_index": rank, "put_on_device": False, "split_batches": True}
        kept.append(own_rows(prepare_data_loader(loader, **options), args[rank], 1))
    assert kept == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], []]]


def test_what_is_not_dealt_out():
    """A stream's end is not known, and somebody's own batches may be of any size."""

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    args = SimpleNamespace(world_size=2, process_index=0, accelerator_config=SimpleNamespace(split_batches=False))
    assert Dealing.of(DataLoader(Stream(), batch_size=2), args) is None
    assert Dealing.of(DataLoader(range(3), batch_sampler=[[0], [1, 2]]), args) is None


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("version", ["1.12.0", "1.14.0.dev0", "1.15.1"])
@pytest.mark.parametrize("strategy", ["random", "batch_rebalance"])
def test_what_ranks_would_be_dealt_unevenly_is_refused(strategy, version, ranks, monkeypatch):
    monkeypatch.setattr("accelerate.__version__", version)
    config = SimpleNamespace(even_batches=True)
    args = SimpleNamespace(world_size=ranks, accelerator_config=config, train_sampling_strategy=strategy)
    if (strategy, version, ranks) == ("batch_rebalance", "1.12.0", 2):
        with pytest.raises(ValueError, match="needs accelerate 1.14 or newer, and this is 1.12.0: install a newer one"):
            check_dealt(args)
    else:
        check_dealt(args)

    config.even_batches = False
    if ranks == 2:
        with pytest.raises(ValueError, match="^`even_batches` is false in `accelerator_config`: a rank whose data"):
            check_dealt(args)
