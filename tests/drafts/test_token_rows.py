"""Tokenizers whose ids have a hole: what counts is the largest id, not the number of tokens."""

import json
from pathlib import Path

import pytest
from tiny_files import write_chats, write_tiny_target
from tiny_tokenizer import CHATML, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from warm_python import warm_python

from hf_eagle.drafts.vocabulary import token_rows


ROOT = Path(__file__).resolve().parents[2]
ROWS = 330


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target of so many rows, with a word whose id is the last of them, and chats that hold it."""
    folder = tmp_path_factory.mktemp("hole")
    write_tiny_target(folder / "target")
    config = AutoConfig.from_pretrained(folder / "target", vocab_size=ROWS)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "target")
    path = folder / "target" / "tokenizer.json"
    content = json.loads(path.read_text())
    word = next(token for token in reversed(content["model"]["vocab"]) if token.isascii() and len(token) > 3)
    content["model"]["vocab"][word] = ROWS - 1
    path.write_text(json.dumps(content))
    write_chats(folder / "chats.jsonl", words=[word.lstrip("\u0120").replace("\u0120", " ") or word, "red", "four"])
    return folder


def test_rows_are_those_of_the_largest_id(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    assert len(tokenizer) < ROWS and token_rows(tokenizer) == ROWS
    plain = tiny_tokenizer(CHATML)
    assert token_rows(plain) == len(plain)


@pytest.mark.parametrize("verb", ["preview", "train"])
def test_data_are_read_whose_ids_fit_the_embedding(folder, tmp_path, verb):
    given = ["--target", str(folder / "target"), "--train_data", str(folder / "chats.jsonl")]
    given += ["--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    script = "preview_data.py"
    if verb == "train":
        script = "train_eagle.py"
        given += ["--max_steps", "1", "--save_strategy", "no", "--ttt_steps", "2", "--max_length", "64"]
    done = warm_python().run(ROOT / "scripts" / script, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    if verb == "preview":
        assert f"{ROWS} tokens holds 100.00% of what is said" in done.stdout
