"""A stream on several ranks: nothing hangs at its end, and every example is trained on once a pass."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from tiny import random_chats, tiny_eagle1_pair, tiny_pair
from tiny_blocks import tiny_block_pair
from tiny_files import write_chats, write_tiny_target
from tiny_tokenizer import CHATML, assistant, tiny_tokenizer, user
from torch.utils.data import IterableDataset
from warm_python import warm_python
from workers import losses, run_worker

from hf_eagle import EagleTrainer, EagleTrainingArguments
from hf_eagle.data.conversations import build_stream
from hf_eagle.data.loss_mask import ConversationEncoder
from hf_eagle.data.streaming import RankStream, empty_batch


ROOT = Path(__file__).resolve().parents[2]
BATCH, ACCUMULATION = 2, 2
# ranks, and the examples of each file: fewer, as many and more files than ranks
CASES = {
    "2_ranks_1_file": (2, [7]),
    "2_ranks_2_files": (2, [9, 2]),
    "2_ranks_5_files": (2, [1, 6, 3, 1, 2]),
    "2_ranks_fewer_examples": (2, [1]),
    "3_ranks_2_files": (3, [9, 5]),
    "3_ranks_3_files": (3, [8, 1, 4]),
    "3_ranks_4_files": (3, [2, 9, 1, 3]),
}


def write_files(folder, sizes):
    """Files of so many rows, and the rows' token ids."""
    records, paths = random_chats(sum(sizes), seed=3), []
    left = iter(records)
    for number, size in enumerate(sizes):
        paths.append(folder / f"{number}.jsonl")
        paths[-1].write_text("".join(json.dumps(next(left)) + "\n" for _ in range(size)))
    return [str(path) for path in paths], [record["input_ids"] for record in records]


def train(out, files, ranks, batch, max_steps, shuffle=0, **args):
    """What each rank saw in each pass, and the losses."""
    args |= {"max_steps": max_steps, "ttt_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
    args |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": ACCUMULATION}
    run_worker(out, ranks=ranks, worker="stream_worker.py", files=files, shuffle=shuffle, args=args)
    return [json.loads((out / f"seen_{rank}.json").read_text()) for rank in range(ranks)], losses(out)


def make_trainer(out, pair=None, train_dataset=None, eval_dataset=None, **args):
    target, draft = pair or tiny_pair()
    train_dataset = train_dataset or Dataset.from_list(random_chats(4))
    args = EagleTrainingArguments(str(out / "run"), report_to="none", save_strategy="no", **args)
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    return EagleTrainer(model=draft, args=args, target=target, **data)


def rows(seen, number):
    """How often all ranks together saw each row in a pass."""
    return Counter(tuple(ids) for passes in seen for ids in passes[number])


@pytest.mark.parametrize("case", CASES)
def test_every_example_is_seen_once_a_pass(case, tmp_path):
    ranks, sizes = CASES[case]
    files, examples = write_files(tmp_path, sizes)
    steps_a_pass = math.ceil(len(examples) / (ranks * BATCH * ACCUMULATION))
    max_steps = 2 * steps_a_pass + 1
    seen, curve = train(tmp_path / "ranks", files, ranks, BATCH, max_steps)

    wanted = Counter(map(tuple, examples))
    assert [len(passes) for passes in seen] == [3] * ranks
    assert rows(seen, 0) == rows(seen, 1) == wanted
    assert sorted(curve) == list(range(1, max_steps + 1))

    # a global batch holds the same examples, so it has the same loss; the third pass ends with `max_steps`
    alone, wanted_curve = train(tmp_path / "alone", files, 1, ranks * BATCH, max_steps)
    assert rows(alone, 0) == wanted and rows(alone, 2) == rows(seen, 2)
    assert curve == pytest.approx(wanted_curve, rel=1e-5)


def test_a_shuffled_stream_is_shuffled_alike_on_all_ranks(tmp_path):
    files, examples = write_files(tmp_path, [9, 2, 4])
    seen, _ = train(tmp_path / "ranks", files, 2, BATCH, 5, shuffle=8)
    assert rows(seen, 0) == rows(seen, 1) == Counter(map(tuple, examples))
    assert seen[0][0] != seen[0][1]


def test_worker_processes_read_the_files_of_a_stream(tmp_path):
    files, examples = write_files(tmp_path, [9, 2, 4])
    seen, _ = train(tmp_path / "ranks", files, 2, BATCH, 6, dataloader_num_workers=2)
    assert rows(seen, 0) == Counter(map(tuple, examples))


def test_ranks_tokenise_their_own_conversations(tmp_path, monkeypatch):
    """Records without an answer are dropped, so that ranks have different numbers of rows."""
    chats = [[user(f"Say {i}"), assistant(f"It is {i}.")][: 1 if i in (9, 11, 13) else 2] for i in range(17)]
    paths = [tmp_path / f"{number}.jsonl" for number in range(3)]
    for path, part in zip(paths, (chats[:2], chats[2:11], chats[11:]), strict=True):
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in part))

    def stream(**ranks):
        records = load_dataset("json", data_files=list(map(str, paths)), split="train", streaming=True)
        return build_stream(records, tiny_tokenizer(CHATML), max_length=64, **ranks)

    shares, whole = [stream(rank=rank, world=2) for rank in range(2)], list(stream())
    tokenised, encode = [], ConversationEncoder.encode
    monkeypatch.setattr(
        ConversationEncoder,
        "encode",
        lambda self, chats, *args, **kwargs: tokenised.extend(chats) or encode(self, chats, *args, **kwargs),
    )
    found = []
    for share, number in zip(shares, (9, 8), strict=True):
        tokenised.clear()
        found.append(list(share))
        assert len(tokenised) == number
    assert [len(rows) for rows in found] == [9, 5] and len(whole) == 14
    assert sorted(row["input_ids"] for rows in found for row in rows) == sorted(row["input_ids"] for row in whole)


def test_the_script_trains_on_more_files_than_ranks(tmp_path):
    write_tiny_target(tmp_path / "target")
    (tmp_path / "chats").mkdir()
    for number, size in enumerate((7, 1, 3)):
        write_chats(tmp_path / "chats" / f"{number}.jsonl", size)
    arguments = {"target": tmp_path / "target", "train_data": tmp_path / "chats", "output_dir": tmp_path / "out"}
    arguments |= {"max_steps": 7, "logging_steps": 1, "per_device_train_batch_size": 2, "ttt_steps": 2}
    command = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    done = warm_python().run(ROOT / "scripts" / "train_eagle.py", *command, "--streaming", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 8))


@pytest.mark.parametrize("pair", [tiny_pair, tiny_eagle1_pair, tiny_block_pair])
def test_an_empty_batch_adds_a_gradient_of_zero_to_every_parameter(pair, tmp_path):
    trainer = make_trainer(tmp_path, pair())
    counts = torch.full((trainer.step.training.steps,), 5)
    trainer.training_step(trainer.model, empty_batch(trainer.args.device), counts)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def test_streams_that_the_ranks_cannot_share_are_refused(tmp_path, monkeypatch):
    stream = Dataset.from_list(random_chats(4)).to_iterable_dataset()
    monkeypatch.setattr(EagleTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="`eval_dataset` is a stream"):
        make_trainer(tmp_path, eval_dataset=stream)
    with pytest.raises(ValueError, match="`dispatch_batches` is true in `accelerator_config`"):
        dispatched = {"accelerator_config": {"dispatch_batches": True}, "max_steps": 1}
        make_trainer(tmp_path, train_dataset=stream, **dispatched)
    monkeypatch.setattr(EagleTrainingArguments, "world_size", 1)
    with pytest.raises(ValueError, match="`dispatch_batches` is true in `accelerator_config`"):
        make_trainer(tmp_path, train_dataset=stream, **dispatched)


def test_a_stream_with_a_length_gives_the_number_of_its_batches(tmp_path):
    class Sized(IterableDataset):
        def __iter__(self):
            return iter(random_chats(7))

        def __len__(self):
            return 7

    assert [len(RankStream(Sized(), rank, 3)) for rank in range(3)] == [3, 3, 3]
    trainer = make_trainer(tmp_path, train_dataset=Sized(), per_device_train_batch_size=2, num_train_epochs=2)
    assert trainer.train().global_step == 8
