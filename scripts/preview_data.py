"""Show what a draft would be trained on: conversations with supervised tokens in colour, and statistics of the data.

    python scripts/preview_data.py --config training_args/smollm2-135m-eagle3.yaml --html masks.html
    python scripts/preview_data.py --target TARGET --train_data chats.jsonl --output_json data.json \
        --overlap_prompts assets/prompts/mt_bench.jsonl

It takes every argument of scripts/train_eagle.py, so the same YAML file and options show exactly what training sees; no
model is loaded. The statistics, which `--output_json` also writes for the model card, are lengths, the share of
supervised tokens, the share that draft vocabularies of several sizes cover (of drafts that have one), duplicates, and
the overlap with evaluation prompts. It also says if training would refuse the draft for these data, for instance its
mask token, as far as that shows without the target's weights.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Shown
from hf_eagle.arguments.groups import DataArguments, DraftArguments, TargetArguments
from hf_eagle.arguments.objective import parser_beside_trainer
from hf_eagle.arguments.parser import EagleArgumentParser, asks_for_help
from hf_eagle.arguments.parser import argument as _arg
from hf_eagle.arguments.paths import check_data_paths, paths_read
from hf_eagle.data.overlap import RULE
from hf_eagle.door.environment import tell_traps
from hf_eagle.door.inputs import check_file, naming
from hf_eagle.door.logs import show_log
from hf_eagle.door.outputs import begins_with, check_apart, check_output_file, holds_object_with
from hf_eagle.door.printer import run_verb
from hf_eagle.door.writing import write_output


@dataclass
class PreviewArguments:
    """Arguments that say what to show, and where."""

    _argument_group_name = "preview"

    num_previews: Shown = _arg(3, "Number of conversations shown in the terminal.")
    html: str | None = _arg(None, "Page of masks to write.")
    html_conversations: Shown = _arg(50, "Number of conversations on the page, spread over the data.")
    output_json: str | None = _arg(None, "File for the statistics, which the model card takes as `data_statistics`.")
    overlap_prompts: list[str] | None = _arg(
        None, f"Evaluation prompts (.jsonl, .json, .txt) to look for in the data: {RULE}."
    )


def parser(for_help: bool = False) -> EagleArgumentParser:
    groups = (PreviewArguments, TargetArguments, DataArguments, DraftArguments)
    return parser_beside_trainer(groups, __doc__, for_help)


def door(argv: list[str] | None = None):
    """Return the arguments, after checking every path."""
    given = sys.argv[1:] if argv is None else argv
    parsed = parser(for_help=asks_for_help(given)).parse_args_and_config(given)
    preview, target, data, draft, args = parsed
    if data.streaming:
        raise ValueError("`streaming` never has all data at once, which statistics need: leave it out.")

    check_data_paths(target, data)
    for path in preview.overlap_prompts or ():
        check_file("overlap_prompts", path)
    reads = paths_read(target, data, draft) | {"overlap_prompts": preview.overlap_prompts}
    outputs = {"html": preview.html, "output_json": preview.output_json}
    ours = {"html": begins_with(b"<!doctype html"), "output_json": holds_object_with("supervised_tokens")}
    for name, path in outputs.items():
        if path is not None:
            check_output_file(name, path, reads, ours[name])
    check_apart(outputs)
    return preview, target, data, draft, args


def main() -> None:
    preview, target, data, draft, args = door()
    data.packing = False  # rows are shown as conversations

    from hf_eagle.data.preview import to_html, to_terminal
    from hf_eagle.drafts.vocabulary import count_supervised_tokens, token_rows
    from hf_eagle.evaluation.prompts import load_prompts
    from hf_eagle.training.parts import conversations, read_in_a_run
    from hf_eagle.training.target_of_run import processor_of, tokenizer_of

    show_log()
    tell_traps()
    # read first: a prompt file that cannot be read is told of before anything is tokenised
    with naming("overlap_prompts"):
        asked = {
            Path(path).name: [text for prompt in load_prompts(path) for text in prompt.asked]
            for path in preview.overlap_prompts or ()
        }
    tokenizer = tokenizer_of(target)
    rows, held_out = conversations(tokenizer, data, args, processor_of(target, data))
    for place in spread(len(rows), preview.num_previews):
        row = rows[place]
        print(f"\n=== conversation {place}\n{to_terminal(tokenizer, row['input_ids'], row['loss_mask'])}")
    if preview.html is not None:
        shown = [rows[place] for place in spread(len(rows), preview.html_conversations)]
        write_output("html", preview.html, to_html(tokenizer, shown, ", ".join(data.train_data)))
        print(f"\nwrote {preview.html}")

    counts = count_supervised_tokens(rows, token_rows(tokenizer))
    statistics = measure(rows, counts, tokenizer, data, asked, "draft_vocab_size" not in draft.kind.meaningless)
    print(f"\n{told(statistics)}")
    if (problem := refused_draft(read_in_a_run(rows, held_out), counts, tokenizer, target, draft)) is not None:
        print(f"\nTraining will stop here: {problem}")

    if preview.output_json is not None:
        write_output("output_json", preview.output_json, json.dumps(statistics, indent=2))
        print(f"\nwrote {preview.output_json}")


def spread(total: int, number: int) -> list[int]:
    """Return so many indices, evenly from the first to the last."""
    number = min(total, number)
    return [n * (total - 1) // max(1, number - 1) for n in range(number)]


def refused_draft(read, counts, tokenizer, target: TargetArguments, draft: DraftArguments) -> str | None:
    """Return why training would refuse this draft for the data that are `read` in a run, if it would."""
    from hf_eagle.drafts.vocabulary import VocabularyMapping, frequent_ids

    try:
        fit_to_data(read, tokenizer, target, draft)
        if draft.draft_vocab_size is not None:
            fill = frequent_ids(tokenizer) if draft.fill_vocabulary else ()
            VocabularyMapping.from_counts(counts, draft.draft_vocab_size, tokenizer.all_special_ids, fill)
    except (OSError, ValueError) as problem:
        return str(problem)
    return None


def fit_to_data(read, tokenizer, target: TargetArguments, draft: DraftArguments) -> None:
    """Complete the draft's config with what depends on the data, as training does; the log says what was chosen."""
    import torch

    from hf_eagle.drafts.build import draft_class_of
    from hf_eagle.targets.room import config_before_loading
    from hf_eagle.training.parts import config_of_draft

    target_config, source = config_before_loading(target.target, **target.source), draft.init_from
    if target_config is None:
        return
    held = None if source is None else draft_class_of(source, "init_from").config_class.from_pretrained(source)
    config = config_of_draft(target_config, target, draft)
    # the target's table is not read: this one has no row of zeros
    config.fit_to_data(tokenizer, read, torch.ones(config.vocab_size, 1), held)


def measure(rows, counts, tokenizer, data, asked: dict[str, list[str]], own_vocabulary: bool = True) -> dict:
    """Return all statistics for the JSON file.

    Args:
        rows, counts, tokenizer, data: what is measured.
        asked: the texts of evaluation prompts, by file name.
        own_vocabulary: whether the draft may have fewer tokens than the target.
    """
    from hf_eagle.data.overlap import overlap_statistics
    from hf_eagle.data.records import load_records
    from hf_eagle.data.statistics import duplicate_statistics, token_statistics
    from hf_eagle.drafts.vocabulary import coverage_by_size

    statistics = token_statistics(rows) | duplicate_statistics(rows)
    statistics["different_tokens"] = int((counts > 0).sum())
    if own_vocabulary:
        coverage = coverage_by_size(counts, tokenizer.all_special_ids)
        statistics["coverage"] = {str(size): share for size, share in coverage.items()}  # as JSON has it
    if asked:
        form = data.dataset_format
        records = load_records(data.train_data, dataset_format=form, weights=data.data_weights)
        statistics["overlap"] = {}
        for name, texts in asked.items():
            statistics["overlap"][name] = overlap_statistics(records, texts)
    return statistics


def told(statistics: dict) -> str:
    """Return the statistics as lines of text."""
    s = statistics
    covered = s.get("coverage", {})

    # the data as a whole
    lines = [
        f"{s['conversations']:,} conversations, {s['tokens']:,} tokens, {s['supervised_tokens']:,} of them supervised "
        f"({s['supervised_share']:.1%})",
        *(
            f"tokens per conversation{', supervised' if name == 'supervised' else ''}: "
            + ", ".join(f"{key} {value:,}" for key, value in s[name].items())
            for name in ("length", "supervised")
        ),
        f"{s['duplicates']:,} conversations repeat an earlier one, token for token",
        f"{s['different_tokens']:,} different tokens are supervised{'; a draft vocabulary of' * ('coverage' in s)}",
    ]

    # what a smaller vocabulary would keep, and what is asked in evaluations too
    lines += [f"{int(size):>9,} tokens holds {share:7.2%} of what is said" for size, share in covered.items()]
    for name, found in s.get("overlap", {}).items():
        lines.append(
            f"{name}: {found['prompts_found']:,} of {found['prompts']:,} prompts occur in "
            f"{found['conversations_found']:,} conversations ({RULE})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_verb(main)
