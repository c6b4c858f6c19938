"""Every verb that loads a target or a draft ends in one sentence over one that is broken, and writes nothing."""

import json
import shutil
import sys
from pathlib import Path

import foreign_folders
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import write_chats, write_tiny_target
from warm_python import warm_python

from hf_eagle import EagleConfig, FrozenTarget, new_draft
from hf_eagle.drafts.vocabulary import VocabularyMapping


ROOT = Path(__file__).resolve().parents[2]
SHORT = "--ttt_steps 1 --max_length 64 --report_to none"
# of the target's files, what a verb reads: the config alone, the tokenizer too, or the weights too
VERBS = {
    "train_eagle": ("weights", f"--target T --train_data C --output_dir O --max_steps 1 --save_strategy no {SHORT}"),
    "cache_features": ("weights", f"--target T --train_data C --feature_store O --output_dir O2 {SHORT}"),
    "evaluate_draft": ("weights", "--target T --draft D --prompts P --output_json O --max_new_tokens 2"),
    "diagnose_draft": ("weights", "D --target T --prompts P --max_new_tokens 2 --confirm false"),
    "regenerate_answers": ("weights", "--target T --data C --output O --num_records 1 --max_new_tokens 2"),
    "benchmark_training_step": ("weights", "--target T --data C --length 64 --num_chats 4 --repeats 1 --device cpu"),
    "preview_data": ("tokenizer", "--target T --train_data C --output_dir O"),
    "write_prompts": (
        "tokenizer",
        "--target T --server_url http://127.0.0.1:9 --output O --num_prompts 1 --max_new_tokens 8",
    ),
    "prune_draft": ("tokenizer", "D --output_dir O --counts_from C --target T --draft_vocab_size 8"),
    "benchmark_serving": (
        "tokenizer",
        f"--target T --draft D --prompts P --output_json O --serving_python {sys.executable}",
    ),
    "import_draft": ("config", "F --target T --output_dir O"),
    "check_draft": ("config", "D --target T"),
    "publish_draft": ("config", "D --target T --repo_id you/your-draft --dry_run"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A sound target, draft and foreign draft, chats and prompts."""
    folder = tmp_path_factory.mktemp("files")
    write_tiny_target(folder / "target")
    write_chats(folder / "chats.jsonl", 12)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "one two three"}) + "\n")
    target = FrozenTarget.from_pretrained(str(folder / "target"))
    config = EagleConfig.from_target(target.config, 40)
    mapping = VocabularyMapping.from_token_ids(torch.arange(40), target.config.vocab_size)
    new_draft(config, target.embedding_weight(), mapping).save_pretrained(folder / "draft")
    foreign_folders.write(folder / "foreign", *foreign_folders.modelopt(target.embedding_weight().float()))
    return folder


def run(verb, files, out, **other):
    """The verb's error, with some of its inputs in another place."""
    places = {"T": "target", "D": "draft", "F": "foreign", "C": "chats.jsonl", "P": "prompts.jsonl"}
    places = {letter: files / name for letter, name in places.items()} | {"O": out / "out", "O2": out / "out2"} | other
    words = [str(places.get(word, word)) for word in VERBS[verb][1].split()]
    done = warm_python().run(ROOT / "scripts" / f"{verb}.py", *words)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode in (1, 2) and len(told) == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    assert " failed in " not in told[0] and "LOAD REPORT" not in done.stderr
    assert not list(out.glob("out*/*.safetensors")) and not list(out.glob("*.jsonl"))
    return told[0].removeprefix("error: ")


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(("up_proj.weight", "fc.weight")))
    save_file({n: x for n, x in tensors.items() if n != name}, folder / "model.safetensors", metadata={"format": "pt"})


def replaced(name, content):
    return lambda folder: (folder / name).write_text(content)


BROKEN_TARGETS = {
    "config": (replaced("config.json", "[]"), "config.json must hold an object"),
    "tokenizer": (replaced("tokenizer.json", "{oops"), "tokenizer.json cannot be read as JSON"),
    "cut": (cut, "model.safetensors is cut"),
    "weights": (without_a_tensor, "lacks 1 of the 75 tensors"),
    "ends": (replaced("generation_config.json", "{oops"), "generation_config.json cannot be read as JSON"),
}


_READ = ("config", "tokenizer", "weights")
TARGETS = [(verb, broken) for verb in VERBS for broken in _READ[: 1 + _READ.index(VERBS[verb][0])]]
TARGETS += [("evaluate_draft", "cut"), ("regenerate_answers", "ends"), ("train_eagle", "ends")]


@pytest.mark.parametrize(("verb", "broken"), TARGETS)
def test_a_broken_target(verb, broken, files, tmp_path):
    target = shutil.copytree(files / "target", tmp_path / "target")
    change, message = BROKEN_TARGETS[broken]
    change(target)
    told = run(verb, files, tmp_path, T=target)
    assert told.startswith(f"`target` {target} ") and message in told and told.endswith(".")


BROKEN_DRAFTS = {
    "config": (replaced("config.json", "[]"), "config.json must hold an object"),
    "cut": (cut, "model.safetensors is cut"),
    "tensor": (without_a_tensor, "missing"),
    "weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "nothing": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
}


DRAFTS = [
    (verb, "config") for verb in ("evaluate_draft", "prune_draft", "check_draft", "publish_draft", "import_draft")
]
DRAFTS += [(verb, "tensor") for verb in ("evaluate_draft", "prune_draft", "import_draft")]
DRAFTS += [("diagnose_draft", broken) for broken in ("config", "tensor", "cut", "weights")]
DRAFTS += [(verb, broken) for verb in ("prune_draft", "check_draft") for broken in ("cut", "weights", "nothing")]


@pytest.mark.parametrize(("verb", "broken"), DRAFTS)
def test_a_broken_draft(verb, broken, files, tmp_path):
    letter, name = ("F", "foreign") if verb == "import_draft" else ("D", "draft")
    draft = shutil.copytree(files / name, tmp_path / name)
    change, message = BROKEN_DRAFTS[broken]
    change(draft)
    told = run(verb, files, tmp_path, **{letter: draft})
    assert (str(draft) in told or "`draft`" in told) and message in told and told.endswith(".")
