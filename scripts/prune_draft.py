"""Prune the vocabulary of a trained draft, for a faster head; the logits of the remaining tokens do not change.

    python scripts/prune_draft.py DRAFT --output_dir OUT --token_ids ids.json
    python scripts/prune_draft.py DRAFT --output_dir OUT --counts_from chats.jsonl --target TARGET --draft_vocab_size N

`ids.json` is a list of the target's token ids to keep. `--counts_from` keeps the N tokens that are supervised most
often in these chats, always including special tokens. It also prints the share of the supervised tokens that draft
vocabularies of several sizes cover; without `--draft_vocab_size`, it does only that. OUT is an ordinary draft folder.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Count
from hf_eagle.arguments.parser import EagleArgumentParser
from hf_eagle.arguments.parser import argument as _arg
from hf_eagle.arguments.paths import check_draft_folder
from hf_eagle.arguments.sources import TargetSourceArguments, TemplateArguments
from hf_eagle.door.inputs import check_data, check_draft, check_file, check_target, naming
from hf_eagle.door.logs import show_log
from hf_eagle.door.printer import run_verb
from hf_eagle.door.writing import output_folder


@dataclass
class PruneArguments:
    draft: str = field(metadata={"help": "Draft to prune, a folder or a Hub id; may come first, without its flag."})
    output_dir: str | None = _arg(None, "Folder for the pruned draft.")
    token_ids: str | None = _arg(None, "JSON file with a list of the target's token ids to keep.")
    counts_from: list[str] | None = _arg(
        None, "Chats whose supervised tokens are counted: JSON, JSONL, Parquet or CSV files, folders, or Hub ids."
    )
    draft_vocab_size: Count | None = _arg(None, "How many of the most frequent tokens to keep.")
    fill_vocabulary: bool = _arg(
        False,
        "If the chats hold fewer different tokens than `draft_vocab_size`, add the tokenizer's most frequent ones, the "
        "lowest ids first. Unset: refuse such a size.",
    )
    target: str | None = _arg(None, "The draft's target, a folder or a Hub id: `counts_from` needs its tokenizer.")
    max_length: Count = _arg(2048, "Longest chat in tokens; longer ones are truncated, as in training.")
    overwrite: bool = _arg(False, "Replace a draft that `output_dir` already holds.")

    def __post_init__(self):
        if self.token_ids and (self.counts_from or self.draft_vocab_size is not None):
            raise ValueError("`token_ids` says what to keep: leave out `counts_from` and `draft_vocab_size`.")
        if self.draft_vocab_size is not None and not self.counts_from:
            raise ValueError(
                f"`draft_vocab_size` is {self.draft_vocab_size}, but which tokens are frequent is not known: name "
                "chats to count them in with `counts_from`, or the tokens with `token_ids`."
            )
        if self.fill_vocabulary and self.draft_vocab_size is None:
            raise ValueError(
                "`fill_vocabulary` is set, but `draft_vocab_size` is not: say how many tokens to fill up to."
            )
        if not self.token_ids and not self.counts_from:
            raise ValueError("Nothing says what to keep: give `token_ids`, or `counts_from` and `draft_vocab_size`.")
        if self.counts_from and not self.target:
            raise ValueError("`counts_from` needs the tokenizer of the draft's target: name it with `target`.")
        if self.output_dir is None and (self.token_ids or self.draft_vocab_size is not None):
            raise ValueError("`output_dir` is not set: name a folder for the pruned draft.")


def parser() -> EagleArgumentParser:
    return EagleArgumentParser((PruneArguments, TargetSourceArguments, TemplateArguments), description=__doc__)


def door(argv: list[str] | None = None):
    """Return the arguments, after checking every path, and the ids in `token_ids`."""
    args, source, template = parser().parse_args_and_config(argv, first="draft")
    check_draft("draft", args.draft)
    if args.target is not None:
        check_target("target", args.target, source.gguf_file)
    if args.counts_from:
        check_data("counts_from", args.counts_from)
    if args.output_dir is not None:
        reads = {name: getattr(args, name) for name in ("draft", "target", "token_ids", "counts_from")}
        check_draft_folder("output_dir", args.output_dir, reads | {"tools": template.tools}, args.overwrite)
    token_ids = None
    if args.token_ids:
        check_file("token_ids", args.token_ids)
        token_ids = read_token_ids(args.token_ids)
    return args, source, template, token_ids


def main() -> None:
    args, source, template, token_ids = door()

    import torch

    from hf_eagle.drafts.build import load_draft
    from hf_eagle.drafts.prune import check_prunable, prune_vocabulary

    show_log()
    draft = load_draft(args.draft)
    check_prunable(draft)
    before = draft.config.draft_vocab_size
    filled = None
    if args.counts_from:
        token_ids, filled = counted(draft, args, source.source, template.template_kwargs)
    if token_ids is None:
        return
    if args.token_ids:
        check_known(args.token_ids, token_ids, draft.config.vocab_size)
    mapping = prune_vocabulary(draft, torch.as_tensor(token_ids, dtype=torch.long))
    draft.config.filled_tokens = filled  # of ids that were given, nobody knows where they come from
    ends = draft.config.eos_token_id
    lost = [i for i in (ends if isinstance(ends, list) else [ends]) if i is not None and not mapping.t2d[i]]
    if lost:
        print(f"The pruned draft cannot propose {', '.join(map(str, lost))}, which ends an answer.")
    with output_folder("output_dir", args.output_dir) as folder:
        draft.save_pretrained(folder)
    print(f"{args.output_dir}: {draft.config.draft_vocab_size} of the draft's {before} tokens")


def read_token_ids(path: str) -> list[int]:
    """Return the ids in a JSON file; raise `ValueError` if it holds anything else."""
    from hf_eagle.data.reading import read_json

    try:
        ids = read_json(path)
    except (OSError, ValueError) as problem:
        raise ValueError(f"`token_ids` cannot be read as JSON: {problem}") from problem
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise ValueError(f"`token_ids` {path} must hold a list of token ids, such as [0, 1, 42].")
    return ids


def check_known(path: str, ids: list[int], vocab_size: int) -> None:
    """Raise `ValueError` for an id that the target does not have."""
    unknown = [i for i in ids if not 0 <= i < vocab_size]
    if unknown:
        raise ValueError(
            f"`token_ids` {path} holds {unknown[0]}, but the target's ids are 0 to {vocab_size - 1}: take it out."
        )


def counted(draft, args: PruneArguments, source: dict, template_kwargs: dict):
    """Print what vocabularies of several sizes cover; return the ids to keep, or `None`, and how many fill it up."""
    from hf_eagle.data.conversations import build_dataset
    from hf_eagle.data.records import load_records
    from hf_eagle.drafts.prune import coverage, most_frequent
    from hf_eagle.drafts.vocabulary import (
        count_supervised_tokens,
        count_unseen,
        frequent_ids,
        tokenizer_fingerprint,
        told_filled,
    )
    from hf_eagle.targets.loading import load_tokenizer

    tokenizer = load_tokenizer(args.target, **source)
    if draft.config.tokenizer_fingerprint not in (None, tokenizer_fingerprint(tokenizer)):
        raise ValueError(f"The tokenizer of `target` {args.target} is not the one that the draft was trained with.")
    with naming("counts_from"):
        records = load_records(args.counts_from)
    chats = build_dataset(records, tokenizer, args.max_length, template_kwargs=template_kwargs)
    counts = count_supervised_tokens(chats, draft.config.vocab_size)
    special = tokenizer.all_special_ids
    for size, share in coverage(draft, counts, special).items():
        print(f"{size:>9,} tokens cover {share:7.2%} of what is said")
    if args.draft_vocab_size is None:
        return None, None
    fill = frequent_ids(tokenizer) if args.fill_vocabulary else ()
    kept = most_frequent(draft, counts, args.draft_vocab_size, special, fill)
    filled = count_unseen(kept, counts, special) or None
    if filled:
        print(told_filled(filled))
    return kept, filled


if __name__ == "__main__":
    run_verb(main)
