"""What is said of a launcher that did not do what it was asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_trainer import make_trainer
from warm_python import warm_python
from workers import WORKERS

from hf_eagle.training.launching import asked_processes, told_of_launch


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "training_args" / "accelerate"
HERE = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": "/nowhere", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ("/env/bin/python /env/bin/accelerate launch --cpu --num_processes 2 train.py --num_processes 9", 2),
        ("/env/bin/accelerate launch --num-processes=4 -m hf_eagle train", 4),
        ("python -m accelerate.commands.accelerate_cli launch --num_processes 3 train.py", 3),
        ("python -m accelerate.commands.launch --num_processes 3 train.py", 3),
        ("/env/bin/accelerate-launch --num_processes 2 train.py", 2),
        (f"accelerate launch --config_file {CONFIGS}/fsdp2.yaml --cpu train.py", 8),
        (f"accelerate launch --config_file {CONFIGS}/fsdp2.yaml --num_processes 2 train.py", 2),
        (f"accelerate launch --config_file {CONFIGS}/single.yaml train.py", 1),
        ("accelerate launch --cpu train.py", None),
        ("accelerate launch --config_file /nowhere.yaml train.py", None),
        ("accelerate launch --num_processes many train.py", None),
        ("accelerate config", None),
        ("torchrun --nproc-per-node 2 train.py", None),
        ("bash launch --num_processes 2", None),
        ("", None),
    ],
)
def test_what_a_launch_command_asks_for(command, processes, capsys):
    assert asked_processes(command.split()) == processes
    capsys.readouterr()


@pytest.mark.parametrize(
    ("asked", "sharded", "processes", "said"),
    [(True, False, 2, "A sharded draft was asked for"), (True, True, 2, None), (False, False, 2, None)],
)
def test_a_replicated_draft_is_said_where_a_sharded_one_was_asked_for(asked, sharded, processes, said):
    told = list(told_of_launch(asked, sharded, processes))
    assert (told == []) if said is None else told[0].startswith(said) and "each of the 2 processes" in told[0]


def test_fewer_processes_than_asked_for_are_said():
    """Started by accelerate's own launcher, whose command this process reads."""
    child = (
        "import sys; from hf_eagle.training.launching import told_of_launch; print(*told_of_launch(False, False, 1))"
    )
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    found = subprocess.run(
        [*command, "--no_python", sys.executable, "-c", child], capture_output=True, text=True, env=HERE
    )
    assert found.stdout.startswith("`accelerate launch` was asked for 2 processes and started one"), found.stderr
    assert "torchrun --nproc-per-node 2" in found.stdout
    alone = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, env=HERE)
    assert alone.stdout.strip() == ""


def test_a_run_of_one_process_that_nobody_launched_says_nothing(tmp_path, caplog):
    make_trainer(tmp_path)
    assert not [record for record in caplog.records if record.name.endswith("launching")]


def test_two_ranks_that_were_to_shard_on_cpus_say_it_once(tmp_path):
    spec = {"out": str(tmp_path), "tied": True, "records": 8, "args": {"max_steps": 1, "fsdp": True, "fsdp_config": {}}}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    done = warm_python().run(WORKERS / "train_worker.py", tmp_path / "spec.json", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("A sharded draft was asked for") == 1
