"""A run on a stream goes on where it was: in any pass, at any step, with workers or without, and never twice."""

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_chats, tiny_llama
from tiny_tokenizer import CHATML, assistant, tiny_tokenizer, user
from torch.utils.data import IterableDataset

from hf_eagle import EagleConfig, EagleTrainer, EagleTrainingArguments, pack_dataset
from hf_eagle.data.conversations import build_stream, load_records
from hf_eagle.data.reads import what_is_read
from hf_eagle.data.streaming import RankStream
from hf_eagle.data.token_stream import ShuffledRecords
from hf_eagle.drafts.build import new_draft
from hf_eagle.targets.target import FrozenTarget
from hf_eagle.training.checkpoints import MANIFEST, read_manifest
from hf_eagle.training.parts import conversations
from hf_eagle.training.run_arguments import RunArguments
from hf_eagle.training.stream_place import StreamPlace, check_same_data, check_stream_place, place_of


STEPS, A_PASS = 9, 4  # of four rows, the last of a pass of fewer
TOKENIZER = tiny_tokenizer(CHATML)


class Sized(IterableDataset):
    """A stream that has a length, and an order in each pass."""

    epoch = 0

    def __iter__(self):
        rows = random_chats(13, seed=4)
        return iter(rows[self.epoch :] + rows[: self.epoch])

    def __len__(self):
        return 13

    def set_epoch(self, epoch):
        self.epoch = epoch


def chats(folder):
    """As `--streaming` reads them; the fourth and the ninth have no answer, and the last pass step has one chat."""
    path = folder / "chats.jsonl"
    lines = ([user(f"Say {n}"), assistant(f"It is {n}.")][: 1 if n in (3, 8) else 2] for n in range(15))
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in lines))
    records = ShuffledRecords(load_records(path, streaming=True), seed=3, buffer_size=6)
    return RankStream(build_stream(records, TOKENIZER, max_length=64, keep_places=True))


def shuffled(folder, rows=None):
    rows = Dataset.from_list(random_chats(13, seed=4)) if rows is None else rows
    return rows.to_iterable_dataset(3).shuffle(seed=1, buffer_size=5)


STREAMS = {
    "shuffled": shuffled,
    "packed": lambda folder: shuffled(folder, pack_dataset(Dataset.from_list(random_chats(33, seed=4)), 48)),
    "sized": lambda folder: Sized(),
    "chats": chats,
}
ROWS = {"shuffled": 13, "packed": 14, "sized": 13, "chats": 13}


class SeeingTrainer(EagleTrainer):
    """Notes which rows counted in each step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["loss_mask"], strict=True)
        ids = [tuple(ids[real].tolist()) for ids, real, answers in rows if answers.any()]
        self.seen.setdefault(self.state.global_step, []).extend(ids)
        return super().compute_loss(model, inputs, *args, **kwargs)


def make(folder, stream, **fields):
    fields = {"max_steps": STEPS, "save_steps": 1, "logging_steps": 1, "ttt_steps": 2, "learning_rate": 3e-3} | fields
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | fields
    args = EagleTrainingArguments(str(folder / "run"), report_to="none", disable_tqdm=True, use_cpu=True, **fields)
    target = FrozenTarget(tiny_llama(vocab_size=len(TOKENIZER)))
    config = EagleConfig.from_target(target.config, None, initializer_range=0.2)
    target.tap_ids = config.tap_ids
    draft = new_draft(config, target.embedding_weight(), None)
    trainer = SeeingTrainer(model=draft, args=args, target=target, train_dataset=stream)
    trainer.seen = {}
    return trainer


def train(folder, stream, resume=None, **fields):
    """Loss and rows of each step."""
    folder.mkdir(exist_ok=True)
    trainer = make(folder, STREAMS[stream](folder), **fields)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return {x["step"]: x["loss"] for x in trainer.state.log_history if "loss" in x}, trainer.seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing disturbed, by stream and workers: their folder, losses and rows."""
    made = {}

    def run(stream, workers=0):
        if (stream, workers) not in made:
            folder = tmp_path_factory.mktemp(f"{stream}{workers}")
            made[stream, workers] = (folder / "run", *train(folder, stream, dataloader_num_workers=workers))
        return made[stream, workers]

    return run


def assert_goes_on(whole, step, folder, stream, **fields):
    _, losses, rows = whole
    found, seen = train(folder, stream, whole[0] / f"checkpoint-{step}", save_strategy="no", **fields)
    assert found == losses and sorted(losses) == list(range(1, STEPS + 1))
    assert seen == {n: rows[n] for n in range(step, STEPS)}


# in the first pass, at its end, in a later pass, and at the end of that
@pytest.mark.parametrize("step", [1, A_PASS, A_PASS + 2, 2 * A_PASS])
@pytest.mark.parametrize("stream", STREAMS)
def test_a_run_goes_on_with_the_rows_that_are_left(stream, step, whole, tmp_path):
    assert_goes_on(whole(stream), step, tmp_path, stream)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stream", ["shuffled", "chats"])
def test_workers_that_have_read_ahead_change_nothing(stream, workers, whole, tmp_path):
    for step in (A_PASS - 1, A_PASS + 2):
        assert_goes_on(whole(stream, workers), step, tmp_path, stream, dataloader_num_workers=workers)


@pytest.mark.parametrize("batch, accumulation", [(1, 4), (4, 1)])
def test_a_step_may_be_cut_otherwise(batch, accumulation, whole, tmp_path):
    _, losses, rows = whole("chats")
    fields = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "save_strategy": "no"}
    found, seen = train(tmp_path, "chats", whole("chats")[0] / f"checkpoint-{A_PASS + 2}", **fields)
    assert seen == {n: rows[n] for n in range(A_PASS + 2, STEPS)}
    assert found == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("stream", STREAMS)
def test_every_row_is_seen_once_a_pass(stream, whole):
    rows = whole(stream)[2]
    for first in (0, A_PASS):
        counts = Counter(row for step in range(first, first + A_PASS) for row in rows[step])
        assert len(counts) == ROWS[stream] and set(counts.values()) == {1}


def test_a_checkpoint_holds_pass_and_step(whole):
    for step in range(1, STEPS + 1):
        held = read_manifest(whole("chats")[0] / f"checkpoint-{step}")["stream"]
        assert (held["number"], held["steps"]) == ((step - 1) // A_PASS, (step - 1) % A_PASS + 1)


def test_what_is_saved_behind_a_pass_goes_on_in_the_next(whole, tmp_path):
    (tmp_path / "first").mkdir()
    train(tmp_path / "first", "shuffled", save_strategy="epoch")
    checkpoint = tmp_path / "first" / "run" / f"checkpoint-{A_PASS}"
    held = read_manifest(checkpoint)["stream"]
    assert (held["number"], held["steps"]) == (1, 0)
    found, seen = train(tmp_path / "second", "shuffled", checkpoint, save_strategy="no")
    assert (found, seen) == (whole("shuffled")[1], {n: whole("shuffled")[2][n] for n in range(A_PASS, STEPS)})


@pytest.mark.parametrize("step", [1, A_PASS, A_PASS + 2, 2 * A_PASS])
@pytest.mark.parametrize("stream", ["shuffled", "sized"])
def test_a_checkpoint_from_before_places_were_kept_says_by_its_epoch(stream, step, whole, tmp_path):
    path = whole(stream)[0] / f"checkpoint-{step}" / MANIFEST
    kept = path.read_text()
    try:
        path.write_text(json.dumps({name: x for name, x in json.loads(kept).items() if name != "stream"}))
        assert_goes_on(whole(stream), step, tmp_path, stream)
    finally:
        path.write_text(kept)


def test_ignore_data_skip_begins_the_pass_again(whole, tmp_path):
    _, _, rows = whole("shuffled")
    fields = {"ignore_data_skip": True, "save_strategy": "no"}
    _, seen = train(tmp_path, "shuffled", whole("shuffled")[0] / f"checkpoint-{A_PASS + 2}", **fields)
    assert [seen[n] for n in range(A_PASS + 2, STEPS)] == [rows[n] for n in range(A_PASS, STEPS - 2)]


ALIKE = {"ranks": 2, "batch": 2, "workers": 0, "by_number": True}
CHANGES = {
    "nothing": ({}, {}, True),
    "ranks": ({}, {"ranks": 1, "batch": 4}, True),
    "ranks, one worker": ({"workers": 1}, {"workers": 1, "ranks": 1}, True),
    "a worker": ({}, {"workers": 1}, False),
    "nothing, by files": ({"workers": 2}, {"workers": 2}, True),
    "nothing, not by number": ({"by_number": False}, {"by_number": False}, True),
    "more workers": ({}, {"workers": 2}, False),
    "fewer workers": ({"workers": 2}, {}, False),
    "ranks, by files": ({"workers": 2}, {"workers": 2, "ranks": 1}, False),
    "batch, by files": ({"workers": 2}, {"workers": 2, "batch": 1}, False),
    "ranks, not by number": ({"by_number": False}, {"ranks": 1}, False),
    "to ranks that share otherwise": ({"ranks": 1}, {"by_number": False}, False),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_place_that_would_mean_other_rows_is_refused(case, tmp_path):
    before, now, fits = CHANGES[case]
    held = {"number": 1, "steps": 2, **ALIKE, **before}
    (tmp_path / MANIFEST).write_text(json.dumps({"files": {}, "stream": held}))
    now = StreamPlace(**(ALIKE | now))
    if fits:
        return check_stream_place(tmp_path, now)
    with pytest.raises(ValueError, match="`dataloader_num_workers` .*: keep all three .*`ignore_data_skip`"):
        check_stream_place(tmp_path, now)


def test_a_run_says_so_before_anything_is_read(whole, tmp_path):
    trainer = make(tmp_path, shuffled(tmp_path), dataloader_num_workers=2)
    with pytest.raises(ValueError, match="checkpoint-2 was written on 1 processes"):
        trainer.train(resume_from_checkpoint=str(whole("shuffled")[0] / "checkpoint-2"))


def test_a_place_that_is_none_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps({"files": {}, "stream": {"number": 0, "steps": -1, **ALIKE}}))
    with pytest.raises(ValueError, match="holds a `stream.steps` below 0: choose another checkpoint"):
        read_manifest(tmp_path)


# ---- data that were read as a stream, and now are not ----

WRITTEN = {"stream": {"number": 0, "steps": 2, **ALIKE}, "map": None, "an earlier version": "nothing"}


def write_checkpoint(folder, written):
    """As far as its completeness goes, and what it says about its data."""
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "model.safetensors"):
        (folder / name).write_bytes(b"x")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": []}))
    held = {"files": {}, "rows_per_step": 4, "stream": WRITTEN[written]}
    held = {name: value for name, value in held.items() if value != "nothing"}
    (folder / MANIFEST).write_text(json.dumps(held))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("written", WRITTEN)
def test_a_recipe_that_reads_its_data_otherwise_is_refused_before_loading(written, streaming, skip, tmp_path):
    write_checkpoint(tmp_path / "out" / "checkpoint-2", written)
    command = ["--target", "nothing", "--train_data", "nothing", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    command += ["--resume_from_checkpoint", "last", "--max_steps", "4", "--report_to", "none"]
    command += (["--streaming"] if streaming else []) + (["--ignore_data_skip"] if skip else [])
    run = RunArguments.parse(command)
    if skip or written == "an earlier version" or (written == "stream") == streaming:
        assert run.refuse_before_loading() == tmp_path / "out" / "checkpoint-2"
        return

    told = ("set", "whole data", "leave it out") if streaming else ("not set", "a stream", "set it")
    told = "`streaming` is {}, but .*checkpoint-2 was written by a run on {}, .*: {}, or .*`ignore_data_skip`".format(
        *told
    )
    with pytest.raises(ValueError, match=told):
        run.refuse_before_loading()


# ---- a stream of other data ----


def command(folder, *data, **more):
    words = ["--target", "nothing", "--output_dir", str(folder / "out"), "--use_cpu", "--report_to", "none"]
    words += ["--streaming", "--resume_from_checkpoint", "last", "--max_steps", "4", "--train_data", *map(str, data)]
    return words + [word for name, value in more.items() for word in (f"--{name}", *map(str, value))]


def write_data(folder):
    for name, number in (("big.jsonl", 9), ("good.jsonl", 3)):
        (folder / name).write_text('{"prompt": "q", "completion": "a"}\n' * number)
    (folder / "c.csv").write_text("prompt,completion\nq,a\n")
    return folder / "big.jsonl", folder / "c.csv", folder / "good.jsonl"


def write_place(folder, reads):
    write_checkpoint(folder / "out" / "checkpoint-2", "stream")
    path = folder / "out" / "checkpoint-2" / MANIFEST
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"stream": held["stream"] | reads}))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("known", ["reads", "nothing", "none"])
def test_a_stream_of_other_data_is_refused_before_loading(known, skip, tmp_path):
    big, table, good = write_data(tmp_path)
    held = {"reads": {"reads": what_is_read([str(big), str(table)])}, "nothing": {}, "none": {"reads": None}}
    write_place(tmp_path, held[known])
    for data, more in (((good, table), {}), ((big,), {}), ((table, big), {}), ((big, table), {"data_weights": (1, 3)})):
        words = command(tmp_path, *data, **more, **({"ignore_data_skip": ()} if skip else {}))
        run = RunArguments.parse(words)
        if skip or known != "reads":
            assert run.refuse_before_loading() == tmp_path / "out" / "checkpoint-2"
            continue
        with pytest.raises(
            ValueError, match="^`train_data` is .*checkpoint-2 was written by a run on big.jsonl"
        ) as told:
            run.refuse_before_loading()
        assert "`ignore_data_skip`" in str(told.value) and data[0].name in str(told.value).partition(", but ")[0]


@pytest.mark.parametrize(
    "more",
    [
        {"save_steps": (7,), "dataloader_num_workers": (1,)},
        {"gradient_accumulation_steps": (2,), "per_device_train_batch_size": (3,)},
        {"data_weights": (5, 5), "max_length": (77,)},
    ],
)
def test_the_same_data_go_on_under_another_configuration_and_from_elsewhere(more, tmp_path):
    big, table, _ = write_data(tmp_path)
    write_place(tmp_path, {"reads": what_is_read([str(big), str(table)])})
    moved = tmp_path / "moved" / big.name
    moved.parent.mkdir()
    for here in (big, moved):
        big.replace(here)
        run = RunArguments.parse(command(tmp_path, here, table, **more))
        assert run.refuse_before_loading() == tmp_path / "out" / "checkpoint-2"


def test_a_checkpoint_notes_what_is_read(tmp_path):
    big, table, _ = write_data(tmp_path)
    run = RunArguments.parse(command(tmp_path, big, table, data_weights=(1, 3)))
    stream, _ = conversations(TOKENIZER, run.data, run.training)
    trainer = make(tmp_path, stream, max_steps=1)
    trainer.train()
    reads = what_is_read([str(big), str(table)], [1, 3])
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert read_manifest(checkpoint)["stream"]["reads"] == reads and place_of(checkpoint).reads == reads


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
@settings(deadline=None, max_examples=60)
def test_what_a_manifest_says_is_read_may_be_anything(found):
    with tempfile.TemporaryDirectory() as folder:
        for reads in (found, [found], [{"source": "a", "share": found}], [{"source": "a", "share": 1, "files": found}]):
            held = {"number": 0, "steps": 1, **ALIKE, "reads": reads}
            (Path(folder) / MANIFEST).write_text(json.dumps({"files": {}, "stream": held}))
            try:
                check_same_data(folder, what_is_read(["org/chats"]))
            except ValueError as problem:
                assert folder in str(problem) and str(problem).endswith(".")


def test_a_trainer_refuses_data_that_are_read_otherwise(whole, tmp_path):
    rows = Dataset.from_list(random_chats(13, seed=4))
    make(tmp_path / "map", rows, max_steps=2).train()
    of_map, of_stream = tmp_path / "map" / "run" / "checkpoint-2", whole("shuffled")[0] / "checkpoint-2"
    cases = [
        (of_stream, rows, "no stream, but .* on one,"),
        (of_map, shuffled(tmp_path), "a stream, but .* that are none,"),
    ]
    for checkpoint, data, told in cases:
        for fields in ({}, {"auto_find_batch_size": True}):
            with pytest.raises(ValueError, match=f"`train_dataset` is {told} .*: give `train_dataset` as before, or"):
                make(tmp_path / "no", data, **fields).train(resume_from_checkpoint=str(checkpoint))
        trainer = make(tmp_path / "no", data, max_steps=3, ignore_data_skip=True, save_strategy="no")
        assert trainer.train(resume_from_checkpoint=str(checkpoint)).global_step == 3
