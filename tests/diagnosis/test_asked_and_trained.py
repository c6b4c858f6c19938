"""What the draft is asked and what it was trained on: each planted cause is named, and a sound draft shows none."""

import copy
import json

import pytest
import torch
from chain_models import generate
from taught_drafts import ANSWER, TAPS, target_and_tokenizer, taught, word_prompts

from hf_eagle.data.records import load_records
from hf_eagle.diagnosis.case import Case, TrainingFacts
from hf_eagle.diagnosis.diagnose import diagnose
from hf_eagle.diagnosis.of_draft import agreement
from hf_eagle.diagnosis.sample import Sample
from hf_eagle.diagnosis.training_data import TrainingData, coverage, runs_of, spread_over
from hf_eagle.evaluation.measurement import DecodingSettings
from hf_eagle.evaluation.prompts import encode_prompt


SETTINGS = DecodingSettings(num_speculative_tokens=3, max_new_tokens=ANSWER, batch_size=4)


@pytest.fixture(scope="module")
def models():
    target, tokenizer = target_and_tokenizer()
    return target, tokenizer, taught(target, tokenizer, word_prompts())


def case_of(models, draft=None, prompts=None, settings=SETTINGS, template_kwargs=None, **known):
    target, tokenizer, own = models
    draft = own if draft is None else draft
    draft.attach(target)
    return Case(draft, Sample(target, tokenizer, prompts or word_prompts(), settings, template_kwargs), **known)


def causes(case):
    return [one.cause for one in diagnose(case, confirm=False).causes]


def own_answers(target, tokenizer, prompts):
    """The target's answers as text, without their end."""
    ids = torch.tensor([encode_prompt(prompt, tokenizer) for prompt in prompts])
    return [tokenizer.decode(row) for row in generate(target, ids, ANSWER)[:, ids.shape[1] :]]


def data_of(models, tmp_path, prompts, answers, **how):
    target, tokenizer, _ = models
    rows = [
        {"messages": [*prompt.messages, {"role": "assistant", "content": answer}]}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainingData(load_records(str(tmp_path / "chats.jsonl")), tokenizer, how.get("max_length", 256))


def test_a_small_vocabulary(models):
    target, tokenizer, _ = models
    draft = taught(target, tokenizer, word_prompts(), draft_vocab_size=12)
    only = frozenset({"vocabulary", "ttt_steps", "tap_ids"})
    found = diagnose(case_of(models, draft, only=only), confirm=False)
    assert [one.cause for one in found.causes][0] == "vocabulary"
    first = found.causes[0]
    assert first.bound and 0.05 < first.details["missing"] < 1
    assert set(first.details["missing_by_category"]) == {"even", "odd"}

    # what is counted as missing is what the answers hold
    said = [token for answer, _ in case_of(models, draft).sample.said() for token in answer]
    known = set(draft.draft_ids.tolist())
    assert first.details["missing"] == sum(token not in known for token in said) / len(said)


def test_larger_vocabularies_by_the_counts_of_the_data(models, tmp_path):
    target, tokenizer, _ = models
    draft = taught(target, tokenizer, word_prompts(), draft_vocab_size=8, steps=80)
    data = data_of(models, tmp_path, word_prompts(), own_answers(target, tokenizer, word_prompts()))
    found = diagnose(case_of(models, draft, data=data, only=frozenset({"vocabulary"})), confirm=False).causes[0]
    sizes = found.details["bound_by_size"]
    assert list(sizes) == ["16", "32", "64"] and "at most" in found.evidence
    assert found.acceptance_length - found.gain < sizes["64"] <= found.acceptance_length + 0.05


def test_a_single_step_of_training(models):
    target, tokenizer, _ = models
    draft, only = taught(target, tokenizer, word_prompts(), ttt_steps=1), frozenset({"ttt_steps"})
    found = diagnose(case_of(models, draft, facts=TrainingFacts({"ttt_steps": 1}), only=only), confirm=False)
    assert [one.cause for one in found.causes] == ["ttt_steps"] and "`ttt_steps` 1" in found.causes[0].evidence
    assert not causes(case_of(models, only=only))


def test_contexts_longer_than_in_training(models):
    """A draft that is told nothing of long prompts: its data end before them."""
    long = word_prompts(words=60, seed=3)
    facts = TrainingFacts({"max_length": 40})
    mixed = [prompt for pair in zip(word_prompts(), long, strict=True) for prompt in pair]
    found = diagnose(case_of(models, prompts=mixed, facts=facts, only=frozenset({"context"})), confirm=False)
    assert [one.cause for one in found.causes] == ["context"] and "40 tokens" in found.causes[0].evidence
    assert found.causes[0].details["share"] > 0.3
    assert not causes(case_of(models, prompts=word_prompts(), facts=facts, only=frozenset({"context"})))


def test_a_system_prompt_that_training_never_saw(models, tmp_path):
    target, tokenizer, _ = models
    data = data_of(models, tmp_path, word_prompts(), own_answers(target, tokenizer, word_prompts()))
    odd = word_prompts(system="w5 w6 w7 w8 w11 w12 w13 w14 w15 w16")
    found = diagnose(case_of(models, prompts=odd, data=data))
    assert found.causes[0].cause == "system_prompt" and "6 of 6 prompts" in found.causes[0].evidence
    (sound,) = case_of(models).sample.replayed([models[2]])
    assert found.causes[0].acceptance_length == found.causes[0].decoded == pytest.approx(sound.acceptance_length())
    # prompts as in training do not even ask the target again
    assert "system_prompt" not in {x.cause for x in diagnose(case_of(models, data=data), confirm=False).tried}


def test_other_options_of_the_template(models):
    target, tokenizer, draft = models
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% if aloud is defined %}w3 w4 w5 w6 w7 w8 w2 w11 {% endif %}" + before
    try:
        given = {"template_kwargs": {"aloud": True}, "only": frozenset({"template"})}
        facts = TrainingFacts({"chat_template_kwargs": "{}"})
        found = diagnose(case_of(models, facts=facts, **given))
        assert [one.cause for one in found.causes] == ["template"] and found.causes[0].decoded is not None
        assert not causes(case_of(models, facts=TrainingFacts({"chat_template_kwargs": '{"aloud": true}'}), **given))
    finally:
        tokenizer.chat_template = before


def test_a_draft_that_knows_its_data_by_heart(models, tmp_path):
    target, tokenizer, _ = models
    data = data_of(models, tmp_path, word_prompts(), own_answers(target, tokenizer, word_prompts()))
    asked = word_prompts(seed=77)
    found = diagnose(case_of(models, prompts=asked, data=data, only=frozenset({"domain", "overfit"})), confirm=False)
    assert len(found.causes) == 1 and found.causes[0].cause in ("overfit", "domain") and found.causes[0].gain > 0.3
    assert not causes(case_of(models, data=data, only=frozenset({"domain", "overfit"})))


def test_accuracy_that_held_out_data_do_not_show(models):
    log = [{"step": 5, "accuracy_step_0": 0.5}, {"step": 9, "eval_accuracy_step_0": 0.4}, {"accuracy_step_0": 0.9}]
    assert causes(case_of(models, facts=TrainingFacts(log=log), only=frozenset({"overfit"}))) == ["overfit"]
    assert not causes(case_of(models, facts=TrainingFacts(log=log[:2]), only=frozenset({"overfit"})))


@pytest.mark.parametrize("own", [True, False])
def test_answers_that_are_not_the_targets(models, tmp_path, own):
    target, tokenizer, _ = models
    prompts = word_prompts()
    answers = own_answers(target, tokenizer, prompts)
    if not own:
        answers = [prompt.messages[-1]["content"] + " w20 w30 w40" for prompt in word_prompts(seed=5)]
    data = data_of(models, tmp_path, prompts, answers)
    found = causes(case_of(models, data=data, only=frozenset({"answers"})))
    assert found == ([] if own else ["answers"])
    assert (data.share_of_own_answers(target) > 0.9) is own


def test_a_draft_for_another_target(models):
    target, tokenizer, draft = models
    tuned = copy.deepcopy(target.model)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    other = type(target)(tuned, tap_ids=TAPS)
    case = Case(draft, Sample(other, tokenizer, word_prompts(), SETTINGS), trained_target=lambda: target)
    draft.attach(other)
    found = diagnose(case)
    (sound,) = case_of(models).sample.replayed([draft])
    assert found.causes[0].cause == "target"
    assert found.causes[0].acceptance_length == found.causes[0].decoded == pytest.approx(sound.acceptance_length())
    assert 0 < found.causes[0].details["agreement"] < 0.95
    assert agreement(case.sample, other) == 1.0


def test_what_the_folder_says_was_measured(models):
    known = {"num_speculative_tokens": 3, "max_new_tokens": ANSWER, "method": "chain", "temperature": 0.0, "turns": 1}
    known |= {"num_prompts": 6, "prompts": "p.jsonl", "target": "t"}
    for length, named in ((9.0, ["measured_before"]), (1.0, [])):
        facts = TrainingFacts(measured=[known | {"acceptance_length": length}])
        asked = {"facts": facts, "only": frozenset({"measured_before"})}
        assert causes(case_of(models, prompts_name="p.jsonl", **asked)) == named
        assert not causes(case_of(models, prompts_name="other.jsonl", **asked))


def test_sampling(models):
    found = diagnose(case_of(models, temperature=2.0, only=frozenset({"sampling"})), confirm=False)
    assert [one.cause for one in found.causes] == ["sampling"] and "temperature 2" in found.causes[0].evidence


def test_a_dtype_that_costs_acceptance(models):
    target, tokenizer, sound = models
    rough = copy.deepcopy(sound)
    with torch.no_grad():
        for parameter in rough.parameters():
            parameter.copy_((parameter * 4).round() / 4)
    found = causes(case_of(models, rough, in_float32=lambda: sound, only=frozenset({"dtype"})))
    assert found == ["dtype"]


def test_a_sound_draft_with_its_data(models, tmp_path):
    target, tokenizer, _ = models
    data = data_of(models, tmp_path, word_prompts(), own_answers(target, tokenizer, word_prompts()))
    found = diagnose(case_of(models, data=data), confirm=False)
    assert found.causes == [] and {"answers", "overfit"} & {one.cause for one in found.tried}


def test_the_facts_of_a_folder(tmp_path, caplog):
    assert TrainingFacts.read(None) == TrainingFacts.read(tmp_path) == TrainingFacts()
    (tmp_path / "card_facts.json").write_text(json.dumps({"hyperparameters": {"max_length": 512}}))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1}]}))
    (tmp_path / "acceptance.json").write_text(json.dumps({"acceptance_length": 2.5}))
    (tmp_path / "acceptance_none.json").write_text(json.dumps({"acceptance_length": None}))
    found = TrainingFacts.read(tmp_path)
    assert (found.arguments, found.log) == ({"max_length": 512}, [{"step": 1}])
    assert found.measured == [{"acceptance_length": 2.5}]
    (tmp_path / "trainer_state.json").write_text("{")
    assert TrainingFacts.read(tmp_path).log == [] and "trainer_state.json" in caplog.text


def test_small_parts():
    assert list(runs_of([1, 2, 3, 4])) == [(1, 2, 3), (2, 3, 4)] and list(runs_of([1])) == []
    assert coverage([[1, 2, 3, 4]], {(1, 2, 3)}) == 0.5 and coverage([], set()) == 0
    assert spread_over(10, 4) == [0, 2, 5, 7] and spread_over(2, 9) == [0, 1]
