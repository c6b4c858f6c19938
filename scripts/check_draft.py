"""Check whether vLLM and SGLang load a draft and run it as it was trained: exit status 0 if so, else 1.

    python scripts/check_draft.py outputs/my-draft --target your/model
    python scripts/check_draft.py outputs/my-draft --target your/model --fix outputs/my-mended-draft

Prints one line per finding, with its fix: a fault, or at level `limit` that a server does not support this kind of
draft, or at level `note` what is worth knowing but harmless. Servers silently load many faulty drafts; only a low
acceptance length shows it. With `--target`, taps, context length and vocabulary are checked against the target, and the
draft runs on random features both in hf_eagle and as the server would run it: the logits must agree. `--fix` writes a
copy with everything mended that can be, and checks that copy.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Bounds
from hf_eagle.door.printer import run_verb


@dataclass
class CheckArguments:
    draft: str = field(metadata={"help": "Folder of the draft; may also come first, without its flag."})
    target: str | None = field(
        default=None, metadata={"help": "The target that it will be served with, a folder or a Hub id."}
    )
    fix: str | None = field(
        default=None,
        metadata={"help": "New folder for a mended copy; mending taps and context length needs `target`."},
    )
    num_speculative_tokens: Annotated[int, Bounds(least=1, most=64)] | None = field(
        default=None, metadata={"help": "Tokens that will be drafted in a round, to compare with those of training."}
    )
    probe: bool = field(default=True, metadata={"help": "With `target`: compare logits; this reads its embeddings."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the target's config."})


def parser():
    from hf_eagle.arguments.parser import EagleArgumentParser

    return EagleArgumentParser(CheckArguments, description=__doc__)


def door(argv: list[str] | None = None) -> CheckArguments:
    """Return the arguments, after checking every path."""
    from hf_eagle.door.inputs import check_folder, check_model
    from hf_eagle.door.outputs import check_new_folder

    (args,) = parser().parse_args_and_config(argv, first="draft")
    check_folder("draft", args.draft)
    if args.target is not None:
        check_model("target", args.target, "config.json")
    if args.fix is not None:
        check_new_folder("fix", args.fix, {"draft": args.draft, "target": args.target})
    return args


def main() -> int:
    args = door()

    from transformers.utils import logging

    from hf_eagle.serving.repair import repair_draft
    from hf_eagle.targets.loading import load_config

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    target_config = args.target and load_config(args.target, trust_remote_code=args.trust_remote_code)
    if args.fix is None:
        return report(args.draft, args, target_config)
    for line in repair_draft(args.draft, args.fix, target_config or None, kind_named_in(args.draft)):
        print(f"mended: {line}")
    return report(args.fix, args, target_config)


def kind_named_in(draft: str) -> str | None:
    """Return the kind of draft that a folder names; `None` if it names none, which is checked as a known kind."""
    from hf_eagle.drafts.kinds import kind_of_folder

    kind = kind_of_folder(draft)
    return kind and kind.name


def report(draft: str, args: CheckArguments, target_config) -> int:
    """Print what is wrong with the folder `draft`, and return 1 if anything is, else 0."""
    from hf_eagle.serving.check import check_draft
    from hf_eagle.serving.probe import probe

    asked = {"kind": kind_named_in(draft), "num_speculative_tokens": args.num_speculative_tokens}
    found = check_draft(draft, target_config or None, **asked)
    wrong = [finding for finding in found if finding.level != "note"]
    if args.target and args.probe and not wrong:
        found += probe(draft, args.target, target_config)
        wrong = [finding for finding in found if finding.level != "note"]
    for finding in found:
        print(finding)
    if not wrong:
        limit = "." if args.target else ", as far as it alone shows."
        print(f"{draft}: vLLM and SGLang serve it as it was trained{limit}")
    return int(bool(wrong))


if __name__ == "__main__":
    run_verb(lambda: sys.exit(main()), error_status=2)
