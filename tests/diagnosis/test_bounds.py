"""Upper bounds hold at every place, whatever is right and wrong, and are exact where nothing is limited."""

from hypothesis import given
from hypothesis import strategies as st

from hf_eagle.diagnosis.bounds import counts_at_places, right_where_known, with_features, without_vocabulary


@st.composite
def answers(draw):
    """`(right, accepted, depth)`: whether the first drafted token is right at each place, and how many of a chain."""
    depth, right = draw(st.integers(1, 5)), draw(st.lists(st.booleans(), min_size=1, max_size=30))
    accepted = [draw(st.integers(1, depth)) if one else 0 for one in right]
    return right, accepted, depth


@given(answers(), st.data())
def test_knowing_more_tokens_accepts_no_less_anywhere(answer, data):
    right, accepted, depth = answer
    total = len(right) + depth
    outside = data.draw(st.lists(st.booleans(), min_size=total, max_size=total))
    found = without_vocabulary(accepted, outside, depth)
    assert all(own <= bound <= depth for own, bound in zip(accepted, found, strict=True))
    assert without_vocabulary(accepted, [False] * total, depth) == accepted
    assert without_vocabulary(accepted, [True] * total, depth) == [depth] * len(accepted)


@given(answers())
def test_features_of_drafted_tokens(answer):
    right, _, depth = answer
    found = with_features(right, depth)
    for place, count in enumerate(found):
        assert all(right[place : place + count])
        assert count == depth or not right[place + count]


def test_by_hand():
    # the second token behind the first is outside: the draft goes on behind it, and is wrong at once
    outside = [False, False, True, False, False, False, False]
    assert without_vocabulary([1, 0, 0, 2, 0], outside, 3) == [2, 1, 0, 2, 0]
    # the third place is followed by a token that is not known; two of the other four are right
    assert right_where_known([[1, 0, 0, 2, 0]], [[False, False, False, True, False, False]]) == 2 / 4
    assert right_where_known([[]], [[True]]) == 0
    assert with_features([1, 1, 0, 1, 1], 3) == [2, 1, 0, 3, 3]
    assert counts_at_places([[2, 1, 0, 2, 0], [0]]) == ([4, 0], [2, 1])
