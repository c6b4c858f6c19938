"""A target's config tells how many tokens it reads; it is asked before its weights are."""

import pytest
from transformers import GPT2Config, LlamaConfig, MistralConfig

from hf_eagle.targets.room import check_room


@pytest.fixture(params=[LlamaConfig, GPT2Config, MistralConfig])
def folder(request, tmp_path):
    """A model of which nothing but the config is there."""
    request.param(max_position_embeddings=64).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(("tokens", "beside"), [(1, 0), (64, 0), (63, 1)])
def test_what_it_reads(folder, tokens, beside):
    assert check_room(folder, "max_length", tokens, beside).get_text_config().max_position_embeddings == 64


@pytest.mark.parametrize(("tokens", "beside", "most"), [(65, 0, 64), (64, 1, 63), (10**6, 1, 63)])
def test_what_it_does_not_read(folder, tokens, beside, most):
    message = f"^`max_new_tokens` is {tokens}, but `target` .* reads 64 tokens at most.*: set it to {most} at most"
    with pytest.raises(ValueError, match=message):
        check_room(folder, "max_new_tokens", tokens, beside)


def test_a_gguf_file_is_not_asked(tmp_path):
    assert check_room(str(tmp_path), "max_length", 10**6, gguf_file="model.gguf") is None


def test_a_target_that_is_not_there_is_told(tmp_path):
    with pytest.raises((OSError, ValueError), match="`target`"):
        check_room(str(tmp_path / "nowhere"), "max_length", 4)
