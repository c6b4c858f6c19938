"""Acceptance by context length: buckets share out every round, and replayed answers fill them as decoded ones do."""

import pytest
import torch
from chain_models import make_draft, make_target
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eagle.arguments.parser import parse_lengths
from hf_eagle.evaluation.acceptance import DecodingSettings, decode_prompts, measure_acceptance
from hf_eagle.evaluation.acceptance_length import acceptance_length, confidence_interval
from hf_eagle.evaluation.contexts import acceptance_by_context, bucket_name, bucket_of_prompt
from hf_eagle.evaluation.measurement import PromptRun
from hf_eagle.evaluation.prompts import Prompt
from hf_eagle.evaluation.summary import summarize


EDGES = [8, 16, 24]


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(8)
    lengths = [1, 14, 3, 22, 6, 2, 30, 9]
    words = [[f"w{10 + i}" for i in torch.randint(50, (length,), generator=generator)] for length in lengths]
    texts = [{"role": "user", "content": " ".join(of_prompt)} for of_prompt in words]
    return [Prompt([text], "abc"[n % 3], f"p{n}", ("w20 w21",) * (n % 2)) for n, text in enumerate(texts)]


def made_run(prompt: Prompt, length: int, rounds: list[int], depth: int = 3) -> PromptRun:
    counts = [sum(x > k for x in rounds) for k in range(depth)]
    return PromptRun(prompt, 0, [1] * length, [2] * (1 + sum(rounds) + len(rounds)), len(rounds), counts, rounds, None)


RUNS = st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(0, 3), max_size=12)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(RUNS, st.lists(st.integers(1, 90), unique=True, max_size=4).map(sorted))
def test_every_round_lies_in_one_bucket_and_all_add_up(made, edges):
    runs = [made_run(Prompt([], None, n), *one) for n, one in enumerate(made)]
    buckets = acceptance_by_context(runs, edges, 3)
    assert [bucket["up_to"] for bucket in buckets] == [*edges, None]
    assert sum(bucket["drafts"] for bucket in buckets) == sum(run.drafts for run in runs)
    sums = [sum(counts) for counts in zip(*(bucket["accepted_per_position"] for bucket in buckets), strict=True)]
    assert sums == [sum(counts) for counts in zip(*(run.accepted_per_position for run in runs), strict=True)]

    # round by round, by the tokens that stand before the first drafted one
    for bucket in buckets:
        low, high = bucket["above"], bucket["up_to"] or 10**9
        found = []
        for run in runs:
            context, inside = len(run.prompt_token_ids) + 1, []
            for accepted in run.accepted_by_round:
                if low < context <= high:
                    inside.append(accepted)
                context += 1 + accepted
            found += [inside] * bool(inside)
        assert bucket["num_prompts"] == len(found)
        assert bucket["acceptance_length"] == acceptance_length(list(map(sum, found)), list(map(len, found)))
        interval = confidence_interval(list(map(sum, found)), list(map(len, found)))
        assert bucket["acceptance_length_interval"] == interval


def test_what_is_decoded_falls_into_buckets(pair, tokenizer, prompts):
    found = decode_prompts(*pair, tokenizer, prompts, DecodingSettings(max_new_tokens=12), progress=False)
    result = summarize(found, EDGES)
    buckets = result["acceptance_by_context"]
    assert sum(bucket["drafts"] for bucket in buckets) == result["drafts"]
    assert [sum(x) for x in zip(*(b["accepted_per_position"] for b in buckets), strict=True)] == result[
        "accepted_per_position"
    ]
    assert all(bucket["drafts"] for bucket in buckets)
    for bucket in buckets:
        shares = [count / bucket["drafts"] for count in bucket["accepted_per_position"]]
        for share, interval in zip(shares, bucket["accepted_share_intervals"], strict=True):
            assert interval is None or -1e-9 <= interval[0] <= share + 1e-9 and share - 1e-9 <= interval[1]
    assert "acceptance_by_context" not in summarize(found)


@pytest.mark.parametrize("shape", [{}, {"draft_window": 5}, {"method": "tree", "depth": 3, "top_k": 3}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_replayed_answers_give_what_decoding_gives(pair, tokenizer, prompts, shape, batch_size):
    """Both turns of prompts of all lengths, in the order of the file."""
    asked = {"max_new_tokens": 12, "turns": 2, "progress": False, "compare_to_target": False, **shape}
    decoded = measure_acceptance(*pair, tokenizer, prompts, context_buckets=EDGES, **asked)
    asked |= {"teacher_forced": True, "batch_size": batch_size}
    again = measure_acceptance(*pair, tokenizer, prompts, context_buckets=EDGES, **asked)

    timed = {name for name in decoded if "second" in name} | {"batch_size"}
    counts = [{name: x for name, x in found.items() if name not in timed} for found in (decoded, again)]
    assert counts[0] == counts[1]
    assert again["tokens_per_second"] is again["draft_seconds_per_round"] is None


def test_checkpoints_are_ranked_as_by_decoding(tokenizer, prompts):
    """Twelve drafts, taught for longer and longer: each has exactly the counts of decoding."""
    target, answers, found = make_target(), {}, []
    asked = {"max_new_tokens": 12, "batch_size": 4}
    for steps in range(5, 65, 5):
        models = (target, make_draft(target, draft_vocab_size=40, tap_ids=[0, 2, 3], steps=steps), tokenizer, prompts)
        how = {"compare_to_target": False, "progress": False}
        decoded = decode_prompts(*models, DecodingSettings(**asked), **how)
        again = decode_prompts(*models, DecodingSettings(**asked), teacher_forced=True, answers=answers, **how)
        assert again.runs == decoded.runs
        found.append(again.acceptance_length())
    assert len(set(found)) > 6


def test_batches_hold_prompts_of_similar_length_and_bounded_size(pair, tokenizer, prompts, monkeypatch):
    from hf_eagle.evaluation import acceptance, prompt_batches

    seen = []
    generate = acceptance.speculative_generate
    monkeypatch.setattr(
        acceptance, "speculative_generate", lambda *a, **k: seen.append(k["input_ids"].shape) or generate(*a, **k)
    )
    monkeypatch.setattr(prompt_batches, "_TOKENS", 100)
    how = {"compare_to_target": False, "progress": False, "warm": False}
    found = decode_prompts(*pair, tokenizer, prompts, DecodingSettings(max_new_tokens=8, batch_size=3), **how)
    alone = decode_prompts(*pair, tokenizer, prompts, DecodingSettings(max_new_tokens=8), **how)
    assert found.runs == alone.runs
    lengths = [length for rows, length in seen[: -len(prompts)]]
    assert lengths == sorted(lengths)
    assert all(rows == 1 or rows <= 3 and rows * (length + 8) <= 100 for rows, length in seen)
    assert {rows for rows, _ in seen} >= {1, 3}


def test_sampled_answers_are_not_replayed(pair, tokenizer, prompts):
    with pytest.raises(ValueError, match="`temperature` is 0.5, but `teacher_forced` counts what greedy decoding"):
        measure_acceptance(*pair, tokenizer, prompts, temperature=0.5, teacher_forced=True, progress=False)


def test_names_of_buckets():
    names = [bucket_name({"above": a, "up_to": b}) for a, b in ((0, 512), (512, 2048), (2048, None))]
    assert names == ["1 to 512", "513 to 2,048", "above 2,048"]
    # the first round behind a prompt sees one token more
    assert [bucket_of_prompt(length, [512, 2048]) for length in (1, 511, 512, 2047, 2048)] == [
        *names[:1] * 2,
        *names[1:2] * 2,
        names[2],
    ]


@pytest.mark.parametrize("text", ["", "0", "8,8", "9,8", "a", "-1", "1..4", "none"])
def test_edges_are_ascending_numbers(text):
    assert parse_lengths("context_buckets", "512, 2048") == [512, 2048]
    assert parse_lengths("windows", "none,512", or_none=True) == [None, 512]
    assert parse_lengths("windows", "none", or_none=True) == [None]
    with pytest.raises(ValueError, match="`context_buckets` must be ascending numbers of tokens, as `512,2048,8192`"):
        parse_lengths("context_buckets", text)
