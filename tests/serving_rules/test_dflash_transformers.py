"""transformers' own `generate` drafts with a folder of the second form, and drafts what the servers do."""

import pytest
import torch
from block_models import BLOCK, PROMPTS, block_draft, served_blocks, wide_target
from chain_models import generate
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.generation import DFlashTokenCandidateGenerator

from hf_eagle.decoding import speculative_generate


LENGTH = 24


@pytest.fixture(scope="module")
def target():
    return wide_target()


@pytest.fixture(scope="module", params=[(1, 0), (2, 30)], ids=["random", "taught, 2 layers"])
def folders(request, target, tmp_path_factory):
    """The same draft in both forms."""
    folder, (layers, steps) = tmp_path_factory.mktemp("draft"), request.param
    draft = block_draft(target, layers, steps)
    draft.save_pretrained(folder / "main")
    draft.config.served_form = "transformers"
    draft.save_pretrained(folder / "second")
    return folder, draft


@pytest.fixture
def drafted(monkeypatch):
    """Each block that transformers drafts: `[place of the newest token, drafted tokens]`."""
    blocks, get = [], DFlashTokenCandidateGenerator.get_candidates

    def heard(generator, input_ids, *args, **kwargs):
        found = get(generator, input_ids, *args, **kwargs)
        length = input_ids.shape[1]
        if found[0].shape[1] > length:
            blocks.append([length - 1, found[0][0, length:].tolist()])
        return found

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", heard)
    return blocks


def test_the_second_form_is_the_same_draft(folders):
    folder, _ = folders
    model, info = AutoModel.from_pretrained(folder / "second", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    other = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    held = {name: x for name, x in model.state_dict().items()}
    for name, tensor in load_file(folder / "main" / "model.safetensors").items():
        assert torch.equal(held.pop(other.get(name, name)), tensor)
    assert not held


def test_generate_drafts_what_a_server_does_and_is_lossless(folders, target, drafted):
    folder, draft = folders
    assistant = AutoModel.from_pretrained(folder / "second", dtype=torch.float32)
    accepted = 0
    for prompt in PROMPTS[:2]:
        drafted.clear()
        how = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        ids = prompt[None]
        found = target.model.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=assistant, speculation_type="dflash", **how
        )
        assert torch.equal(found, generate(target, ids, LENGTH))

        blocks, counts = served_blocks(target, folder / "main", prompt, LENGTH)
        # it stops a token before the end, where a server drafts once more; the last block may be cut short there
        assert len(blocks) - 1 <= len(drafted) <= len(blocks)
        for (place, tokens), (wanted_place, wanted) in zip(drafted, blocks, strict=False):
            assert place == wanted_place and tokens == wanted[: len(tokens)]
            assert len(tokens) == BLOCK - 1 or place + BLOCK > len(prompt) + LENGTH

        ours = speculative_generate(target, draft, ids, max_new_tokens=LENGTH)
        assert (ours.drafts[0], ours.accepted_per_position[0]) == (len(blocks), counts)
        accepted += sum(counts)
    assert accepted > 12 or draft.config.num_hidden_layers == 1  # what keeps this test strong: taught drafts are right
