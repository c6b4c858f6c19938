"""A draft started from another: the same function where it may be, rows of the head by token, refusals."""

from itertools import permutations

import pytest
import torch
from safetensors.torch import load_file
from test_train_script import WORDS, folder, train, trained, write_chats  # noqa: F401 (folder, trained: fixtures)
from tiny import VOCAB, pad_batch, random_chats, tiny_eagle1_pair, tiny_mapping, tiny_pair, unrolled
from tiny_blocks import tiny_block_pair
from tiny_mla import tiny_mla_pair

from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.warm_start import start_from


def fresh_draft(target, like, size, seed):
    """A new draft of another vocabulary, its head started from the target's."""
    fields = {**like.config.to_dict(), "draft_vocab_size": size}
    torch.manual_seed(seed)
    mapping = None if size == VOCAB else tiny_mapping(size, seed)
    return new_draft(type(like.config)(**fields), target.embedding_weight(), mapping, target.head_weight())


def hidden_states(target, draft, batch):
    taps = target(batch["input_ids"], batch["attention_mask"]).taps
    with torch.no_grad():
        output = unrolled(draft, batch["input_ids"], taps, num_steps=3, attention_mask=batch["attention_mask"])
    return output.hidden_states


@pytest.mark.parametrize("pair", [tiny_pair, tiny_mla_pair])
@pytest.mark.parametrize(("old", "new"), [(40, 40), (40, 30), (30, VOCAB), (VOCAB, 40)])
def test_the_body_is_the_same_and_rows_go_by_token(pair, old, new):
    target, source = pair(None if old == VOCAB else old, fc_norm=True, norm_output=True)
    draft = fresh_draft(target, source, new, seed=9)
    mapping = None if draft.d2t is None else draft.d2t.clone()
    carried = start_from(draft, source)
    batch = pad_batch(random_chats(2, seed=1))
    assert torch.equal(hidden_states(target, draft, batch), hidden_states(target, source, batch))
    assert mapping is None or torch.equal(draft.d2t, mapping)

    row_of = {int(token): row for row, token in enumerate(source.to_target_ids(torch.arange(old)))}
    counted = 0
    for row, token in enumerate(draft.to_target_ids(torch.arange(new)).tolist()):
        wanted = source.lm_head.weight[row_of[token]] if token in row_of else target.head_weight()[token]
        assert torch.equal(draft.lm_head.weight[row], wanted), token
        counted += token in row_of
    assert carried == counted and carried > 0
    assert {n for n, p in draft.named_parameters() if not p.requires_grad} == {"embed_tokens.weight"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tap_ids": [1, 4, 5]}, r"trained with `tap_ids` \[1, 4, 5\], but the draft to train has \[2, 4, 5\]"),
        ({"tap_ids": [1, 2, 4, 6]}, "trained with `tap_ids`"),
        ({"fc_norm": True}, "trained with `fc_norm` True"),
        ({"norm_output": True}, "trained with `norm_output` True"),
        ({"intermediate_size": 64}, r"mlp.gate_proj.weight is \[64, 32\] instead of \[48, 32\]"),
        ({"tokenizer_fingerprint": "abc"}, "made with another tokenizer"),
        ({"vocab_size": 100}, "trained with `vocab_size` 100"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_copied(fields, message):
    _, draft = tiny_pair(40)
    draft.config.tokenizer_fingerprint = "def"
    vocab = fields.pop("vocab_size", None)
    _, source = tiny_pair(40, seed=3, **fields)
    source.config.vocab_size = vocab or source.config.vocab_size
    before = {name: x.clone() for name, x in draft.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        start_from(draft, source)
    assert all(torch.equal(x, before[name]) for name, x in draft.state_dict().items())


def test_an_eagle1_draft_is_started_without_touching_the_targets_head():
    target, source = tiny_eagle1_pair(seed=1)
    _, draft = tiny_eagle1_pair(seed=2)
    head = target.head_weight().clone()
    draft.attach(target)
    assert start_from(draft, source) == 0
    assert torch.equal(target.head_weight(), head) and not draft.fc.bias.any()
    for name, tensor in source.named_parameters():
        if name not in ("embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(draft.get_parameter(name), tensor), name


def test_another_attention_is_refused():
    with pytest.raises(ValueError, match="is of class Eagle3DeepseekV2ForCausalLM, but .* the same `draft_attention`"):
        start_from(tiny_pair(40)[1], tiny_mla_pair(40)[1])


def test_training_goes_on_from_a_draft_with_other_data(trained, folder, tmp_path):  # noqa: F811
    write_chats(folder / "others.jsonl", words=[word for word in WORDS if "t" not in word] + ["cat", "dog", "fox"])
    still = ("--learning_rate", 0, "--max_steps", 1, "--save_strategy", "no")  # so that what it started from is left
    options = ("--init_from", trained, "--train_data", folder / "others.jsonl", "--draft_vocab_size", 20)
    printed = train(folder, "--output_dir", tmp_path / "next", *options, *still)
    before, after = (load_file(run / "model.safetensors") for run in (trained, tmp_path / "next"))
    old, new = ((x["d2t"] + torch.arange(len(x["d2t"]))).tolist() for x in (before, after))
    common = sorted(set(old) & set(new))
    assert 0 < len(common) < len(new) == 20
    assert f"with {len(common)} of its tokens among the draft's 20" in printed
    for token in common:
        assert torch.equal(after["lm_head.weight"][new.index(token)], before["lm_head.weight"][old.index(token)])
    body = set(before) - {"lm_head.weight", "d2t", "t2d"}
    assert all(torch.equal(after[name], before[name]) for name in body)

    refused = ("--output_dir", tmp_path / "other", "--init_from", folder / "target")
    printed = train(folder, *refused, expect=1)
    assert "is not a draft" in printed and "Traceback" not in printed


@pytest.mark.parametrize("pairs", list(permutations([tiny_pair, tiny_eagle1_pair, tiny_block_pair], 2)))
def test_a_draft_of_another_kind_is_refused(pairs):
    draft, source = (pair()[1] for pair in pairs)
    told = f"`init_from` is of class {type(source).__name__}, but the draft to train of {type(draft).__name__}"
    with pytest.raises(ValueError, match=f"{told}: give both the same `draft_attention` and `method`"):
        start_from(draft, source)
