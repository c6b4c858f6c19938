"""Options of the draft, as a user gives them to a run: what its log, its card and its config say of them."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file
from test_train_script import folder, train  # noqa: F401 (a fixture)


def test_a_draft_with_a_filled_vocabulary_and_rope_of_its_own(folder, tmp_path):  # noqa: F811
    """Said in the log, the card and the config; a resumed run keeps both, and the whole vocabulary needs no filling."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    out = ("--output_dir", tmp_path / "draft", "--draft_rope_scaling", json.dumps(scaling), "--max_steps", 3)
    large = ("--draft_vocab_size", 200)
    assert "hold only" in train(folder, *out, *large, expect=1)
    printed = train(folder, *out, *large, "--fill_vocabulary")
    told = "of the draft vocabulary are not among the supervised ones: it was filled up with the tokenizer's most"
    assert told in printed and told in (tmp_path / "draft" / "README.md").read_text()
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["draft_vocab_size"] == 200 and config["rope_scaling"] == scaling

    (said,) = re.findall(rf"(\d+) tokens {told}", printed)
    assert config["filled_tokens"] == int(said)

    # the vocabulary stays, so this stays true of it, whatever it is trained on next
    (tmp_path / "other.jsonl").write_text("".join((folder / "chats.jsonl").read_text().splitlines(True)[:9]))
    again, other = ("--resume_from_checkpoint", "last"), ("--train_data", tmp_path / "other.jsonl")
    train(folder, *out, *large, *again, "--max_steps", 6)
    assert f"{said} tokens {told}" in (tmp_path / "draft" / "README.md").read_text()
    train(folder, *out, *large, "--fill_vocabulary", *again, *other, "--max_steps", 7)
    assert f"{said} tokens {told}" in (tmp_path / "draft" / "README.md").read_text()
    other = ("--draft_rope_scaling", json.dumps({**scaling, "factor": 4.0}))
    printed = train(folder, *out, *other, *large, "--fill_vocabulary", *again, "--max_steps", 8, expect=1)
    assert "`draft_rope_scaling` makes RoPE" in printed and "Traceback" not in printed
    narrow = ("--draft_vocab_size", "none", "--draft_intermediate_size", 24)
    printed = train(folder, "--output_dir", tmp_path / "whole", *narrow, "--max_steps", 1)
    config |= {"draft_vocab_size": config["vocab_size"], "intermediate_size": 24}
    found = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert {name: found[name] for name in ("draft_vocab_size", "intermediate_size")} == {
        name: config[name] for name in ("draft_vocab_size", "intermediate_size")
    }
    printed = train(folder, "--output_dir", tmp_path / "whole", *narrow[:3], 32, *again, "--max_steps", 2, expect=1)
    assert "`draft_intermediate_size` is 32, but" in printed and "was trained with 24: leave it out" in printed


def test_a_scaling_that_this_draft_cannot_have_is_refused_before_data_are_read(folder, tmp_path):  # noqa: F811
    scaling = json.dumps({"rope_type": "linear", "factor": 2.0})
    options = ("--output_dir", tmp_path / "draft", "--draft_attention", "mla", "--draft_rope_scaling", scaling)
    printed = train(folder, *options, expect=1)
    assert "(`draft_rope_scaling`) must be of type default or yarn, got 'linear'" in printed
    assert "tokenis" not in printed.lower() and "conversations" not in printed


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="nothing compiles C++ here")
def test_a_compiled_draft_is_trained_as_another(folder, tmp_path):  # noqa: F811
    trained = []
    for mode in ("off", "on"):
        train(folder, "--output_dir", tmp_path / mode, "--compile_draft", mode, "--max_steps", 2)
        trained.append(load_file(tmp_path / mode / "model.safetensors"))

    apart = [(trained[1][name].float() - weight.float()).abs().mean().item() for name, weight in trained[0].items()]
    assert 0 < max(apart) < 1e-6  # rounded otherwise, and by no more than that
