"""Streams that are shuffled and tokenised on the way: their order, their end, and how they go on from a place."""

import json
import logging
import pickle
from collections import Counter

import pytest
from tiny_tokenizer import CHATML, tiny_tokenizer
from torch.utils.data import DataLoader

from hf_eagle.data.conversations import build_dataset, build_stream
from hf_eagle.data.loss_mask import ConversationEncoder
from hf_eagle.data.records import count_records, load_records
from hf_eagle.data.streaming import RankStream
from hf_eagle.data.token_stream import ShuffledRecords


def fill(folder, sizes, kind="jsonl"):
    """Files of so many records, of which every ninth has no answer; paths."""
    number, paths = 0, []
    for place, size in enumerate(sizes):
        numbers = range(number, number + size)
        rows = [{"prompt": f"q {n}", **({"completion": f"a {n}"} if n % 9 else {})} for n in numbers]
        paths.append(folder / f"{place}.{kind}")
        if kind == "csv":
            lines = ["prompt,completion", *(f"{row['prompt']},{row.get('completion', '')}" for row in rows)]
        else:
            lines = [json.dumps(row) for row in rows]
        paths[-1].write_text("\n".join(lines) + "\n")
        number += size
    return paths


def stream(sources, epoch=0, shuffle=30, **options):
    records = load_records(sources, streaming=True)
    if shuffle:
        records = ShuffledRecords(records, seed=3, buffer_size=shuffle)
    made = build_stream(records, tiny_tokenizer(CHATML), 64, **options)
    made.set_epoch(epoch)
    return made


def ids(rows):
    return [tuple(row["input_ids"]) for row in rows]


SOURCES = {
    "one file": lambda folder: fill(folder, [150]),
    "files": lambda folder: folder if fill(folder, [40, 1, 90]) else None,
    "csv": lambda folder: fill(folder, [100], "csv"),
    "mixture": lambda folder: fill(folder, [50, 40]),
}


@pytest.mark.parametrize("shuffle", [0, 30, 1000])
@pytest.mark.parametrize("source", SOURCES)
def test_a_stream_goes_on_where_it_was(source, shuffle, tmp_path):
    """What was given before and what comes after are together what a stream gives that was never stopped."""
    sources = SOURCES[source](tmp_path)
    for epoch in (0, 2):
        whole = ids(stream(sources, epoch, shuffle))
        for stop in (0, 1, 63, 64, 70, len(whole) - 1, len(whole)):
            first = stream(sources, epoch, shuffle)
            rows = iter(first)
            given = ids(next(rows) for _ in range(stop))
            state = pickle.loads(pickle.dumps(first.state_dict()))
            second = stream(sources, 0, shuffle)
            second.load_state_dict(state)
            assert given + ids(second) == whole, stop
        second.set_epoch(epoch + 1)
        assert ids(second) == ids(stream(sources, epoch + 1, shuffle))


def test_ranks_go_on_where_they_were(tmp_path):
    """Ranks share by example: before tokenising, and of streams that share nothing themselves after it."""
    sources = fill(tmp_path, [40, 1, 90])
    whole = ids(stream(sources))
    for made in (
        lambda rank: RankStream(stream(sources, rank=rank, world=2)),
        lambda rank: RankStream(stream(sources), rank, 2),
    ):
        found = []
        for rank in range(2):
            first, second = made(rank), made(rank)
            rows = iter(first)
            found += ids(next(rows) for _ in range(21 + rank))
            second.load_state_dict(first.state_dict())
            found += ids(second)
        assert Counter(found) == Counter(whole)


@pytest.mark.parametrize("world", [1, 2])
def test_worker_processes_share_the_files(world, tmp_path):
    fill(tmp_path, [40, 1, 90, 20])
    found = []
    for rank in range(world):
        loader = DataLoader(stream(tmp_path, rank=rank, world=world), batch_size=None, num_workers=2)
        found += [tuple(row["input_ids"]) for row in loader]
    assert Counter(found) == Counter(ids(stream(tmp_path)))


def test_passes_differ_in_order_only(tmp_path):
    fill(tmp_path, [40, 1, 90])
    first, second = ids(stream(tmp_path)), ids(stream(tmp_path, epoch=1))
    assert first != second and Counter(first) == Counter(second) and len(set(first)) == len(first)
    plain = ids(build_dataset(load_records(tmp_path), tiny_tokenizer(CHATML), 64))
    assert ids(stream(tmp_path, shuffle=0)) == plain and Counter(first) == Counter(plain)


@pytest.mark.parametrize(
    "late, message",
    [
        ("null", "Line 201 of .*0.jsonl must be an object"),
        ('{"prompt": 3, "completion": "a", "finish_reason": 7}', "0.jsonl: Record 200: `finish_reason` must be"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "0.jsonl: Record 200: message 0 has the unknown role"),
        ('{"prompt": "q", "completion": [[1]]}', "0.jsonl: Record 200: "),
        ("[[[", "Line 201 of .*0.jsonl is not JSON"),
        ("[" * 101, "Line 201 of .*0.jsonl is nested more than 100 levels"),
    ],
)
def test_a_bad_record_is_named_whenever_it_comes_or_left_out(late, message, tmp_path, caplog):
    (path,) = fill(tmp_path, [200])
    with path.open("a") as file:
        file.write(late + "\n" + json.dumps({"prompt": "q", "completion": 7}) + "\n")
    tokenizer = tiny_tokenizer(CHATML)
    for shuffle in (0, 30):
        with pytest.raises(ValueError, match=message):
            list(stream(path, shuffle=shuffle))
    with pytest.raises(ValueError, match=message):
        build_dataset(load_records(path), tokenizer, 64)

    skip = {"skip_bad_records": True}
    records = load_records(path, streaming=True, **skip)
    with caplog.at_level(logging.WARNING):
        assert len(list(build_stream(records, tokenizer, 64, **skip))) == 178
        for _ in range(2):  # made, and read back from the cache
            assert len(build_dataset(load_records(path, **skip), tokenizer, 64, **skip)) == 178
    assert count_records(path) >= 201  # what cannot be read is no record
    with pytest.raises(ValueError, match=message):  # although what another run left out is in the cache
        build_dataset(load_records(path), tokenizer, 64)
    told = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(told) >= 3 and all("1 " in line for line in told)


BAD = {
    "role": '{"messages": [{"role": "alien", "content": "x"}]}',
    "type": '{"prompt": "q", "completion": [[1]]}',
    "object": '{"messages": [3]}',
    "reason": '{"prompt": 3, "completion": "a", "finish_reason": 7}',
}


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("kind", BAD)
def test_a_stream_names_its_first_bad_records_and_counts_all_of_them_once(kind, number, tmp_path, caplog):
    (path,) = fill(tmp_path, [30])
    with path.open("a") as file:
        file.write((BAD[kind] + "\n") * number)
    skip = {"skip_bad_records": True}
    made = build_stream(load_records(path, streaming=True, **skip), tiny_tokenizer(CHATML), 64, **skip)
    for epoch in range(3):
        made.set_epoch(epoch)
        assert len(list(made)) == 26
    told = [r.getMessage() for r in caplog.records if r.name == "hf_eagle.data.token_stream"]
    named, counted = told[: min(number, 3)], told[min(number, 3) :]
    for place, line in enumerate(named, start=30):
        assert line.startswith(f"A bad record is skipped: {path}: Record {place}: ") and len(line) > len(str(path)) + 60
    counts = {1: "1 bad record of the stream was", 3: "3 bad records were", 5: "5 bad records were"}
    assert counted == [f"{counts[number]} left out in this pass; later passes leave out the same."]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_name_no_more_and_not_in_every_pass(workers, tmp_path):
    for path in fill(tmp_path, [30, 30]):
        with path.open("a") as file:
            file.write((BAD["role"] + "\n") * 4)
    skip = {"skip_bad_records": True}
    made = build_stream(load_records(tmp_path, streaming=True, **skip), tiny_tokenizer(CHATML), 64, **skip)
    loader = DataLoader(RankStream(made), batch_size=None, num_workers=workers)

    logger, handler = logging.getLogger("hf_eagle.data.token_stream"), logging.FileHandler(tmp_path / "log")
    logger.addHandler(handler)
    for epoch in range(2):
        loader.dataset.set_epoch(epoch)
        list(loader)
    logger.removeHandler(handler)

    told = (tmp_path / "log").read_text()
    assert 1 <= told.count("A bad record is skipped") <= 2 + workers and told.count("left out in this pass") == workers


def test_a_stream_counts_answers_of_white_space(tmp_path, caplog):
    (path,) = fill(tmp_path, [30])
    with path.open("a") as file:
        file.write('{"prompt": "q", "completion": " "}\n' * 3)
    made = build_stream(load_records(path, streaming=True), tiny_tokenizer(CHATML), 64)
    for epoch in range(2):
        made.set_epoch(epoch)
        assert len(list(made)) == 26
    assert caplog.text.count("3 answers are empty or white space only") == 1


def test_a_stream_without_an_answer_is_refused_at_once(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "q"}\n' * 200)
    for shuffle in (0, 30):
        with pytest.raises(ValueError, match="No conversation has a supervised token"):
            stream(path, shuffle=shuffle)
    with path.open("a") as file:
        file.write('{"prompt": "q", "completion": "a"}\n')
    assert len(list(stream(path))) == 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_places_are_kept_so_that_ranks_give_what_one_gives(world, tmp_path):
    """In each turn, whatever has no answer; else a rank whose records have none would run ahead of the others."""
    fill(tmp_path, [40, 1, 90])
    whole = list(stream(tmp_path, keep_places=True))
    assert len(whole) == 131 and sum(row is None for row in whole) == 15
    assert [row for row in whole if row is not None] == list(stream(tmp_path))
    shares = [list(stream(tmp_path, rank=rank, world=world, keep_places=True)) for rank in range(world)]
    assert [shares[n % world][n // world] for n in range(131)] == whole


@pytest.mark.parametrize("world", [1, 2])
def test_rows_that_are_passed_over_are_not_tokenised(world, tmp_path, monkeypatch):
    sources, tokenised, encode = fill(tmp_path, [150]), [], ConversationEncoder.encode
    whole = list(stream(sources, rank=world - 1, world=world, keep_places=True))
    monkeypatch.setattr(
        ConversationEncoder,
        "encode",
        lambda self, chats, *args, **kwargs: tokenised.extend(chats) or encode(self, chats, *args, **kwargs),
    )
    for number in (0, 1, 31, 32, 64, 70, 75, 1000):
        made = RankStream(stream(sources, rank=world - 1, world=world, keep_places=True))
        made.pass_over(0, number)
        made.set_epoch(0)
        tokenised.clear()
        over = min(number, len(whole))
        assert list(made) == [None] * over + whole[over:]
        assert len(tokenised) <= len(whole) - over
        made.set_epoch(1)  # is read as a whole
        assert sum(row is None for row in made) <= 17


def test_workers_that_live_on_learn_of_the_next_pass(tmp_path):
    sources = fill(tmp_path, [40])
    made, wanted = (RankStream(stream(sources, keep_places=True)) for _ in range(2))
    loader = DataLoader(made, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 2):
        made.set_epoch(epoch)
        wanted.set_epoch(epoch)
        assert list(loader) == list(wanted)
