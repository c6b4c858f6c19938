"""Measured acceptance: sums of what `speculative_generate` returns, compared with the target; and the script for it."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chain_models import generate, make_target
from warm_python import warm_python

from hf_eagle.decoding import speculative_generate
from hf_eagle.evaluation.acceptance import (
    DecodingSettings,
    decode_prompts,
    measure_acceptance,
    stop_token_ids,
    sweep_speculative_tokens,
)
from hf_eagle.evaluation.prompts import Prompt, encode_prompt
from hf_eagle.evaluation.summary import summarize
from hf_eagle.evaluation.told import told


SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_draft.py"
EOS = 9


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(8)
    texts = [" ".join(f"w{10 + i}" for i in torch.randint(50, (4,), generator=generator)) for _ in range(7)]
    return [
        Prompt([{"role": "user", "content": text}], "even" if i % 2 == 0 else "odd", f"p{i}")
        for i, text in enumerate(texts)
    ]


def test_numbers_are_the_sums_of_every_prompt(pair, tokenizer, prompts):
    target, draft = pair
    result = measure_acceptance(
        target, draft, tokenizer, prompts, num_speculative_tokens=4, max_new_tokens=20, progress=False
    )
    drafts, counts, tokens, by_category = 0, [0] * 4, 0, {"even": [0, 0], "odd": [0, 0]}
    for prompt in prompts:
        input_ids = torch.tensor([encode_prompt(prompt, tokenizer)])
        out = speculative_generate(
            target, draft, input_ids, num_speculative_tokens=4, max_new_tokens=20, eos_token_ids=[EOS]
        )
        assert torch.equal(out.sequences, generate(target, input_ids, 20, [EOS]))
        drafts, tokens = drafts + out.drafts[0], tokens + len(out.answers[0])
        counts = [a + b for a, b in zip(counts, out.accepted_per_position[0], strict=True)]
        by_category[prompt.category][0] += sum(out.accepted_per_position[0])
        by_category[prompt.category][1] += out.drafts[0]
    assert sum(counts) > 0
    assert result["acceptance_length"] == 1 + sum(counts) / drafts
    assert (result["drafts"], result["accepted_per_position"]) == (drafts, counts)
    assert (result["accepted_tokens"], result["generated_tokens"]) == (sum(counts), tokens)
    assert result["acceptance_length_by_category"] == {name: 1 + a / d for name, (a, d) in by_category.items()}
    assert (result["identical_to_target"], result["first_difference"]) == (True, None)
    assert (result["num_prompts"], result["num_speculative_tokens"], result["max_new_tokens"]) == (7, 4, 20)


def test_speeds_are_tokens_over_seconds_and_the_first_difference_is_named(pair, tokenizer, prompts, caplog):
    target, draft = pair
    start = time.perf_counter()
    found = decode_prompts(target, draft, tokenizer, prompts, DecodingSettings(max_new_tokens=8), progress=False)
    elapsed = time.perf_counter() - start
    assert 0 < found.draft_seconds + found.target_seconds < found.seconds
    assert found.seconds + found.target_only_seconds < elapsed

    result, runs = summarize(found), found.runs
    tokens = sum(len(run.token_ids) for run in runs)
    assert result["tokens_per_second"] == pytest.approx(tokens / found.seconds)
    assert result["target_only_tokens_per_second"] == pytest.approx(tokens / found.target_only_seconds)
    assert found.rounds == result["drafts"]
    assert result["draft_seconds_per_round"] == pytest.approx(found.draft_seconds / found.rounds)
    assert result["target_seconds_per_round"] == pytest.approx(found.target_seconds / found.rounds)

    runs[2].target_token_ids[5] += 1
    runs[4].target_token_ids.pop()
    for first, at, known in ((2, 5, runs), (4, 7, runs[3:])):
        result = summarize(replace(found, runs=known))
        assert result["identical_to_target"] is False
        assert result["first_difference"] == {"prompt": f"p{first}", "token": at}
        assert f"prompt 'p{first}' differs from the target's answer from token {at} on" in caplog.text


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_difference_is_told_with_its_turn_where_there_are_several(pair, tokenizer, prompts, turns, caplog):
    prompts = [replace(prompt, follow_ups=("w20 w21", "w30")) for prompt in prompts[:2]]
    settings = DecodingSettings(max_new_tokens=3, turns=turns)
    found = decode_prompts(*pair, tokenizer, prompts, settings, progress=False)
    assert "output identical to the target's" in told(summarize(found))
    for turn in reversed(range(turns)):
        run = next(run for run in found.runs if run.prompt.id == "p1" and run.turn == turn)
        run.target_token_ids[1] += 1
        place = "prompt 'p1'" if turns == 1 else f"turn {turn + 1} of prompt 'p1'"
        assert f"output NOT identical to the target's, first at {place}, token 1" in told(summarize(found))
        assert f"The answer to {place} differs from the target's answer from token 1 on" in caplog.messages[-1]


@pytest.mark.parametrize("shape", [{}, {"method": "tree", "depth": 3, "top_k": 3, "total_tokens": 9}])
def test_batches_measure_what_single_prompts_do(pair, tokenizer, prompts, shape):
    single, batched = (
        measure_acceptance(*pair, tokenizer, prompts, max_new_tokens=20, batch_size=size, progress=False, **shape)
        for size in (1, 3)
    )
    differing = {"tokens_per_second", "target_only_tokens_per_second", "batch_size"}
    differing |= {"draft_seconds_per_round", "target_seconds_per_round"}
    assert batched["identical_to_target"] is True and batched["batch_size"] == 3
    assert {k: v for k, v in single.items() if k not in differing} == {
        k: v for k, v in batched.items() if k not in differing
    }


def test_second_turns_stand_behind_the_targets_own_first_answers(pair, tokenizer, prompts):
    target, draft = pair
    prompts = [*prompts[:3], *(replace(prompt, follow_ups=("w20 w21",)) for prompt in prompts[3:])]
    settings = DecodingSettings(max_new_tokens=12, turns=2, batch_size=2)
    found = decode_prompts(target, draft, tokenizer, prompts, settings, progress=False)
    assert [run.turn for run in found.runs] == [0] * 7 + [1] * 4
    for first, second in zip(found.runs[3:7], found.runs[7:], strict=True):
        answer = generate(target, torch.tensor([first.prompt_token_ids]), 12, [EOS])[0, len(first.prompt_token_ids) :]
        dialogue = [
            *first.prompt.messages,
            {"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)},
            {"role": "user", "content": "w20 w21"},
        ]
        rendered = tokenizer.apply_chat_template(dialogue, add_generation_prompt=True, tokenize=False)
        assert second.prompt_token_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    result = summarize(found)
    assert (result["num_prompts"], result["turns"], result["identical_to_target"]) == (7, 2, True)
    by_turn = [[run for run in found.runs if run.turn == turn] for turn in (0, 1)]
    lengths = [1 + sum(sum(r.accepted_per_position) for r in x) / sum(r.drafts for r in x) for x in by_turn]
    assert result["acceptance_length_by_turn"] == {"1": lengths[0], "2": lengths[1]}


def test_sampling_claims_no_identity_and_repeats_by_its_seed(pair, tokenizer, prompts):
    settings = [DecodingSettings(temperature=1.0, seed=seed, max_new_tokens=12) for seed in (1, 1, 2)]
    drawn = [decode_prompts(*pair, tokenizer, prompts[:3], one, progress=False) for one in settings]
    answers = [[run.token_ids for run in found.runs] for found in drawn]
    assert answers[0] == answers[1] != answers[2]
    result = summarize(drawn[0])
    assert result["identical_to_target"] is result["first_difference"] is None
    assert result["target_only_tokens_per_second"] > 0 and result["temperature"] == 1.0


def test_a_sweep_measures_each_length_like_a_measurement_of_its_own(pair, tokenizer, prompts):
    settings = DecodingSettings(max_new_tokens=12)
    sweep = sweep_speculative_tokens(*pair, tokenizer, prompts, [1, 3], settings, progress=False)
    for found, count in zip(sweep, (1, 3), strict=True):
        alone = measure_acceptance(
            *pair, tokenizer, prompts, num_speculative_tokens=count, max_new_tokens=12, progress=False
        )
        assert found["num_speculative_tokens"] == count
        assert found["acceptance_length"] == alone["acceptance_length"]
        assert found["acceptance_length_interval"] == alone["acceptance_length_interval"]
        assert found["tokens_per_second"] > 0 and found["draft_seconds_per_round"] > 0
    # the target alone was run once for all of them
    assert sweep[0]["target_only_tokens_per_second"] == sweep[1]["target_only_tokens_per_second"]


def test_without_comparison_nothing_is_claimed(pair, tokenizer, prompts):
    target, draft = pair
    result = measure_acceptance(
        target, draft, tokenizer, prompts[:2], max_new_tokens=6, compare_to_target=False, progress=False
    )
    assert result["identical_to_target"] is result["target_only_tokens_per_second"] is None
    assert result["tokens_per_second"] > 0


def test_answers_of_one_token_have_no_acceptance_length(pair, tokenizer, prompts):
    result = measure_acceptance(*pair, tokenizer, prompts, max_new_tokens=1, progress=False)
    assert (result["acceptance_length"], result["drafts"], result["accepted_per_position"]) == (None, 0, [0, 0, 0])
    assert result["generated_tokens"] == 7


def test_stops_at_the_tokenizers_and_the_generation_configs_tokens(tokenizer):
    model = make_target().model
    assert stop_token_ids(model, tokenizer) == {EOS}
    model.generation_config.eos_token_id = [3, 4]
    assert stop_token_ids(model, tokenizer) == {3, 4, EOS}
    model.generation_config.eos_token_id = 5
    assert stop_token_ids(model, tokenizer) == {5, EOS}


def test_errors(pair, tokenizer, prompts):
    with pytest.raises(ValueError, match="`prompts` is empty"):
        measure_acceptance(*pair, tokenizer, [])
    with pytest.raises(ValueError, match="`draft` was made for a vocabulary of 67 tokens"):
        measure_acceptance(make_target(vocab_size=80), pair[1], tokenizer, prompts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pair, tokenizer, prompts):
    folder = tmp_path_factory.mktemp("evaluate")
    pair[0].model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    pair[1].save_pretrained(folder / "draft")
    lines = [json.dumps({"messages": p.messages, "category": p.category, "id": p.id}) for p in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


class TestScript:
    def run(self, folder, **changes):
        arguments = dict(target="target", draft="draft", prompts="prompts.jsonl", output_json="out/result.json")
        options = [f"--{name}={value}" for name, value in (arguments | changes).items()]
        return warm_python().run(SCRIPT, "--device=cpu", "--max_new_tokens=20", *options, cwd=folder)

    def test_writes_what_measure_acceptance_returns(self, folder, pair, tokenizer, prompts):
        done = self.run(folder, num_prompts=5, output_tokens="out/tokens.json", sweep_tokens="1..2")
        assert done.returncode == 0, done.stderr
        result = json.loads((folder / "out/result.json").read_text())
        expected = measure_acceptance(*pair, tokenizer, prompts[:5], max_new_tokens=20, progress=False)
        assert expected["accepted_tokens"] > 0
        speeds = {"tokens_per_second", "target_only_tokens_per_second"}
        speeds |= {"draft_seconds_per_round", "target_seconds_per_round"}
        assert all(result[name] == value for name, value in expected.items() if name not in speeds)
        assert all(result[name] > 0 for name in speeds)
        assert (result["prompts"], result["dtype"], result["device"]) == ("prompts.jsonl", "float32", "cpu")
        tokens = json.loads((folder / "out/tokens.json").read_text())
        settings = DecodingSettings(max_new_tokens=20)
        runs = decode_prompts(*pair, tokenizer, prompts[:5], settings, progress=False).runs
        assert [entry["token_ids"] for entry in tokens] == [run.token_ids for run in runs]
        assert [entry["prompt_token_ids"] for entry in tokens] == [run.prompt_token_ids for run in runs]
        assert f"acceptance length {expected['acceptance_length']:.3f}" in done.stdout
        assert "output identical to the target's" in done.stdout
        assert "ms of drafting" in done.stdout and "K = 2: " in done.stdout
        assert [found["num_speculative_tokens"] for found in result["sweep"]] == [1, 2]
        for picture in ("result.png", "result_sweep.png"):
            assert (folder / "out" / picture).stat().st_size > 5000

    def test_a_tree_that_draws_in_batches(self, folder):
        shape = {"method": "tree", "depth": 3, "top_k": 3, "total_tokens": 9}
        done = self.run(folder, output_json="tree.json", temperature=0.7, top_p=0.9, batch_size=4, **shape)
        assert done.returncode == 0, done.stderr
        result = json.loads((folder / "tree.json").read_text())
        assert {name: result[name] for name in shape} == shape and len(result["accepted_per_position"]) == 3
        assert (result["temperature"], result["top_p"], result["batch_size"]) == (0.7, 0.9, 4)
        assert result["identical_to_target"] is None and result["drafts"] > 0

    def test_one_clear_sentence_for_bad_input(self, folder, tmp_path, tokenizer):
        make_target(tap_ids=[0, 2, 3], vocab_size=80).model.save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        for changes, message in (
            ({"prompts": "none.jsonl"}, "error: `prompts` none.jsonl does not exist: correct the path."),
            ({"draft": "target"}, "target is not a draft"),
            (
                {"target": str(tmp_path / "other")},
                "`draft` was made for a vocabulary of 67 tokens, but the target has 80",
            ),
            ({"num_speculative_tokens": 0}, "`num_speculative_tokens` must be at least 1 and at most 64, got 0"),
            ({"depth": 3}, "`depth` is 3, which means nothing to `method='chain'`"),
            ({"method": "tree", "sweep_tokens": "1..3"}, "`sweep_tokens` measures chains, but `method` is 'tree'"),
            (
                {"sweep_tokens": "3..1"},
                "`sweep_tokens` must be numbers from 1 to 64, as `1..8` or `1,2,4`, but is '3..1'",
            ),
            ({"top_p": 0.9}, "`top_p` is set, but `temperature` is 0"),
            ({"method": "tree", "top_k": 41}, "`top_k` is 41, but the draft can propose only 40 different tokens"),
        ):
            done = self.run(folder, output_json="never.json", **changes)
            assert done.returncode != 0
            assert message in done.stderr.strip().splitlines()[-1]
            assert "Traceback" not in done.stderr
        assert not (folder / "never.json").exists()

    def test_help_is_instant(self):
        done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert "--num_speculative_tokens" in done.stdout
        imported = subprocess.run(
            [sys.executable, "-X", "importtime", str(SCRIPT), "--help"], capture_output=True, text=True
        ).stderr
        # what there is to wait for
        assert not any(line.split("|")[-1].strip() == "torch" for line in imported.splitlines())
