"""Tiny targets, drafts and batches built in code."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle1.configuration import Eagle1Config
from hf_eagle.drafts.eagle3.configuration import EagleConfig
from hf_eagle.drafts.unroll_plan import UnrollPlan
from hf_eagle.drafts.vocabulary import VocabularyMapping
from hf_eagle.targets.features import TargetFeatures
from hf_eagle.targets.target import FrozenTarget


VOCAB = 96


def tiny_llama(
    layers: int = 8,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = False,
    seed: int = 0,
    vocab_size: int = VOCAB,
    **overrides,
):
    """A random Llama: hidden 32, vocabulary 96; its distribution is peaked enough to have a clear argmax."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **overrides,
    )
    return LlamaForCausalLM(config).eval()


def tiny_mapping(draft_vocab_size: int = 40, seed: int = 0) -> VocabularyMapping:
    """Random target ids, so that offsets are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    return VocabularyMapping.from_token_ids(torch.randperm(VOCAB, generator=generator)[:draft_vocab_size], VOCAB)


def tiny_pair(draft_vocab_size: int | None = 40, tap_ids=None, seed: int = 0, tied: bool = False, **draft_fields):
    """A frozen tiny target and a fresh draft for it."""
    target = FrozenTarget(tiny_llama(tied=tied, seed=seed))
    config = EagleConfig.from_target(target.config, draft_vocab_size, tap_ids, initializer_range=0.2, **draft_fields)
    target.tap_ids = config.tap_ids
    torch.manual_seed(seed + 1)
    mapping = None if draft_vocab_size is None else tiny_mapping(draft_vocab_size)
    draft = new_draft(config, target.embedding_weight(), mapping)
    with torch.no_grad():  # norms of one would hide a forgotten one
        for name, parameter in draft.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return target, draft


def tiny_eagle1_pair(model=None, seed: int = 0):
    """A frozen tiny target without taps, and a fresh EAGLE-1 draft for it."""
    target = FrozenTarget(tiny_llama(seed=seed) if model is None else model)
    torch.manual_seed(seed + 1)
    config = Eagle1Config.from_target(target.config, initializer_range=0.2)
    draft = new_draft(config, target.embedding_weight(), head_weight=target.head_weight())
    with torch.no_grad():
        norm = draft.layers[0].post_attention_layernorm.weight
        norm.add_(0.3 * torch.randn_like(norm))
    return target, draft


def random_chats(number: int, seed: int = 0, longest: int = 40) -> list[dict]:
    """Records with one to three answers at random places and of random lengths (some of one token)."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    records = []
    for _ in range(number):
        mask = []
        for _ in range(pick(1, 3)):
            mask += [0] * pick(1, 5) + [1] * pick(1, 12)
        mask = (mask + [0] * pick(0, 3))[:longest]
        ids = torch.randint(3, VOCAB, (len(mask),), generator=generator).tolist()
        records.append({"input_ids": ids, "loss_mask": mask})
    return records


def pad_batch(records: list[dict], side: str = "right") -> dict[str, torch.Tensor]:
    """Collate by hand, so that tests of the model do not lean on the collator."""
    length = max(len(r["input_ids"]) for r in records)
    columns = {"input_ids": [], "loss_mask": [], "attention_mask": []}
    for record in records:
        fill = [0] * (length - len(record["input_ids"]))
        ones = [1] * len(record["input_ids"])
        for name, values in (*record.items(), ("attention_mask", ones)):
            columns[name].append(values + fill if side == "right" else fill + values)
    return {name: torch.tensor(values) for name, values in columns.items()}


def unrolled(draft, input_ids, features, rows=None, num_steps=1, objective=None, embeddings=None, **where):
    """A draft's forward over chosen rows, from features that are given as they are: taps, or last hidden states."""
    seen = TargetFeatures(taps=features, last_hidden=features, embeddings=embeddings)
    where = {"window": draft.config.draft_sliding_window, **where}
    return draft(input_ids, seen, UnrollPlan.of_rows(input_ids, rows, num_steps, **where), objective)
