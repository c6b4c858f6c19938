"""All that the script measures: counts in batches as one by one, speed on a sample, windows, and what it tells."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from hf_eagle import FrozenTarget
from hf_eagle.decoding import target_run
from hf_eagle.door.journal import Journal
from hf_eagle.evaluation import acceptance, speed_sample, whole
from hf_eagle.evaluation.acceptance import DecodingSettings, decode_prompts, measure_acceptance
from hf_eagle.evaluation.contexts import contexts_table
from hf_eagle.evaluation.finished import Finished
from hf_eagle.evaluation.prompts import Prompt
from hf_eagle.evaluation.speed_sample import measure_speed, speedup
from hf_eagle.evaluation.whole import measure_whole
from hf_eagle.evaluation.windows import best_windows, check_windows, measure_windows, windows_table


SCRIPT = str(Path(__file__).parents[2] / "scripts" / "evaluate_draft.py")
TREE = {"method": "tree", "depth": 3, "top_k": 3, "total_tokens": 9}
WAYS = {"chain": {}, "tree": TREE, "two turns": {"turns": 2}, "window": {"draft_window": 5}}


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(8)
    words = [[f"w{10 + i}" for i in torch.randint(50, (1 + 5 * n % 17,), generator=generator)] for n in range(18)]
    texts = [{"role": "user", "content": " ".join(of_prompt)} for of_prompt in words]
    return [Prompt([text], "abc"[n % 3], f"p{n}", ("w20 w21",) * (n % 2)) for n, text in enumerate(texts)]


@pytest.mark.parametrize("way", WAYS)
def test_counts_are_those_of_decoding_one_by_one(pair, tokenizer, prompts, way):
    settings = DecodingSettings(max_new_tokens=12, **WAYS[way])
    alone = decode_prompts(*pair, tokenizer, prompts, settings, compare_to_target=False, progress=False)
    result, runs = measure_whole(*pair, tokenizer, prompts, settings, compare_to_target=False, progress=False)
    assert runs == alone.runs
    assert result["batch_size"] == 1 and result["tokens_per_second"] is None


def test_speed_is_measured_on_as_many_prompts_as_its_interval_needs(pair, tokenizer, prompts, monkeypatch, tmp_path):
    settings = DecodingSettings(max_new_tokens=6, turns=2)
    found = {}
    for error in (0.0, 1e9):
        monkeypatch.setattr(speed_sample, "ERROR", error)
        with Journal(tmp_path / f"{error}", {}) as journal:
            found[error] = measure_speed(*pair, tokenizer, prompts, settings, journal)
            rows = len(journal.rows)
        with Journal(tmp_path / f"{error}", {}) as journal:  # nothing is measured again
            assert measure_speed(*pair, tokenizer, prompts, settings, journal) == found[error]
            assert len(journal.rows) == rows
    assert found[0.0]["speed_prompts"] == len(prompts) and found[1e9]["speed_prompts"] == 8

    for result in found.values():
        ratio = result["tokens_per_second"] / result["target_only_tokens_per_second"]
        assert result["speedup"] == pytest.approx(ratio)
        low, high = result["speedup_interval"]
        assert low <= result["speedup"] <= high
        assert result["identical_to_target"] is True and result["draft_seconds_per_round"] > 0


def test_a_speedup_is_a_ratio_of_speeds():
    assert speedup([[10, 2.0, 12, 6.0]]) == (pytest.approx(2.5), None)
    value, (low, high) = speedup([[10, 1.0, 10, 2.0], [30, 3.0, 30, 6.0], [20, 2.0, 20, 4.0]])
    assert (value, low, high) == (pytest.approx(2.0),) * 3
    value, (low, high) = speedup([[10, 1.0, 10, 1.0], [10, 1.0, 10, 3.0]])
    assert (value, low, high) == (pytest.approx(2.0), pytest.approx(1.0), pytest.approx(3.0))


def test_windows_are_measured_on_the_same_answers(pair, tokenizer, prompts):
    windows, edges, settings = [None, 4, 8], [8, 16], DecodingSettings(max_new_tokens=12)
    found = measure_windows(*pair, tokenizer, prompts, windows, settings, edges, progress=False)
    assert [entry["window"] for entry in found] == windows
    for entry in found:
        asked = {"max_new_tokens": 12, "draft_window": entry["window"], "context_buckets": edges, "progress": False}
        alone = measure_acceptance(*pair, tokenizer, prompts, compare_to_target=False, **asked)
        assert {name: alone[name] for name in entry if name != "window"} == {
            name: entry[name] for name in entry if name != "window"
        }

    for place, best in enumerate(best_windows(found)):
        lengths = [entry["acceptance_by_context"][place]["acceptance_length"] for entry in found]
        assert best["acceptance_by_context"][place]["acceptance_length"] == max(lengths)
    rows = windows_table(found).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["no window", "window 4", "window 8"]
    assert sum(row.count("**") for row in rows) == 2 * len(edges) + 2
    assert "| 1 to 8 |" in contexts_table(found[0]["acceptance_by_context"])


def test_a_bucket_without_drafts_of_one_window_has_a_best_one():
    """Rounds start at other contexts with another window."""
    lengths = {None: [None, 2.0, None], 4: [1.5, None, None], 8: [1.7, 2.1, None]}
    found = [
        {"window": window, "acceptance_by_context": [{"acceptance_length": x} for x in of]}
        for window, of in lengths.items()
    ]
    assert [None if best is None else best["window"] for best in best_windows(found)] == [8, 8, None]


def test_the_target_answers_once_for_the_counts_and_all_windows(pair, tokenizer, prompts, monkeypatch):
    answered, answer = [], acceptance.continued_answers
    monkeypatch.setattr(acceptance, "continued_answers", lambda *a, **k: answered.append(1) or answer(*a, **k))
    asked = {"windows": [None, 4], "teacher_forced": True, "progress": False}
    result, _ = measure_whole(*pair, tokenizer, prompts, DecodingSettings(max_new_tokens=6), **asked)
    assert len(answered) == 2  # batches of 18 prompts
    assert result["windows"][0]["accepted_per_position"] == result["accepted_per_position"]


def test_finished_parts_are_not_measured_again(pair, tokenizer, prompts, tmp_path):
    settings = DecodingSettings(max_new_tokens=6)
    asked = {"windows": [None, 4], "context_buckets": [8], "progress": False}
    with Journal(tmp_path / "journal", {}) as journal:
        measured = measure_whole(*pair, tokenizer, prompts, settings, journal=journal, **asked)
        rows = len(journal.rows)
    with Journal(tmp_path / "journal", {}) as journal:
        assert measure_whole(*pair, tokenizer, prompts, settings, journal=journal, **asked) == measured
        assert len(journal.rows) == rows
        assert Finished(journal, "windows").row(1) is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pair, tokenizer, prompts):
    folder = tmp_path_factory.mktemp("whole")
    pair[0].model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    pair[1].save_pretrained(folder / "draft")
    lines = [json.dumps({"messages": p.messages, "category": p.category, "id": p.id}) for p in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def run(folder, monkeypatch, **changes):
    values = {name: folder / name for name in ("target", "draft")} | {"prompts": folder / "prompts.jsonl"}
    values |= {"output_json": folder / "result.json", "device": "cpu", "max_new_tokens": 10} | changes
    monkeypatch.setattr(sys, "argv", [SCRIPT, *(f"--{name}={value}" for name, value in values.items())])
    runpy.run_path(SCRIPT, run_name="__main__")
    return json.loads((folder / "result.json").read_text())


def test_the_script_tells_contexts_and_windows(folder, monkeypatch, capsys):
    asked = {"teacher_forced": True, "context_buckets": "8,16", "windows": "none,4,8"}
    result = run(folder, monkeypatch, **asked)
    told = capsys.readouterr().out
    assert sum(bucket["drafts"] for bucket in result["acceptance_by_context"]) == result["drafts"]
    assert result["windows"][0]["acceptance_by_context"] == result["acceptance_by_context"]
    assert result["tokens_per_second"] is None and result["identical_to_target"] is None
    assert "context 9 to 16: " in told and "context above 16: best " in told
    assert (folder / "result_context.png").stat().st_size > 5000

    best = {entry["window"] for entry in best_windows(result["windows"])} - {None}
    assert best
    for window in best:
        keys = f'"layer_types": ["sliding_attention"], "sliding_window": {window} in the draft\'s config.json'
        assert f"window {window} in vLLM: {keys}" in told
        assert f"window {window} in SGLang: --speculative-draft-window-size {window - 1} with FlashAttention" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_buckets": "9,8"}, "`context_buckets` must be ascending numbers of tokens, as `512,2048,8192`"),
        ({"windows": "8,none"}, "`windows` must be ascending numbers of tokens, as `none,512,1024,2048`"),
        ({"windows": "none,3,8"}, "`windows` contains 3, but must be above the 3 tokens of a draft"),
        ({"windows": "8", "num_speculative_tokens": 9}, "`windows` contains 8, but must be above the 9"),
        ({"method": "tree", "top_k": 64}, "`top_k` is 64, but the draft can propose only 40 different tokens"),
        ({"teacher_forced": True, "sweep_tokens": "1..3"}, "`sweep_tokens` measures speeds, but `teacher_forced`"),
        ({"teacher_forced": True, "temperature": 1}, "`teacher_forced` counts what greedy decoding accepts"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_target_is_loaded(folder, monkeypatch, capsys, changes, message):
    loaded = []
    monkeypatch.setattr(FrozenTarget, "from_pretrained", lambda *args, **options: loaded.append(args))
    with pytest.raises(SystemExit):
        run(folder, monkeypatch, output_json=folder / "never.json", **changes)
    assert message in capsys.readouterr().err
    assert not loaded and not (folder / "never.json").exists()


def test_a_target_that_cannot_verify_is_refused_without_a_word_of_what_would_be_done(folder, monkeypatch, capsys):
    def refuse(target):
        raise ValueError("`target` keeps a state of its own.")

    monkeypatch.setattr(target_run, "check_cache", refuse)
    with pytest.raises(SystemExit):
        run(folder, monkeypatch, output_json=folder / "never.json")
    told = capsys.readouterr()
    assert "`target` keeps a state of its own" in told.err and "is decoded alone" not in told.out


def test_a_target_that_verifies_no_batches_decodes_each_prompt_alone(folder, monkeypatch, capsys):
    def refuse(target, name):
        raise ValueError("`target` takes no masks.")

    monkeypatch.setattr(target_run, "_check_masks", refuse)
    result = run(folder, monkeypatch, num_prompts=2, max_new_tokens=2)
    assert "Every prompt is decoded alone: `target` takes no" in capsys.readouterr().out
    assert result["batch_size"] == 1 and "speed_prompts" not in result


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({}, {"sweep_tokens": [1, 2], "teacher_forced": True}, "`sweep_tokens` measures speeds, but `teacher_forced`"),
        ({}, {"sweep_tokens": [1, 0]}, "`num_speculative_tokens` must be at least 1, but is 0"),
        ({}, {"windows": [None, 3]}, "`windows` contains 3, but must be above the 3 tokens of a draft"),
        ({"num_speculative_tokens": 5}, {"windows": [5]}, "`windows` contains 5, but must be above the 5 tokens"),
        ({}, {"batch_size": 0}, "`batch_size` must be at least 1, but is 0"),
        ({}, {"batch_size": -2}, "`batch_size` must be at least 1, but is -2"),
        ({"batch_size": 4}, {}, "`batch_size` is None, but 4 in `settings`"),
        ({"batch_size": 4}, {"batch_size": 2}, "`batch_size` is 2, but 4 in `settings`"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_decoded(
    pair, tokenizer, prompts, monkeypatch, settings, changes, message
):
    monkeypatch.setattr(whole, "decode_prompts", lambda *args, **options: pytest.fail("something was decoded"))
    with pytest.raises(ValueError, match=message):
        measure_whole(*pair, tokenizer, prompts, DecodingSettings(**settings), progress=False, **changes)


def test_windows_are_refused_for_a_draft_that_takes_none(pair, monkeypatch):
    monkeypatch.setattr(type(pair[1]), "takes_window", False)
    check_windows(pair[1], DecodingSettings(), [None])
    with pytest.raises(ValueError, match="`windows` contains 8, which a LlamaForCausalLMEagle3 ignores: leave it out"):
        check_windows(pair[1], DecodingSettings(), [None, 8])


@pytest.mark.parametrize("given", [1, 3], ids=lambda given: f"settings of {given}")
def test_a_sweep_decodes_the_batches_that_were_asked_for(pair, tokenizer, prompts, monkeypatch, given):
    sizes, sweep = [], whole.sweep_speculative_tokens
    monkeypatch.setattr(
        whole, "sweep_speculative_tokens", lambda *args, **how: sizes.append(args[5].batch_size) or sweep(*args, **how)
    )
    asked = {"batch_size": 3, "sweep_tokens": [1], "progress": False}
    settings = DecodingSettings(max_new_tokens=2, batch_size=given)
    result, _ = measure_whole(*pair, tokenizer, prompts[:3], settings, **asked)
    assert sizes == [3] and result["batch_size"] == 3


def test_speed_is_that_of_one_request_whatever_the_settings(pair, tokenizer, prompts):
    result = measure_speed(*pair, tokenizer, prompts[:4], DecodingSettings(max_new_tokens=2, batch_size=4))
    assert result["speed_prompts"] == 4
