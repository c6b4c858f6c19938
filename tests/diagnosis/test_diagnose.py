"""What is wrong is named first, what it costs is what decoding says, and nothing is found in a sound draft."""

import copy

import pytest
import torch
from block_models import block_draft
from planted import SCALED, flag, permute_head, reorder, rotate, shift, swap
from taught_drafts import ANSWER, target_and_tokenizer, taught, word_prompts

from hf_eagle.diagnosis.case import Case
from hf_eagle.diagnosis.causes import CAUSES
from hf_eagle.diagnosis.diagnose import diagnose
from hf_eagle.diagnosis.sample import Sample
from hf_eagle.drafts.build import load_draft
from hf_eagle.evaluation.acceptance import measure_acceptance
from hf_eagle.evaluation.measurement import DecodingSettings


SETTINGS = DecodingSettings(num_speculative_tokens=3, max_new_tokens=ANSWER, batch_size=4)
KINDS = {"eagle3": {}, "eagle3.1": {"fc_norm": True, "norm_output": True}, "part": {"draft_vocab_size": 60}}
LAYER = "midlayer"
FAULTS = [
    ("eagle3", "tap_order", reorder("fc", (2, 0, 1))),
    ("eagle3.1", "tap_order", reorder("fc", (1, 0, 2))),
    ("eagle3", "tap_ids", shift(1)),
    ("eagle3.1", "tap_ids", shift(-1)),
    ("eagle3", "rope_base", rotate(rope_theta=500_000.0)),
    ("eagle3", "rope_scaling", lambda draft: draft.rotate_by(SCALED | {"original_max_position_embeddings": 8})),
    ("eagle3", "norms", swap((f"{LAYER}.input_layernorm", f"{LAYER}.hidden_norm"))),
    ("part", "norms", swap(("norm", f"{LAYER}.post_attention_layernorm"))),
    ("eagle3", "norm_output", flag("norm_output", True)),
    ("eagle3.1", "norm_output", flag("norm_output", False)),
    ("eagle3", "head_rows", permute_head),
    ("part", "head_rows", permute_head),
]


@pytest.fixture(scope="module")
def models():
    target, tokenizer = target_and_tokenizer()
    return target, tokenizer, {name: taught(target, tokenizer, word_prompts(), **x) for name, x in KINDS.items()}


def case_of(target, tokenizer, draft, prompts=None, template_kwargs=None, **known):
    """A draft to be examined with this target's taps set as the draft says."""
    target.tap_ids = draft.config.tap_ids
    draft.attach(target)
    return Case(draft, Sample(target, tokenizer, prompts or word_prompts(), SETTINGS, template_kwargs), **known)


@pytest.mark.parametrize(("kind", "cause", "plant"), FAULTS, ids=[f"{kind}: {cause}" for kind, cause, _ in FAULTS])
def test_a_planted_fault_is_named_first(models, kind, cause, plant, tmp_path):
    target, tokenizer, drafts = models
    draft = copy.deepcopy(drafts[kind])
    (sound,) = case_of(target, tokenizer, draft).sample.replayed([draft])
    plant(draft)

    found = diagnose(case_of(target, tokenizer, draft))
    assert [one.cause for one in found.causes][:1] == [cause], [one.as_json() for one in found.causes]
    first = found.causes[0]
    assert first.acceptance_length == first.decoded == pytest.approx(sound.acceptance_length())
    assert first.gain == pytest.approx(first.acceptance_length - found.summary["acceptance_length"])
    assert found.decoded == found.summary["acceptance_length"]

    # the repaired folder is measured as it was foretold
    found.repaired().save_pretrained(tmp_path)
    target.tap_ids = load_draft(tmp_path).config.tap_ids
    again = load_draft(tmp_path, target)
    how = {"num_speculative_tokens": 3, "max_new_tokens": ANSWER, "progress": False, "compare_to_target": False}
    assert measure_acceptance(target, again, tokenizer, word_prompts(), **how)["acceptance_length"] == first.decoded


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found_in_a_sound_draft(models, kind):
    target, tokenizer, drafts = models
    found = diagnose(case_of(target, tokenizer, drafts[kind]))
    assert found.causes == [] and found.repaired is None
    assert {one.cause for one in found.tried} >= {"tap_order", "tap_ids", "rope_base", "norms", "ttt_steps"}
    by_place = found.summary["acceptance_by_answer_position"]
    assert [x["up_to"] for x in by_place] == [16, None]
    assert sum(x["drafts"] for x in by_place) == found.summary["drafts"]
    assert found.summary["acceptance_length"] > 2 and {one.cause for one in found.tried} <= set(CAUSES)


def test_nothing_is_found_in_a_sound_draft_of_blocks(models):
    """A kind that is proposed round after round, with neither own head nor steps."""
    target, tokenizer = target_and_tokenizer()
    draft = block_draft(target, steps=60, tap_ids=[1, 3, 4])
    found = diagnose(case_of(target, tokenizer, draft))
    assert found.causes == []
    assert {one.cause for one in found.tried} == {"tap_order", "tap_ids", "rope_base", "norms"}


def test_only_some_causes_are_tried(models):
    target, tokenizer, drafts = models
    found = diagnose(case_of(target, tokenizer, drafts["eagle3"], only=frozenset({"norms"})), confirm=False)
    assert {one.cause for one in found.tried} == {"norms"} and found.decoded is None


def test_the_target_is_left_with_its_taps(models):
    target, tokenizer, drafts = models
    case = case_of(target, tokenizer, drafts["eagle3"])
    before = list(target.tap_ids)
    case.sample.replayed([], [0, 2, 3])
    assert target.tap_ids == before


def test_prompts_that_are_answered_with_one_token_say_so(models):
    target, tokenizer, drafts = models
    case = case_of(target, tokenizer, drafts["eagle3"])
    case.sample.settings = DecodingSettings(num_speculative_tokens=3, max_new_tokens=1, batch_size=4)
    with pytest.raises(ValueError, match="answered all `prompts` with one token"):
        diagnose(case)


def test_a_lost_norm_is_seen(models):
    target, tokenizer, drafts = models
    draft = copy.deepcopy(drafts["eagle3"])
    draft.midlayer.hidden_norm.weight = torch.nn.Parameter(torch.ones(32))
    found = diagnose(case_of(target, tokenizer, draft, only=frozenset({"lost_norms"})), confirm=False)
    assert [one.cause for one in found.causes] == ["lost_norms"] and "hidden_norm" in found.causes[0].evidence
