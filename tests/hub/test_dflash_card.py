"""The card of a DFlash draft: its own commands, with the tokens that its blocks hold."""

import pytest
from tiny_blocks import tiny_block_pair

from hf_eagle.hub.model_card import render_model_card


@pytest.mark.parametrize("form", ["servers", "transformers"])
def test_commands_are_those_of_blocks(form, tmp_path):
    _, draft = tiny_block_pair(served_form=form, block_size=6)
    draft.save_pretrained(tmp_path)
    text = render_model_card(tmp_path, {"name": "Mine", "target": "me/target", "kind": "dflash"}).read_text()

    assert '"method": "dflash"' in text and '"num_speculative_tokens": 5' in text
    assert "--speculative-algorithm DFLASH" in text and "--speculative-num-draft-tokens 6" in text
    assert "A DFlash draft for" in text and "2602.06036" in text
    assert ('speculation_type="dflash"' in text) == (form == "transformers")
