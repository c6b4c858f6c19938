"""Which rows count: the contract's own example, answers of one token, padding, packed documents."""

import pytest
import torch

from hf_eagle.losses.supervision import SupervisionPlan, supervised_steps


def predicted(mask, steps, supervision, documents=None):
    """For each step the token ids that are predicted."""
    mask = torch.tensor([mask])
    documents = torch.zeros_like(mask) if documents is None else torch.tensor([documents])
    counted = supervised_steps(mask, documents, steps, supervision)
    return [[int(t) + 2 + s for t in counted[s, 0].nonzero()[:, 0]] for s in range(steps)]


ANSWER_4_TO_7 = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]


def test_serving_asks_for_what_a_server_drafts():
    """The server has token 4; it drafts 5, 6, 7. The third draft of a round can only be 7."""
    assert predicted(ANSWER_4_TO_7, 4, "serving") == [[5, 6, 7], [6, 7], [7], []]


def test_reference_is_one_row_late():
    assert predicted(ANSWER_4_TO_7, 2, "reference") == [[6, 7, 8, 9], [6, 7, 8, 9]]


def test_reference_needs_the_token_that_is_embedded():
    assert predicted([0, 1, 1, 1], 1, "reference") == [[3, 4]]  # row 2 embeds token 3; row 3 would embed token 4


def test_answers_of_one_token_have_nothing_to_draft():
    assert predicted([0, 1, 0, 0, 1], 2, "serving") == [[], []]


def test_an_answer_that_opens_a_conversation_loses_its_first_row():
    """Row i needs features of the token before the answer; there is none before token 0."""
    assert predicted([1, 1, 1, 0], 1, "serving") == [[2]]


@pytest.mark.parametrize("supervision", ["serving", "reference"])
def test_two_answers_and_two_documents_do_not_mix(supervision):
    first, second = [0, 1, 1, 1], [0, 1, 1, 0]
    alone = [predicted(mask, 2, supervision) for mask in (first, second)]
    joined = predicted(first + second, 2, supervision, [0] * 4 + [1] * 4)
    assert joined == [a + [i + 4 for i in b] for a, b in zip(*alone, strict=True)]
    # an answer that ends one document and one that opens the next are two answers
    assert predicted([0, 1, 1, 1, 1, 1], 1, "serving", [0, 0, 0, 1, 1, 1])[0] == [2, 5]


def test_padding_is_never_supervised():
    assert predicted([1, 1, 1, 1], 1, "serving", [0, 0, 0, -1])[0] == [2]
    assert predicted([1, 1, 1, 1], 1, "serving", [-1, 0, 0, 0])[0] == [3]


def test_plan_lists_rows_steps_and_target_places():
    mask = torch.tensor([ANSWER_4_TO_7, [0, 1, 1] + [0] * 8])
    plan = SupervisionPlan.of(supervised_steps(mask, torch.zeros_like(mask), 3))
    assert plan.rows.tolist() == [3, 4, 5, 11]
    assert plan.counted.tolist() == [[True] * 4, [True, True, False, False], [True, False, False, False]]
    assert plan.counts.tolist() == [4, 2, 1]
    # the target's word on token i + 2 + s is given at token i + 1 + s
    assert plan.positions.tolist() == [4, 5, 6, 12]
    assert plan.positions[plan.position_of[0]].tolist() == [4, 5, 6, 12]
    assert plan.positions[plan.position_of[1]][:2].tolist() == [5, 6]
    assert plan.positions[plan.position_of[2]][:1].tolist() == [6]
