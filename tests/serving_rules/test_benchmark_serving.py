"""What the benchmark of a real vLLM makes of its runs, and what it says instead; tests/serving runs real engines."""

import base64
import json
import runpy
import sys
from pathlib import Path

import pytest
from chain_models import VOCAB, make_draft, make_target
from forks import ROOT
from tiny_tokenizer import word_tokenizer
from tiny_vision import chat, image, picture, processed, text, vision_processor

from hf_eagle.door.journal import Journal
from hf_eagle.evaluation.prompts import Prompt, load_prompts
from hf_eagle.serving.served_prompts import engine_arguments, served_prompts
from hf_eagle.serving.speed import (
    Engine,
    _summary,
    measure_serving,
    model_identity,
    table,
    table_of_categories,
    verdict,
)


def run(seconds, *lengths, drafts=0, accepted=(), token=7):
    return {
        "seconds": seconds,
        "token_ids": [[token] * length for length in lengths],
        "drafts": drafts,
        "accepted_tokens": sum(accepted),
        "accepted_per_position": list(accepted),
    }


def test_an_entry_sums_up_rounds_that_alternated():
    """The machine was slow in the second round: each round is held to its own run without a draft."""
    alone = [run(1, 10, 10), run(4, 10, 10), run(1, 10, 10)]
    drafted = [run(0.5, 10, 10, drafts=8, accepted=(6, 4)), run(2, 10, 10), run(0.8, 10, 10)]
    entry = _summary(2, 1, drafted, alone)
    assert entry["tokens_per_second"] == 25 and entry["tokens_per_second_range"] == [10, 40]
    assert entry["speedup"] == 2 and entry["speedup_range"] == [1.25, 2]
    assert entry["acceptance_length"] == 1 + 10 / 8 and entry["accepted_per_position"] == [6, 4]
    assert entry["identical_answers"] == 1

    entry = _summary(0, 1, alone, alone)
    assert entry["speedup"] == 1 and entry["acceptance_length"] is None
    other = [run(1, 10, 9)] * 3
    assert _summary(2, 1, other, alone)["identical_answers"] == 0.5


def test_the_table_says_where_the_draft_stops_paying():
    alone, fast, slow = (
        [run(1, 100)],
        [run(0.5, 100, drafts=50, accepted=(50,))],
        [run(2, 100, drafts=50, accepted=(50,))],
    )
    entries = [_summary(count, size, runs, alone) for count, size, runs in ((0, 1, alone), (0, 8, alone))]
    entries += [_summary(1, 1, fast, alone), _summary(1, 8, slow, alone)]
    assert table(entries).splitlines() == [
        "| K | acceptance length | batch 1 | batch 8 |",
        "|---|---|---|---|",
        "| no draft |  | 100.0 tokens/s | 100.0 tokens/s |",
        "| 1 | 2.000 | 200.0 (2.00x) | 50.0 (0.50x) |",
    ]
    assert verdict(entries) == "batch 1: fastest with K = 1, 2.00x\nbatch 8: no draft is the fastest"


class ScriptedEngine:
    """Stands for a vLLM: its answers and counts follow from what it is asked, its seconds from how often.

    Attributes:
        log: `(drafted tokens, requests in flight)` of every decoding but the first of each engine.
        stop_at: Ctrl-C comes with this decoding.
    """

    log: list = []
    stop_at = None

    def __init__(self, count):
        self.count, self.warm = count, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def decode(self, prompts, in_flight, max_tokens):
        if not self.warm:
            self.warm = True
            return {}
        if len(self.log) == self.stop_at:
            raise KeyboardInterrupt
        self.log.append((self.count, in_flight))
        return run(
            1 + len(self.log) / 7, *[max_tokens] * len(prompts), drafts=9, accepted=[5] * self.count, token=in_flight
        )


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.setattr(ScriptedEngine, "log", [])
    monkeypatch.setattr(ScriptedEngine, "stop_at", None)
    return ScriptedEngine


def test_what_was_decoded_before_an_interruption_is_not_decoded_again(engines, tmp_path, monkeypatch):
    """A round and a batch size are whole or not there: a draft's run is compared with the one without, next to it."""
    shape = ([[1], [2, 3]], [1, 3], [1, 8], 2, 5)  # three engines, two batch sizes, two rounds
    pairs = [(0, 1), (0, 8), (1, 1), (1, 8)]

    def measured(path):
        with Journal(path, {}) as journal:
            return measure_serving(engines, *shape, report=lambda _: None, journal=journal), journal.rows

    whole, rows = measured(tmp_path / "whole")
    assert whole == measure_serving(lambda _: pytest.fail("an engine started"), *shape, journal=Rows(rows))
    assert [(e["num_speculative_tokens"], e["batch_size"]) for e in whole] == [
        (k, b) for k in (0, 1, 3) for b in (1, 8)
    ]
    for stop_at in range(12):
        path = tmp_path / str(stop_at)
        engines.log, engines.stop_at = [], stop_at
        with pytest.raises(KeyboardInterrupt):
            measured(path)
        engines.log, engines.stop_at = [], None
        found, rows = measured(path)
        assert [tuple(row["what"]) for row in rows] == pairs
        assert engines.log == [(count, size) for _, size in pairs[stop_at // 3 :] for count in (0, 1, 3)]
        for ours, theirs in zip(found, whole, strict=True):
            same = [name for name in ours if "second" not in name and "speedup" not in name]
            assert [ours[name] for name in same] == [theirs[name] for name in same]


def test_categories_are_decoded_by_themselves_with_drafts_alone(engines, tmp_path):
    """Of prompts with and without one, in the order of the file; what was decoded before an interruption stays."""
    prompts, categories = [[1], [2], [3], [4]], ["shape", None, "colour", "shape"]
    asked = []

    class Asked(ScriptedEngine):
        def decode(self, given, in_flight, max_tokens):
            asked.append((self.count, given, in_flight))
            return super().decode(given, in_flight, max_tokens)

    def measured():
        with Journal(tmp_path / "journal", {}) as journal:
            how = {"report": lambda _: None, "journal": journal, "categories": categories}
            return measure_serving(Asked, prompts, [1, 2], [4], 1, 5, **how)

    engines.stop_at = 6  # in the second category
    with pytest.raises(KeyboardInterrupt):
        measured()
    engines.stop_at, asked[:] = None, []
    entries = measured()
    assert asked[3:] == [(1, [[3]], 4), (2, [[3]], 4)]
    assert "categories" not in entries[0]
    for entry in entries[1:]:
        assert {kind: x["prompts"] for kind, x in entry["categories"].items()} == {"shape": 2, "colour": 1}
        count = entry["num_speculative_tokens"]
        assert entry["categories"]["colour"]["acceptance_length"] == 1 + 5 * count / 9
        assert entry["categories"]["colour"]["accepted_per_position"] == [5] * count
    assert table_of_categories(entries).splitlines()[0] == "| K | shape (2) | colour (1) |"
    assert table_of_categories(entries[:1]) == ""


def test_prompts_are_put_into_buckets_by_their_length(monkeypatch):
    """Instead of their categories; the first round behind a prompt sees one token more."""
    script = runpy.run_path(str(ROOT / "scripts" / "benchmark_serving.py"))
    asked = {"target": "t", "draft": "d", "prompts": "p", "output_json": "o", "serving_python": sys.executable}
    chosen = [Prompt([], name, name) for name in ("a", "b", None)]
    ids = [[1] * length for length in (7, 8, 40)]
    args = script["ServingArguments"](**asked)
    assert script["categories"](args, chosen, ids) == ["a", "b", None]
    args = script["ServingArguments"](**asked, context_buckets="8,32")
    assert script["categories"](args, chosen, ids) == ["1 to 8", "9 to 32", "above 32"]


PICTURE = {"type": "image", "image": "1.png"}


def test_pictures_are_sent_as_a_client_sends_them(tmp_path):
    """Every form of a picture as `image_url` with a data address; a text is sent as its tokens."""
    picture(1, 16, 16).save(tmp_path / "1.png")
    content = (tmp_path / "1.png").read_bytes()
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    forms = [PICTURE, {"type": "image_url", "image_url": {"url": address}}, {"type": "image", "path": "1.png"}]
    chats = [chat([form, text("what is this?")]) for form in forms] + [chat("hello"), chat([PICTURE, PICTURE])]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"messages": x}) + "\n" for x in chats))
    prompts, processor = load_prompts(tmp_path / "prompts.jsonl"), vision_processor()

    asked, longest = served_prompts(prompts, processor, {"enable_thinking": False})
    for sent in asked[:3]:
        assert sent["messages"] == chat([{"type": "image_url", "image_url": {"url": address}}, text("what is this?")])
        assert sent["chat_template_kwargs"] == {"enable_thinking": False} and sent["tools"] is None
    assert asked[3] == processor.tokenizer("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    alone = processed(processor, [chat([image(1)] * 2)], add_generation_prompt=True)
    assert longest >= alone["input_ids"].shape[1] > 8  # each picture is 2 x 2 tokens
    assert engine_arguments(prompts)["limit_mm_per_prompt"] == {"image": 2, "video": 0}
    assert engine_arguments(prompts[3:4]) == {}


def test_a_film_is_not_sent(tmp_path):
    record = {"messages": [{"role": "user", "content": [{"type": "video", "video": "1.mp4"}]}], "id": "film"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="Prompt 'film' contains a video, but servers are measured with images"):
        served_prompts(load_prompts(tmp_path / "prompts.jsonl"), vision_processor())


def test_torchvision_that_lies_apart_is_found(tmp_path):
    """As `make` puts it beside the CPU's vLLM; another environment has its own."""
    beside = runpy.run_path(str(ROOT / "scripts" / "benchmark_serving.py"))["beside_pictures"]
    python = tmp_path / "bin" / "python"
    assert beside(str(python)) == {}
    (tmp_path / "torchvision").mkdir()
    without_cuda, apart = beside(str(python))["PYTHONPATH"].split(":")
    assert apart == str(tmp_path / "torchvision") and (Path(without_cuda) / "sitecustomize.py").is_file()


class Rows:
    def __init__(self, rows):
        self.rows = rows


def test_the_same_command_goes_on_and_another_is_refused(engines, tmp_path, monkeypatch, capsys):
    target = make_target()
    target.model.save_pretrained(tmp_path / "target")
    word_tokenizer(VOCAB, 9).save_pretrained(tmp_path / "target")
    make_draft(target, tap_ids=[0, 2, 3]).save_pretrained(tmp_path / "draft")
    (tmp_path / "prompts.txt").write_text("w10 w11\nw12\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "hf_eagle.serving.speed.Engine",
        lambda *_, speculative_config=None, **__: engines(
            speculative_config["num_speculative_tokens"] if speculative_config else 0
        ),
    )

    def command(**changes):
        given = {"target": "target", "draft": "draft", "prompts": "prompts.txt", "output_json": "result.json"}
        given |= {"serving_python": sys.executable, "rounds": 2, "num_speculative_tokens": "1,2", **changes}
        script = str(ROOT / "scripts" / "benchmark_serving.py")
        monkeypatch.setattr(sys, "argv", [script, *(f"--{name}={value}" for name, value in given.items())])
        runpy.run_path(script, run_name="__main__")

    engines.stop_at = 4
    with pytest.raises(SystemExit):
        command()
    engines.stop_at, left = None, (tmp_path / "result.json.journal").read_bytes()
    assert len(left.splitlines()) == 2 and not (tmp_path / "result.json").exists()
    make_draft(target, tap_ids=[0, 1, 3]).save_pretrained(tmp_path / "other")
    for changes, name in (
        ({"draft": "other"}, "draft_weights"),
        ({"rounds": 3}, "rounds"),
        ({"num_prompts": 1}, "num_prompts"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"engine_args": "{}"}, "engine_args"),
    ):
        with pytest.raises(SystemExit):
            command(**changes)
        said = capsys.readouterr().err
        assert f"`{name}`" in said and "go on with the same" in said
        assert (tmp_path / "result.json.journal").read_bytes() == left
    before = len(engines.log)
    command(draft=tmp_path / "draft")
    assert "continuing after the 1 runs of all engines" in capsys.readouterr().out
    assert len(engines.log) == before + 3 and len(json.loads((tmp_path / "result.json").read_text())["entries"]) == 3
    assert not (tmp_path / "result.json.journal").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00002-of-00002.safetensors"])
def test_a_folder_is_known_by_what_it_holds(tmp_path, name, monkeypatch):
    monkeypatch.setattr("hf_eagle.serving.speed._BLOCK", 8)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"0123456789" * 9)
    assert model_identity(str(tmp_path / "a")) == model_identity(str(tmp_path / "b"))
    for place in (0, 8, 89):
        content = bytearray(b"0123456789" * 9)
        content[place] = 65
        (tmp_path / "b" / name).write_bytes(content)
        assert model_identity(str(tmp_path / "a")) != model_identity(str(tmp_path / "b"))
    assert model_identity("you/your-draft") == "you/your-draft"


def test_an_engine_that_does_not_start_says_why(tmp_path):
    """This environment has no vLLM."""
    with pytest.raises(RuntimeError, match="(?s)vLLM ended; its last output:.*No module named 'vllm'"):
        with Engine(sys.executable, tmp_path / "log", model="target"):
            pass


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch_sizes=4..1", "`batch_sizes` must be numbers from 1 to 1024, as `1..8` or `1,2,4`, but is '4..1'"),
        ("--context_buckets=8,8", "`context_buckets` must be ascending numbers of tokens, as `512,2048,8192`"),
        ("--rounds=0", "`rounds` must be at least 1 and at most 1000, got 0"),
        ("--engine_args=[1]", "`engine_args` must be a JSON object, got [1]"),
        ("--engine_args={", "`engine_args` is not JSON"),
        (
            "--serving_python=/nowhere/python",
            "`serving_python` /nowhere/python does not exist",
        ),
    ],
)
def test_bad_arguments(monkeypatch, capsys, option, message):
    script = str(ROOT / "scripts" / "benchmark_serving.py")
    given = [*("--target=t", "--draft=d", "--prompts=p", "--output_json=o"), f"--serving_python={sys.executable}"]
    monkeypatch.setattr(sys, "argv", [script, *given, option])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert message in capsys.readouterr().err
