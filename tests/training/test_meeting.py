"""Ranks that meet: none is through before all are, so one that is refused afterwards leaves nobody waiting."""

from unittest.mock import patch

import pytest
from torch.distributed import DistNetworkError
from transformers import TrainingArguments
from workers import run_worker

from hf_eagle import EagleTrainingArguments
from hf_eagle.door.sentences import is_sentence


def test_no_rank_is_through_before_all_have_met(tmp_path):
    run_worker(tmp_path, ranks=2, worker="meeting_worker.py")
    assert [(tmp_path / f"through_{rank}").read_text() for rank in (0, 1)] == ["True", "True"]


def test_a_rank_that_is_lost_while_they_meet_is_told(tmp_path):
    lost = DistNetworkError("Connection reset by peer")
    with patch.object(TrainingArguments, "__post_init__", side_effect=lost), pytest.raises(ConnectionError) as problem:
        EagleTrainingArguments(output_dir=str(tmp_path))
    assert is_sentence(problem.value) and "lost another rank while they connected" in str(problem.value)
