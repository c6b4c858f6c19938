"""Numbers on their way to the host, and where they are checked. On a device: `test_pretended_training.py`."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_eagle.training.watch import Fetch, runs_ahead


SIZES = st.dictionaries(st.text(min_size=1, max_size=3), st.none() | st.integers(0, 4), min_size=1, max_size=4)


@given(SIZES)
def test_numbers_come_back_by_name_in_one_copy(sizes):
    values = {name: torch.rand(() if size is None else (size,)) for name, size in sizes.items()}
    fetch = Fetch(values)
    assert not fetch.is_late
    assert fetch.read() == {name: x.tolist() for name, x in values.items()}


def test_only_devices_that_queue_copies_run_ahead():
    ahead = {name: runs_ahead(torch.device(name)) for name in ("cpu", "mps", "cuda", "xpu")}
    assert ahead == {"cpu": False, "mps": False, "cuda": True, "xpu": True}
