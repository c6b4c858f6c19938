"""SIGTERM and Ctrl-C while a draft is trained: a checkpoint behind the step under way, from which a run goes on."""

import os
import signal
import subprocess
import threading
import time
from datetime import timedelta

import pytest
import torch
from distributed.stopping_worker import At, stopping_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from hf_eagle.door.printer import Terminated
from hf_eagle.training import signals
from hf_eagle.training.checkpoints import checkpoints, why_incomplete
from hf_eagle.training.signals import StopSignals, leave_signals_to_parent


STATUS = {"SIGTERM": 143, "SIGINT": 130}
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}
EVERY_PASS = {"eval_strategy": "epoch", "save_strategy": "epoch"}


def run(out, at=(), resume=None, **args):
    """Trains in this process; how it was stopped, and the trainer."""
    trainer = stopping_trainer({"out": str(out), "args": args, "at": list(at)})
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt as stopped:
        return 130, str(stopped), trainer
    except Terminated as stopped:
        return stopped.code, stopped.message, trainer
    return 0, "", trainer


def weights(trainer):
    return {name: x.clone() for name, x in trainer.model.state_dict().items()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys() and all(torch.equal(x, wanted[name]) for name, x in found.items())


def evaluated(trainer):
    return [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]


ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """The weights of runs that nothing disturbs: one, and one that accumulates, which rounds otherwise."""
    return [weights(run(tmp_path_factory.mktemp("whole"), **args)[2]) for args in ({}, ACCUMULATED)]


@pytest.fixture(scope="module")
def whole(whole_runs):
    return whole_runs[0]


# ---- one process ----


@pytest.mark.parametrize(
    ("event", "step", "args", "saved", "later"),
    [
        ("on_step_begin", 0, {}, 1, []),
        ("on_step_begin", 2, ACCUMULATED, 3, []),
        ("on_substep_end", 2, ACCUMULATED, 3, []),
        ("on_optimizer_step", 2, {"dataloader_num_workers": 1}, 3, []),
        ("on_step_end", 3, {}, 3, []),
        ("on_save", 2, {"save_steps": 2}, 2, []),
        ("on_prediction_step", 2, EVERY_STEP, 2, [1, 2, 3, 4, 5, 6]),
        ("on_prediction_step", 2, {**EVERY_STEP, "save_strategy": "best", "metric_for_best_model": "loss"}, 2, None),
        ("on_evaluate", 2, EVERY_STEP, 2, [1, 2, 3, 4, 5, 6]),
        ("on_step_begin", 3, EVERY_PASS, 4, [4, 6]),  # a pass has four steps
        ("on_epoch_end", 4, EVERY_PASS, 4, [4, 6]),
        ("on_epoch_begin", 4, EVERY_PASS, 5, [4, 6]),
        ("on_prediction_step", 6, EVERY_STEP, 6, [1, 2, 3, 4, 5]),  # of a last evaluation the verb makes another one
    ],
)
def test_the_step_under_way_is_saved_and_gone_on_from(event, step, args, saved, later, whole_runs, tmp_path):
    name = "SIGTERM" if step % 2 else "SIGINT"
    status, said, _ = run(tmp_path, [{"event": event, "step": step, "do": name}], **args)
    assert status == STATUS[name]
    assert f"after step {saved}; {tmp_path}/run/checkpoint-{saved} is saved: go on with" in said
    assert "`--resume_from_checkpoint last`" in said
    newest = checkpoints(tmp_path / "run")[-1]
    assert newest.name == f"checkpoint-{saved}" and why_incomplete(newest) is None

    status, _, trainer = run(tmp_path, resume="last", **args)
    assert status == 0 and trainer.state.global_step == 6
    assert_equal(weights(trainer), whole_runs[args == ACCUMULATED])
    assert later is None or evaluated(trainer) == later


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    marks=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True),
    event=st.sampled_from(["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]),
    name=st.sampled_from(["SIGTERM", "SIGINT"]),
)
def test_a_run_that_is_stopped_time_and_again_ends_as_one_that_was_not(marks, event, name, whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("again")
    for mark in sorted(marks):
        status, _, trainer = run(out, [{"event": event, "step": mark, "do": name}], "last")
        assert status in (0, STATUS[name])
    status, _, trainer = run(out, resume="last")
    assert status == 0 and trainer.state.global_step == 6
    assert_equal(weights(trainer), whole)


def test_a_run_whose_last_step_is_done_ends_normally(whole, tmp_path):
    status, _, trainer = run(tmp_path, [{"event": "on_step_begin", "step": 5, "do": "SIGTERM"}])
    assert status == 0
    assert_equal(weights(trainer), whole)


@pytest.mark.parametrize(
    ("args", "said", "kept"),
    [
        ({"save_strategy": "no"}, "nothing was saved, since `save_strategy` is no", []),
        ({"save_only_model": True}, "without its states (`save_only_model`)", ["checkpoint-3"]),
        ({"save_only_model": True}, "`--resume_from_checkpoint last --ignore_missing_state`", ["checkpoint-3"]),
    ],
)
def test_what_cannot_be_saved_is_said(args, said, kept, tmp_path):
    status, found, _ = run(tmp_path, [{"event": "on_step_begin", "step": 2, "do": "SIGTERM"}], **args)
    assert status == 143 and said in found
    assert [path.name for path in checkpoints(tmp_path / "run")] == kept


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    args = {**EVERY_STEP, "eval_on_start": True}
    status, said, _ = run(tmp_path, [{"event": "on_prediction_step", "step": 0, "do": "SIGINT"}], **args)
    assert (status, said) == (130, "Stopped by Ctrl-C before the first step.")
    assert not checkpoints(tmp_path / "run")


def test_the_window_that_a_stop_cuts_is_logged(tmp_path):
    at = [{"event": "on_step_begin", "step": 2, "do": "SIGTERM"}]
    run(tmp_path, at, logging_steps=2)
    _, _, trainer = run(tmp_path, resume="last", logging_steps=2)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 3, 4, 6]


# ---- a second signal ----


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("copy", [True, False])
def test_a_second_signal_stops_at_once_and_a_copy_does_not(first, second, copy, tmp_path, monkeypatch):
    """A launcher sends its ranks what they have got already."""
    monkeypatch.setattr(signals, "GRACE", 1000.0 if copy else -1.0)
    asked = {"on_step_begin": first, "on_pre_optimizer_step": second}
    at = [{"event": event, "step": 2, "do": name} for event, name in asked.items()]
    status, said, _ = run(tmp_path, at)
    assert status == STATUS[first if copy else second]
    assert ("checkpoint-3 is saved" in said) if copy else ("at once by a second signal" in said)
    assert [path.name for path in checkpoints(tmp_path / "run")] == (["checkpoint-3"] if copy else [])


def test_a_rank_that_stands_in_a_collective_is_ended_by_the_second_signal():
    """Where Python runs no handler. A wait for a store is as deaf as one for a rank."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        signals.GRACE = 0.1
        with StopSignals(alone=False).heard():
            os.write(2, b"waits\n")
            store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            store.wait(["never"], timedelta(seconds=300))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as printed:
        assert printed.readline() == "waits\n"
        os.kill(child, signal.SIGTERM)
        assert printed.readline().startswith("SIGTERM: the run stops when this step is done")
        time.sleep(0.2)
        os.kill(child, signal.SIGINT)
        assert "Stopped at once by a second signal, Ctrl-C" in printed.readline()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


# ---- handlers ----


@pytest.mark.parametrize("alone", [True, False])
def test_handlers_are_there_for_a_time(alone):
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    threads = threading.active_count()
    stops = StopSignals(alone, tells=False)
    with pytest.raises(ZeroDivisionError), stops.heard():
        os.kill(os.getpid(), signal.SIGTERM)
        _ = 1 / 0
    assert stops.asked == signal.SIGTERM
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert threading.active_count() == threads and signal.set_wakeup_fd(-1) == -1


def test_another_thread_leaves_handlers_alone(tmp_path):
    before, seen = [signal.getsignal(number) for number in signals.SIGNALS], []

    def train():
        trainer = stopping_trainer({"out": str(tmp_path), "args": {"max_steps": 1}})
        trainer.add_callback(At("on_step_begin", 0, 0.0))
        trainer.train()
        seen.append([signal.getsignal(number) for number in signals.SIGNALS])

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup` and background jobs of shells do
    try:
        stops = StopSignals(tells=False)
        with stops.heard():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and stops.asked is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("alone", [True, False])
def test_what_ends_a_forked_child_is_no_request_to_its_parent(alone):
    stops = StopSignals(alone, tells=False)
    with stops.heard():
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, b".")  # a signal in the middle of a fork may be lost, with any handler
            signal.pause()
        os.read(reader, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        os.close(reader), os.close(writer)
        time.sleep(0.05)
    assert stops.asked is None


# ---- processes that read data ----


class Pids(Dataset):
    """Rows that are the pid of the process that reads them."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return os.getpid()


def test_workers_outlive_a_signal_to_their_group_and_end_with_their_parent():
    loader = DataLoader(
        Pids(), num_workers=1, prefetch_factor=1, worker_init_fn=lambda i: leave_signals_to_parent(None, i)
    )
    rows = iter(loader)
    worker = int(next(rows))
    for name in ("TERM", "INT"):  # from a stranger, as a scheduler is one
        subprocess.run(["kill", f"-{name}", str(worker)], check=True)
    assert [int(x) for x in rows] == [worker] * 3

    rows = iter(loader)
    process = rows._workers[0]
    assert int(next(rows)) == process.pid
    process.terminate()  # as the parent does with a worker that does not end
    process.join(30)
    assert process.exitcode == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_of_a_trainer_shield_their_workers(workers, tmp_path):
    trainer = stopping_trainer({"out": str(tmp_path), "args": {"dataloader_num_workers": workers}})
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        shielded = getattr(loader.base_dataloader.worker_init_fn, "func", None) is leave_signals_to_parent
        assert shielded == bool(workers)
