"""Pruned drafts: the exact rows, bit-equal logits, coverage counted by hand, and refusals."""

import json
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from test_train_script import ROOT, folder  # noqa: F401 (a fixture)
from tiny import VOCAB, pad_batch, random_chats, tiny_eagle1_pair, tiny_pair, unrolled
from tiny_blocks import tiny_block_pair
from tiny_mla import tiny_mla_pair
from warm_python import warm_python

from hf_eagle import load_draft
from hf_eagle.data.conversations import build_dataset
from hf_eagle.data.records import load_records
from hf_eagle.drafts.prune import coverage, most_frequent, proposable, prune_vocabulary
from scripts import prune_draft


def logits_by_token(target, draft, batch):
    """`(rows, vocab)` of the first step, minus infinity where the draft cannot propose."""
    taps = target(batch["input_ids"], batch["attention_mask"]).taps
    with torch.no_grad():
        output = unrolled(draft, batch["input_ids"], taps, attention_mask=batch["attention_mask"])
        logits = draft.lm_head(output.hidden_states[0])
    ids = draft.to_target_ids(torch.arange(logits.shape[1]))
    return torch.full((len(logits), VOCAB), float("-inf")).index_copy(1, ids, logits)


@pytest.mark.parametrize("pair", [tiny_pair, tiny_mla_pair])
@pytest.mark.parametrize("size", [40, None])
def test_logits_of_the_kept_tokens_are_bit_equal(pair, size, tmp_path):
    target, draft = pair(size)
    batch = pad_batch(random_chats(3, seed=1))
    before, current = logits_by_token(target, draft, batch), proposable(draft)
    shuffled = torch.randperm(len(current), generator=torch.Generator().manual_seed(3))
    kept = current[shuffled][:16]  # in no order
    prune_vocabulary(draft, kept)
    draft.save_pretrained(tmp_path)
    again = load_draft(tmp_path, target)
    assert again.config.draft_vocab_size == 16 and sorted(kept.tolist()) == again.draft_ids.tolist()
    after = logits_by_token(target, again, batch)
    assert torch.equal(after[:, kept], before[:, kept])
    out = [i for i in range(VOCAB) if i not in kept.tolist()]
    assert (after[:, out] == float("-inf")).all()
    # pruned again, to one token (whose product another kernel computes)
    prune_vocabulary(again, kept[:1])
    torch.testing.assert_close(logits_by_token(target, again, batch)[:, kept[:1]], before[:, kept[:1]])


def test_a_pruned_draft_can_be_trained_and_keeps_its_precision():
    target, draft = tiny_pair(None)
    draft.to(torch.bfloat16)
    prune_vocabulary(draft, torch.arange(0, 60, 2))
    assert draft.lm_head.weight.dtype == torch.bfloat16 and draft.d2t.dtype == torch.int64
    trained = {name for name, p in draft.named_parameters() if p.requires_grad}
    assert "lm_head.weight" in trained and "embed_tokens.weight" not in trained


def test_the_most_frequent_are_kept_of_those_the_draft_has():
    _, draft = tiny_pair(40)
    current = proposable(draft).tolist()
    outside = next(i for i in range(VOCAB) if i not in current)
    counts = torch.zeros(VOCAB, dtype=torch.long)
    counts[outside] = 1000  # most frequent of all, but the draft has no row for it
    counts[current[5]], counts[current[9]], counts[current[20]] = 7, 9, 8
    found = most_frequent(draft, counts, 3, special_ids=[current[30], outside])
    assert found.tolist() == sorted([current[30], current[9], current[20]])
    assert coverage(draft, counts) == {40: 24 / 1024}


def test_coverage_of_several_sizes():
    _, draft = tiny_pair(None)
    draft.config.vocab_size = 10000  # all that is read of it
    counts = torch.arange(10000).flip(0)
    found = coverage(draft, counts, special_ids=[9999])
    total = int(counts.sum())
    assert list(found) == [4096, 8192, 10000] and found[10000] == 1.0
    assert found[4096] == int(counts[:4095].sum() + counts[9999]) / total


@pytest.mark.parametrize(
    ("size", "kept", "message"),
    [
        (40, list(range(30)), "`token_ids` holds .* tokens that the draft cannot propose"),
        (None, list(range(VOCAB)), "`token_ids` names 96 tokens, but the draft has 96 already and cannot grow"),
        (None, [3, 96], "must lie between 0 and 95"),
        (None, [], "must keep at least one token"),
    ],
)
def test_what_would_not_prune_is_refused(size, kept, message):
    _, draft = tiny_pair(size)
    before = {name: x.clone() for name, x in draft.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune_vocabulary(draft, torch.tensor(kept, dtype=torch.long))
    assert all(torch.equal(x, before[name]) for name, x in draft.state_dict().items())


def test_an_eagle1_draft_has_nothing_to_prune():
    with pytest.raises(ValueError, match="A LlamaForCausalLMEagle proposes by the target's head"):
        prune_vocabulary(tiny_eagle1_pair()[1], torch.arange(5))


@pytest.mark.parametrize("pair", [tiny_eagle1_pair, tiny_block_pair])
def test_the_script_counts_nothing_for_a_draft_without_a_vocabulary(pair, folder, tmp_path):  # noqa: F811
    pair()[1].save_pretrained(tmp_path / "draft")
    code, printed, problems = run(
        tmp_path / "draft", "--counts_from", folder / "chats.jsonl", "--target", folder / "target"
    )
    assert code == 1 and "has no vocabulary to prune" in problems and "records" not in problems and not printed


def test_growing_and_too_few_counts_are_refused():
    _, draft = tiny_pair(40)
    counts = torch.ones(VOCAB, dtype=torch.long)
    with pytest.raises(ValueError, match="`draft_vocab_size` is 41, but the draft has 40 already and cannot grow"):
        most_frequent(draft, counts, 41)
    with pytest.raises(ValueError, match="hold only 0 different tokens"):
        most_frequent(draft, torch.zeros_like(counts), 5)


def test_what_is_filled_in_is_what_the_draft_has():
    _, draft = tiny_pair(40)
    current = proposable(draft).tolist()
    found = most_frequent(draft, torch.zeros(VOCAB, dtype=torch.long), 5, fill_ids=reversed(range(VOCAB)))
    assert found.tolist() == current[-5:]


def run(*options):
    done = warm_python().run(ROOT / "scripts" / "prune_draft.py", *options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def draft_of_folder(folder, tmp_path):  # noqa: F811
    """A fresh draft of the whole vocabulary for the script tests' target."""
    from hf_eagle import EagleConfig, FrozenTarget, new_draft

    target = FrozenTarget.from_pretrained(str(folder / "target"))
    draft = new_draft(EagleConfig.from_target(target.config), target.embedding_weight())
    draft.save_pretrained(tmp_path / "draft")
    return tmp_path / "draft"


def test_the_script_counts_prunes_and_refuses(draft_of_folder, folder, tmp_path):  # noqa: F811
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    rows = build_dataset(load_records([str(folder / "chats.jsonl")]), tokenizer, 2048)
    said = Counter(i for r in rows for i, m in zip(r["input_ids"], r["loss_mask"], strict=True) if m)
    options = ("--counts_from", folder / "chats.jsonl", "--target", folder / "target")

    code, printed, problems = run(draft_of_folder, *options)
    assert code == 0 and f"{len(tokenizer)} tokens cover 100.00% of what is said" in printed, problems
    out = tmp_path / "pruned"
    code, printed, problems = run(draft_of_folder, *options, "--draft_vocab_size", 12, "--output_dir", out)
    assert code == 0, problems
    before, after = (load_file(d / "model.safetensors") for d in (draft_of_folder, out))
    kept = [j + int(offset) for j, offset in enumerate(after["d2t"])]
    assert len(kept) == 12 and set(tokenizer.all_special_ids) <= set(kept)
    least = min(said[i] for i in kept if i not in tokenizer.all_special_ids)
    assert all(said[i] <= least for i in set(said) - set(kept))
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"][kept])
    assert all(torch.equal(after[name], before[name]) for name in before if name != "lm_head.weight")

    size, out_filled = len(tokenizer) - 1, tmp_path / "filled"
    code, _, problems = run(draft_of_folder, *options, "--draft_vocab_size", size, "--output_dir", out_filled)
    assert code == 1 and "fill it up with `fill_vocabulary`" in problems and not out_filled.exists()
    filling = (*options, "--draft_vocab_size", size, "--output_dir", out_filled, "--fill_vocabulary")
    code, printed, problems = run(draft_of_folder, *filling)
    assert code == 0 and f"{size} of the draft's" in printed and "it was filled up with" in printed, problems
    unsaid = size - len(set(said) | set(tokenizer.all_special_ids))
    assert json.loads((out_filled / "config.json").read_text())["filled_tokens"] == unsaid
    assert "filled_tokens" not in json.loads((out / "config.json").read_text())

    code, _, problems = run(draft_of_folder, *options, "--draft_vocab_size", 8, "--output_dir", out)
    assert code == 1 and "already holds a draft" in problems and "Traceback" not in problems
    (tmp_path / "ids.json").write_text(json.dumps(kept[:5]))
    code, printed, problems = run(out, "--token_ids", tmp_path / "ids.json", "--output_dir", tmp_path / "less")
    assert code == 0 and "5 of the draft's 12 tokens" in printed, problems


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft_vocab_size", "8", "--output_dir", "out"], "which tokens are frequent is not known"),
        (["--output_dir", "out"], "Nothing says what to keep: give `token_ids`"),
        (["--counts_from", "x", "--target", "t", "--fill_vocabulary"], "`fill_vocabulary` is set, but"),
        (["--token_ids", "ids.json"], "`output_dir` is not set: name a folder"),
        (["--token_ids", "ids.json", "--counts_from", "x", "--output_dir", "out"], "`token_ids` says what to keep"),
        (["--counts_from", "x", "--draft_vocab_size", "8", "--output_dir", "out"], "name it with `target`"),
        (["--token_ids", __file__, "--output_dir", "out"], "cannot be read as JSON"),
        (["--token_ids", "ids.json", "--output_dir", "draft"], "is also the input `draft`: name"),
    ],
)
def test_the_scripts_errors_are_one_sentence(options, message):
    code, _, problems = run("draft", *options)
    assert code and message in problems and "Traceback" not in problems and len(problems.strip().splitlines()) == 1


@pytest.mark.parametrize("unknown", [-1, VOCAB, 10**20])
def test_an_id_that_the_target_does_not_have_is_named_with_its_file(unknown, tmp_path, monkeypatch):
    tiny_pair(40)[1].save_pretrained(tmp_path / "draft")
    (tmp_path / "ids.json").write_text(json.dumps([0, unknown, 1]))
    given = [tmp_path / "draft", "--token_ids", tmp_path / "ids.json", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["prune_draft.py", *map(str, given)])
    with pytest.raises(ValueError, match=f"^`token_ids` .*ids.json holds {unknown}, but the target's ids are 0 to"):
        prune_draft.main()
    assert not (tmp_path / "out").exists()
