"""What a run prints while it trains, goes on and loads its draft."""

import logging
import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import make_trainer
from tiny import tiny_eagle1_pair, tiny_pair
from tiny_blocks import tiny_block_pair
from tiny_mla import YARN, tiny_mla_pair
from transformers import TrainerCallback

from hf_eagle import load_draft
from hf_eagle.training.log_lines import log_line


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ({"loss": 3.6, "epoch": 0.5}, "step 20 of 600, epoch 0.5000: loss 3.6"),
        ({"loss": 3.6041234, "learning_rate": 9.330127e-05}, "step 20 of 600: loss 3.60412, learning_rate 9.33013e-05"),
        ({"epoch": 1234.56789, "train_runtime": 1234567.8}, "step 20 of 600, epoch 1234.5679: train_runtime 1234568"),
        ({"eval_loss": float("nan"), "note": "text", "rows": 7}, "step 20 of 600: eval_loss nan, note text, rows 7"),
        ({"loss": 1.0, "total_flos": 1e18, "step": 20}, "step 20 of 600: loss 1"),
    ],
)
def test_a_line_says_where_the_run_stands(logs, line):
    assert log_line(logs, 20, 600) == line


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_have_enough_digits(value):
    written = log_line({"x": value}, 1, 2).removeprefix("step 1 of 2: x ")
    assert float(written) == pytest.approx(value, rel=1e-5, abs=1e-300)


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_every_line_of_a_run_has_step_total_and_epoch(disable_tqdm, tmp_path, capsys):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2, disable_tqdm=disable_tqdm)
    trainer.train()
    trainer.evaluate()
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "loss" in line]
    # two windows, two evaluations, the end, and the evaluation behind it
    places = [re.match(r"step (\d) of 4, epoch (\d\.\d{4}): ", line) for line in lines]
    assert [place and place[1] for place in places] == ["2", "2", "4", "4", "4", "4"], printed
    assert [place[2] for place in places] == ["0.5000", "0.5000", "1.0000", "1.0000", "1.0000", "1.0000"]


class Stopped(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("rope", ROPES)
def test_a_resumed_run_says_from_where_and_loads_without_a_warning(rope, tmp_path, caplog, capfd):
    pair = {"rope_parameters": dict(ROPES[rope])}
    trainer = make_trainer(tmp_path, tiny_pair(40, **pair), save_steps=2)
    trainer.add_callback(Stopped())
    trainer.train()
    trained = {name: x.clone() for name, x in trainer.weights_to_save().items()}

    caplog.clear(), capfd.readouterr()
    again = make_trainer(tmp_path, tiny_pair(40, **pair), save_steps=2)
    with caplog.at_level(logging.INFO, "hf_eagle"), warnings.catch_warnings():
        warnings.simplefilter("error")
        again.train(resume_from_checkpoint="last")
    folder = tmp_path / "run" / "checkpoint-2"
    assert f"Continuing from {folder}: step 2 of 4." in caplog.messages
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "[transformers]" not in capfd.readouterr().err  # its own handler
    assert again.state.global_step == 4 and trained.keys() == again.weights_to_save().keys()


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("pair", [tiny_pair, tiny_mla_pair, tiny_eagle1_pair, tiny_block_pair])
def test_loading_a_draft_warns_of_nothing_and_keeps_both_spellings(pair, rope, tmp_path, capfd):
    rope = dict(YARN if rope == "yarn" and pair is tiny_mla_pair else ROPES[rope])
    if pair is tiny_mla_pair and rope["rope_type"] not in ("default", "yarn"):
        return
    if pair is tiny_block_pair:
        target, draft = pair(fields={"rope_parameters": rope})
    else:
        target, draft = pair() if pair is tiny_eagle1_pair else pair(40, rope_parameters=rope)
    draft.save_pretrained(tmp_path)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_draft(tmp_path, target)
    assert "[transformers]" not in capfd.readouterr().err
    text = (tmp_path / "config.json").read_text()
    assert '"rope_parameters"' in text and '"rope_scaling"' in text and '"rope_theta"' in text
