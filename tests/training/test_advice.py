"""Training warns of a mask, a vocabulary, answers and a gap that would make acceptance low, and of nothing else."""

import logging
from types import SimpleNamespace

import pytest
import torch
from chain_models import generate, make_draft, make_target, random_prompts
from datasets import Dataset

from hf_eagle import EagleTrainer, EagleTrainingArguments
from hf_eagle.training import advice
from hf_eagle.training.advice import DataAdvice, Look, warning_about_answers, warning_about_gap, warnings_about


@pytest.fixture(scope="module")
def target():
    return make_target()


def rows_of(target, own=True, supervised=30):
    """Forty conversations, with the target's answers or random ones."""
    ids = generate(target, random_prompts(40, 4, seed=5), 30)
    if not own:
        ids = random_prompts(40, 34, seed=6)
    mask = [0] * (34 - supervised) + [1] * supervised
    return Dataset.from_list([{"input_ids": row.tolist(), "loss_mask": mask} for row in ids])


@pytest.mark.parametrize("own", [True, False])
def test_answers(target, own):
    told = warning_about_answers(Look.at(rows_of(target, own)), target)
    assert told is None  # 16 rows of 30 tokens say too little
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advice, "TOKENS", 400)
        told = warning_about_answers(Look.at(rows_of(target, own)), target)
    assert (told is None) is own and (own or "mostly not its own" in told)


@pytest.mark.parametrize(("supervised", "named"), [(1, True), (2, False), (30, False)])
def test_the_mask(target, supervised, named):
    told = list(warnings_about(Look.at(rows_of(target, supervised=supervised)), None))
    assert bool(told) is named and all("2.9% of the tokens are supervised" in one for one in told)


def test_the_vocabulary(target):
    look = Look.at(rows_of(target))
    counts = torch.bincount(look.supervised, minlength=target.vocab_size)
    order = counts.argsort(descending=True)
    assert not list(warnings_about(look, order[counts[order] > 0]))
    (told,) = warnings_about(look, order[:5])
    share = 1 - counts[order[:5]].sum().item() / counts.sum().item()
    assert f"lacks {share:.1%} of the supervised tokens" in told


def test_the_gap():
    assert warning_about_gap(0.8, 0.66) is None and warning_about_gap(0.4, 0.6) is None
    assert "80.0% of the rows" in warning_about_gap(0.8, 0.6)


def test_the_gap_is_told_once(caplog):
    known = DataAdvice(SimpleNamespace())
    state = SimpleNamespace(is_world_process_zero=True)
    for logs in ({"accuracy_step_0": 0.9}, {"eval_accuracy_step_0": 0.5}, {"eval_accuracy_step_0": 0.4}, None):
        known.on_log(None, state, None, logs)
    assert len([record for record in caplog.records if "by heart" in record.message]) == 1


def test_data_that_cannot_be_looked_at(target):
    rows = rows_of(target)
    assert Look.at(rows.to_iterable_dataset()) is None and Look.at(list(rows)) is None and Look.at(None) is None
    assert Look.at(rows.remove_columns("loss_mask")) is None
    packed = rows.add_column("document_lengths", [[4, 30]] * len(rows))
    assert all(len(ids) == 4 for ids, _ in Look.at(packed).rows) and Look.at(packed).tokens == 40 * 34


def test_a_run_says_so_and_trains_as_before(target, tmp_path, caplog):
    args = EagleTrainingArguments(
        output_dir=str(tmp_path),
        **{"max_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "ttt_steps": 1},
    )
    draft = make_draft(target, draft_vocab_size=20, tap_ids=[0, 2, 3], steps=0)
    with caplog.at_level(logging.WARNING, "hf_eagle"):
        EagleTrainer(model=draft, args=args, target=target, train_dataset=rows_of(target, own=False)).train()
    told = [record.message for record in caplog.records if record.name == "hf_eagle.training.advice"]
    assert len(told) == 1 and "The draft vocabulary lacks" in told[0]
