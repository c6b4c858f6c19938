"""A sample of transformers' causal model types: exact in all that is done with a target, or refused in one sentence.

`make model-types` looks at all of them.
"""

import pytest
from every_model_type import EXACT, REFUSED, STEPS, TYPES, examine
from releases import skip_before, skip_unknown
from tiny_model_types import MODEL_TYPES, RECURRENT, SPARSE


WHOLE = ["gemma4_text", "llama", "mamba", "qwen3_5_moe_text"]
NOT_DECODED = ["bloom", "recurrent_gemma"]
NOT_TAPPED = ["bert", "deepseek_v4", "inkling2_loop_text", "inkling2_text", "moshi"]


@pytest.mark.parametrize("name", [*WHOLE, *NOT_DECODED, *NOT_TAPPED])
def test_a_type_is_exact_or_refused(name):
    skip_unknown(name)
    if name == "mamba":  # older ones have no class of a layer's states that says what it holds
        skip_before("transformers", "5.24")
    found = {step: word for step, (word, _) in examine(name).items()}
    wanted = {step.__name__: REFUSED if name in NOT_TAPPED else EXACT for step in STEPS}
    if name in NOT_DECODED:
        wanted["decoded"] = REFUSED
    assert found == wanted


def test_types_that_must_not_be_refused_are_known_to_transformers():
    skip_before("transformers", "5.24")
    assert {*RECURRENT, *SPARSE, *MODEL_TYPES, *WHOLE, *NOT_DECODED, *NOT_TAPPED} <= set(TYPES)
