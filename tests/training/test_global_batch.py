"""One global batch, however it is split: the same loss and the same gradient."""

import pytest
import torch
from workers import losses, run_worker


ARGS = {
    "max_steps": 2,
    "max_grad_norm": 0.0,
    "ttt_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
}
SPLITS = {
    "accumulation_4x2": (1, 2, 4),
    "ranks_2x4": (2, 4, 1),
    "ranks_2_accumulation_2x2": (2, 2, 2),
}


def run(out, ranks, batch, accumulation, **spec):
    args = {**ARGS, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    run_worker(out, ranks=ranks, records=16, args=args, **spec)
    return torch.load(out / "gradients.pt"), losses(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), 1, 8, 1)


@pytest.mark.parametrize("split", SPLITS)
def test_gradient_does_not_depend_on_the_split(split, whole, tmp_path):
    gradients, curve = run(tmp_path, *SPLITS[split])
    assert gradients.keys() == whole[0].keys()
    for name, wanted in whole[0].items():
        assert wanted.norm() > 0
        assert (gradients[name] - wanted).norm() <= 1e-6 * wanted.norm(), name
    assert curve == pytest.approx(whole[1], rel=1e-6)


def test_a_rank_without_supervised_rows_does_not_hang(tmp_path):
    """Rank 1's whole share of the first batch has no answer in it."""
    gradients, _ = run(tmp_path / "ranks", 2, 4, 1, unsupervised=[4, 5, 6, 7])
    alone, _ = run(tmp_path / "alone", 1, 8, 1, unsupervised=[4, 5, 6, 7])
    for name, wanted in alone.items():
        assert (gradients[name] - wanted).norm() <= 1e-6 * wanted.norm(), name


def test_an_adapters_gradient_does_not_depend_on_it_either(tmp_path):
    spec = {"unsupervised": [4, 5, 6, 7], "peft": {"r": 4, "modules_to_save": ["lm_head"]}}
    gradients, curve = run(tmp_path / "ranks", 2, 4, 1, **spec)
    wanted, wanted_curve = run(tmp_path / "alone", 1, 8, 1, **spec)
    assert gradients.keys() == wanted.keys() and {name.split(".")[-2] for name in wanted} == {"default"}
    for name in wanted:  # A's are zero before the first step, since B is
        assert (gradients[name] - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), name
    assert curve == pytest.approx(wanted_curve, rel=1e-6)
