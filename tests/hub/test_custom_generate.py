"""What a published draft carries for plain transformers; test_publish.py has someone use it without hf_eagle."""

import sys

import pytest
import torch
from chain_models import make_draft, make_target, random_prompts
from transformers import TextStreamer
from transformers.dynamic_module_utils import get_imports

from hf_eagle.hub import generate_entry
from hf_eagle.hub.custom_generate import bundle, write_custom_generate


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    return target, make_draft(target, draft_vocab_size=40, tap_ids=[0, 2, 3])


@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    target, draft = pair
    target.model.save_pretrained(folder / "target")
    draft.save_pretrained(folder / "draft")
    write_custom_generate(folder / "draft")
    return folder / "target", folder / "draft"


def test_the_files_hold_everything_that_they_import():
    files = bundle("you/your-draft")
    assert "\nDRAFT = 'you/your-draft'\n" in files["generate.py"]
    assert "\nDRAFT = None\n" in bundle()["generate.py"]
    for name, source in files.items():
        for line in source.splitlines():
            assert not line.strip().startswith(("from hf_eagle", "import hf_eagle")), (name, line)
            if line.strip().startswith("from ."):
                assert f"{line.split()[1].removeprefix('.')}.py" in files, (name, line)


def run(pair, folders, prompts=None, **arguments):
    prompts = random_prompts(1, 5, seed=3) if prompts is None else prompts
    return generate_entry.generate(pair[0].model, prompts, draft=str(folders[1]), **arguments)


def test_plain_transformers_needs_nothing_else(tmp_path):
    """By transformers' own list of what a file imports, without which it refuses to load it."""
    needed = set()
    for path in write_custom_generate(tmp_path).iterdir():
        needed |= set(get_imports(path))
    assert needed - sys.stdlib_module_names == {"torch", "transformers"}


def test_what_generate_defaults_to_and_where_an_answer_ends(pair, folders):
    model, prompts = pair[0].model, random_prompts(2, 5, seed=3)
    mask = torch.ones_like(prompts)
    for arguments in ({}, {"max_length": 17}, {"max_new_tokens": 30, "eos_token_id": [7, 11], "pad_token_id": 0}):
        wanted = model.generate(prompts, attention_mask=mask, **arguments)
        assert torch.equal(run(pair, folders, prompts, **arguments), wanted)


def test_sampling_takes_its_arguments_from_the_generation_config(pair, folders):
    """With a nucleus that holds one token, drawing is greedy; without, it is not."""
    greedy = run(pair, folders, max_new_tokens=16)
    torch.manual_seed(0)
    assert torch.equal(run(pair, folders, max_new_tokens=16, do_sample=True, top_k=1), greedy)
    assert not torch.equal(run(pair, folders, max_new_tokens=16, do_sample=True, temperature=3.0), greedy)


def test_the_model_is_left_as_it_was(pair, folders):
    model = pair[0].model
    model.train()
    model.lm_head.weight.requires_grad_(True)
    run(pair, folders, max_new_tokens=4)
    assert model.training and model.lm_head.weight.requires_grad
    assert not model.get_input_embeddings().weight.requires_grad
    model.eval().requires_grad_(False)


def test_tokens_are_streamed(pair, folders):
    class Collect(TextStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    streamer = Collect()
    wanted = run(pair, folders, max_new_tokens=9, streamer=streamer)
    assert streamer.seen == [*wanted[0].tolist(), "end"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_beams": 4}, "`num_beams` is not done with a draft"),
        ({"repetition_penalty": 1.3}, "`repetition_penalty` is not done"),
        ({"pixel_values": torch.zeros(1)}, "`pixel_values` is not done"),
        ({"max_length": 4}, "`max_length` is 4, but the prompt has 5 tokens"),
    ],
)
def test_what_would_change_the_tokens_is_refused(pair, folders, arguments, words):
    with pytest.raises(ValueError, match=words):
        run(pair, folders, **arguments)


def test_a_draft_must_be_named(pair):
    with pytest.raises(ValueError, match="`draft` is missing: pass the folder"):
        generate_entry.generate(pair[0].model, random_prompts(1, 5, seed=3), max_new_tokens=4)
