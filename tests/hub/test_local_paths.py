"""Paths of this machine in a card's text."""

import pytest

from hf_eagle.hub.local_paths import local_paths


@pytest.mark.parametrize("sign", ["", "`", '"', "(", "= "])
@pytest.mark.parametrize("end", ["", ".", "`", ", and", ")"])
def test_a_path_is_found_in_any_text(tmp_path, sign, end):
    path = tmp_path / "some" / "draft-1.0"  # which need not exist any more
    assert local_paths(f"Serve {sign}{path}{end}\nand {path}") == [str(path)]


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/you/your-draft/tmp/x",
        "you/your-draft and tokens/s, and/or input/output",
        "POST /v1/chat/completions",
        "/usr/bin/env python",
        "~/drafts/mine",
        "1/2 or 3 /4/ 5",
    ],
)
def test_what_is_no_path_of_this_machine_is_none(text):
    assert local_paths(text) == []
