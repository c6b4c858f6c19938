"""JSON values for property tests: all that a file can say, of which readers that infer types make something else."""

from hypothesis import strategies as st


# what types are inferred from: dates, numbers, words for nothing
TELLING = [
    "2024-05-06",
    "2024-05-06T00:00:00Z",
    "007",
    "1e5",
    "NA",
    "None",
    "null",
    "nan",
    "true",
    "[1]",
    '{"a": 1}',
    "",
]
TEXTS = st.one_of(
    st.sampled_from(TELLING), st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), TEXTS
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, JSON, max_size=4)
