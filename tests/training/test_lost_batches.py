"""A worker of a loader that cannot hand a batch over says so."""

import resource
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from hf_eagle.door.sentences import sentence_of
from hf_eagle.training.lost_batches import tell_lost_batches


def no_room_in_shared_memory(worker: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


@pytest.mark.parametrize("lengths, sent", [([10, 10, 10], 3), ([10, 10, 4000, 10], 2), ([4000], 0)])
def test_a_batch_that_cannot_be_handed_over_is_an_error_in_its_place(lengths, sent):
    rows = [torch.arange(length) for length in lengths]
    prepare = partial(tell_lost_batches, no_room_in_shared_memory)
    # as our collators do, and unlike the one of torch, rows are put into shared memory when they are sent
    loader = iter(DataLoader(rows, batch_size=1, num_workers=1, worker_init_fn=prepare, collate_fn=torch.stack))
    for length in lengths[:sent]:
        assert torch.equal(next(loader), torch.arange(length)[None])

    if sent < len(lengths):
        with pytest.raises(RuntimeError) as problem:
            next(loader)
        said = sentence_of(problem.value)
        assert said.startswith("A process that reads data (`dataloader_num_workers`) could not hand over a batch: ")
        assert "File too large" in said and "/dev/shm" in said
