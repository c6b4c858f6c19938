"""Token counts -> mapping -> buffers and back."""

import time

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCAB, tiny_mapping, tiny_pair
from tiny_tokenizer import tiny_tokenizer

from hf_eagle.drafts.vocabulary import (
    VocabularyMapping,
    check_mapping,
    count_supervised_tokens,
    count_unseen,
    draft_token_ids,
    frequent_ids,
    told_filled,
)


def test_the_most_frequent_tokens_are_kept_and_special_ones_always():
    counts = torch.tensor([0, 9, 0, 5, 7, 1, 0, 7])
    mapping = VocabularyMapping.from_counts(counts, 4, special_ids=[6])
    assert draft_token_ids(mapping.d2t).tolist() == [1, 4, 6, 7]
    assert mapping.d2t.tolist() == [1, 3, 4, 4]  # offsets, not ids
    assert mapping.t2d.nonzero().flatten().tolist() == [1, 4, 6, 7]
    assert mapping.coverage == pytest.approx(23 / 29)
    check_mapping(mapping.d2t, mapping.t2d)


def test_ties_fall_to_the_lower_id():
    mapping = VocabularyMapping.from_counts(torch.ones(10, dtype=torch.long), 3)
    assert draft_token_ids(mapping.d2t).tolist() == [0, 1, 2]


def test_whole_vocabulary_is_the_identity():
    mapping = VocabularyMapping.from_counts(torch.tensor([3, 0, 1]), 3)
    assert mapping.d2t.tolist() == [0, 0, 0] and mapping.t2d.all() and mapping.coverage == 1.0


def test_a_vocabulary_is_filled_in_the_order_of_the_ids_that_are_given():
    counts = torch.tensor([0, 9, 0, 5, 0, 1, 0, 0])
    mapping = VocabularyMapping.from_counts(counts, 6, special_ids=[6], fill_ids=[4, 0, 1, 2])
    assert draft_token_ids(mapping.d2t).tolist() == [0, 1, 3, 4, 5, 6]
    assert mapping.coverage == 1.0
    told = told_filled(count_unseen(draft_token_ids(mapping.d2t), counts, [6]))
    assert told.startswith("2 tokens of the draft vocabulary are not among the supervised ones")
    assert count_unseen(torch.tensor([1, 3, 6]), counts, [6]) == 0
    assert told_filled(0) is None and told_filled(None) is None


@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    special=st.lists(st.integers(0, 29), max_size=4),
    data=st.data(),
)
def test_filling_only_adds_what_is_missing(counts, special, data):
    """Counted and special tokens first, then `fill_ids` in their order; a size that fits without stays as it is."""
    fill = data.draw(st.permutations(range(len(counts))))[: data.draw(st.integers(0, len(counts)))]
    special = {i for i in special if i < len(counts)}
    seen = {i for i, count in enumerate(counts) if count} | special
    left = [i for i in fill if i not in seen]
    size = data.draw(st.integers(max(len(special), 1), len(counts)))
    if len(counts) > size > len(seen) + len(left):
        with pytest.raises(ValueError, match="hold only"):
            VocabularyMapping.from_counts(torch.tensor(counts), size, special, fill)
        return
    kept = set(draft_token_ids(VocabularyMapping.from_counts(torch.tensor(counts), size, special, fill).d2t).tolist())
    assert len(kept) == size
    if size == len(counts):
        assert kept == set(range(size))
    elif size > len(seen):
        assert kept == seen | set(left[: size - len(seen)])
    else:
        assert kept == set(
            draft_token_ids(VocabularyMapping.from_counts(torch.tensor(counts), size, special).d2t).tolist()
        )


def test_most_frequent_are_the_first_merges_and_no_special_or_added_tokens():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<added>"])
    ids = frequent_ids(tokenizer)
    assert ids == sorted(ids) and len(ids) == len(set(ids))
    names = tokenizer.convert_ids_to_tokens(ids)
    assert "<added>" not in names and not set(ids) & set(tokenizer.all_special_ids)
    assert all(len(name) == 1 for name in names[:256])  # bytes
    assert all(len(name) > 1 for name in names[256:])  # then the merges
    vocabulary = tokenizer.get_vocab()
    assert len(ids) == len(set(vocabulary.values()) - set(tokenizer.added_tokens_decoder))


def test_only_supervised_tokens_are_counted():
    records = [{"input_ids": [1, 2, 3, 2], "loss_mask": [0, 1, 0, 1]}, {"input_ids": [3, 3], "loss_mask": [1, 0]}]
    dataset = Dataset.from_list(records)
    assert count_supervised_tokens(dataset, 5).tolist() == [0, 0, 2, 1, 0]
    assert count_supervised_tokens(dataset.select([1]), 5).tolist() == [0, 0, 0, 1, 0]
    ignoring = [{**record, "loss_mask": [m or -100 for m in record["loss_mask"]]} for record in records]
    assert count_supervised_tokens(Dataset.from_list(ignoring), 5).tolist() == [0, 0, 2, 1, 0]


def test_mapping_is_fast_at_a_large_vocabulary():
    """A mapping of 152k tokens from 5 million supervised ones, well inside a minute even on a slow machine."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 152_000, (500, 10_000), generator=generator)
    dataset = Dataset.from_dict({"input_ids": ids.numpy(), "loss_mask": torch.ones_like(ids).numpy()})
    start = time.perf_counter()
    counts = count_supervised_tokens(dataset, 152_000)
    mapping = VocabularyMapping.from_counts(counts, 32_000)
    print(f"counting and mapping took {time.perf_counter() - start:.2f} s")
    assert int(counts.sum()) == ids.numel() and mapping.d2t.numel() == 32_000
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=152_000))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VocabularyMapping.from_counts(torch.tensor([1, 1, 0, 0]), 3), "hold only 2 different tokens"),
        (
            lambda: VocabularyMapping.from_counts(torch.tensor([1, 1, 0, 0]), 3),
            "use more data, fill it up with `fill_vocabulary`, or `draft_vocab_size` of at most 2",
        ),
        (
            lambda: VocabularyMapping.from_counts(torch.tensor([1, 1, 0, 0, 0]), 4, fill_ids=[4, 1]),
            "2 different tokens, and the tokenizer 1 others: use more data, or `draft_vocab_size` of at most 3",
        ),
        (
            lambda: VocabularyMapping.from_counts(torch.ones(4), 5),
            "`draft_vocab_size` must be between 1 and .* 4, got 5",
        ),
        (lambda: VocabularyMapping.from_counts(torch.ones(4), 1, [0, 1]), "less than the 2 special tokens"),
        (lambda: VocabularyMapping.from_token_ids(torch.tensor([7]), 5), "another tokenizer"),
        (
            lambda: count_supervised_tokens(Dataset.from_list([{"input_ids": [9], "loss_mask": [1]}]), 5),
            "token id 9 but the target's vocabulary has 5",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("damage", ["absolute", "unsorted", "lost", "t2d"])
def test_damaged_buffers_are_refused(damage):
    mapping = tiny_mapping()
    d2t, t2d = mapping.d2t.clone(), mapping.t2d.clone()
    if damage == "absolute":
        d2t = draft_token_ids(d2t)
    elif damage == "unsorted":
        d2t[3], d2t[4] = d2t[4] + 1, d2t[3] - 1
    elif damage == "lost":
        d2t.zero_()
    else:
        t2d[:] = True
    with pytest.raises(ValueError, match="`d2t` and `t2d` of this draft do not fit"):
        check_mapping(d2t, t2d)


def test_a_mapping_of_another_size_is_refused():
    _, draft = tiny_pair(40)
    with pytest.raises(
        ValueError, match=f"for {VOCAB} target and 24 draft tokens, the draft's config says {VOCAB} and 40"
    ):
        draft.set_vocabulary(tiny_mapping(24))


def test_draft_ids_become_target_ids():
    _, draft = tiny_pair(40)
    ids = draft_token_ids(tiny_mapping(40).d2t)
    assert torch.equal(draft.to_target_ids(torch.arange(40)), ids)
    assert torch.equal(draft.draft_ids, ids)
    _, full = tiny_pair(None)
    assert full.draft_ids is None and full.to_target_ids(torch.tensor([5])).item() == 5
