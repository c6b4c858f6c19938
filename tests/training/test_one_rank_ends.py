"""What a rank on an accelerator does when it fails, and what its backend cannot do, with the backend pretended."""

import os

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from hf_eagle.arguments import options
from hf_eagle.drafts.eagle3.training import Eagle3Training
from hf_eagle.losses.objectives import DraftObjective
from hf_eagle.training import distributed
from hf_eagle.training.run_arguments import RunArguments
from hf_eagle.training.totals import StepTotals, widest_float


@pytest.mark.parametrize(
    ("backend", "status", "ends"),
    [("nccl", 1, True), ("nccl", 0, False), ("gloo", 1, True), ("gloo", 0, True), (None, 1, False)],
)
def test_a_rank_that_failed_ends_whatever_connects_it(backend, status, ends, monkeypatch):
    """Torn down, it might wait for a collective that the others never join, and they for the launcher to end them."""
    ended = []
    monkeypatch.setattr(dist, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "barrier", lambda: ended.append("met"))
    monkeypatch.setattr(os, "_exit", ended.append)
    distributed.leave(status)
    assert ended == ((["met"] if status == 0 else []) + [status] if ends else [])


BACKENDS = {"cuda:nccl": False, "xpu:xccl": False, "cpu:gloo,cuda:nccl": True, "cuda:nccl,cpu:gloo": True}
BACKENDS |= {"cpu:gloo,cuda:gloo": True, None: True}


@pytest.mark.parametrize(("backends", "works"), BACKENDS.items())
def test_offloaded_gradients_need_a_backend_in_main_memory(backends, works, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: backends is not None)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(options, "refuse_unavailable", lambda args: None)  # one process cannot shard at all
    distributed.check_offload(False)

    given = ["--target", "any", "--train_data", "any", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    for asked in (True, False):
        run = RunArguments.parse([*given, "--fsdp", "--fsdp_config", f'{{"cpu_offload": {str(asked).lower()}}}'])
        if works or not asked:
            run.refuse_before_loading()
            continue
        message = f"`cpu_offload` in `fsdp_config` keeps .* connected by {backends} alone"
        with pytest.raises(ValueError, match=message):  # before anything is loaded
            run.refuse_before_loading()


@pytest.mark.parametrize("missing", [None, TypeError("MPS has no float64"), RuntimeError("no fp64")])
def test_sums_are_kept_in_the_widest_dtype_of_a_device(missing, monkeypatch):
    """float64 on a CPU and on CUDA; a step on a device without it is tried in `test_pretended_training.py`."""
    zeros = torch.zeros

    def without_float64(*size, dtype=None, **kwargs):
        if missing is not None and dtype == torch.float64:
            raise missing
        return zeros(*size, dtype=dtype, **kwargs)

    widest_float.cache_clear()
    monkeypatch.setattr(torch, "zeros", without_float64)
    totals = StepTotals()
    for _ in range(3):
        totals.add(loss=torch.tensor([0.1, 0.2]), correct=torch.tensor([1, 0]), rows=torch.tensor([2, 4]))
    widest_float.cache_clear()

    assert {x.dtype for x in totals.sums.values()} == {torch.float32 if missing else torch.float64}
    metrics = totals.metrics(Accelerator(cpu=True), Eagle3Training(DraftObjective(), num_steps=2, step_weight=1.0))
    assert metrics["accuracy_step_0"] == 0.5 and metrics["loss"] == pytest.approx(0.05 / 2 + 0.1 / 4)
