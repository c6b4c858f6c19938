"""What tests of this room measure with: a tiny target, a draft taught to it, and a tokenizer of words."""

import pytest
from chain_models import VOCAB, make_draft, make_target
from tiny_tokenizer import word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """Token 9 ends an answer."""
    return word_tokenizer(VOCAB, 9)


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    return target, make_draft(target, draft_vocab_size=40, tap_ids=[0, 2, 3])
