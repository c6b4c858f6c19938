"""Publish a draft on the Hub.

    python scripts/publish_draft.py outputs/my-draft --repo_id you/your-draft --dry_run
    python scripts/publish_draft.py outputs/my-draft --repo_id you/your-draft [--private] [--revision v2]

One commit uploads the config, the weights, the model card with its plots and measurements, and `custom_generate/`, with
which plain transformers decodes. Checkpoints, optimizer states and `training_args.bin` are not uploaded unless
`--include` names them. A folder that servers would not run as it was trained is refused, see scripts/check_draft.py.
`--dry_run` makes the same checks, lists the files with their sizes and prints the card. The same command continues an
interrupted upload.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.parser import EagleArgumentParser
from hf_eagle.arguments.parser import argument as _arg
from hf_eagle.door.connection import read_key
from hf_eagle.door.inputs import check_folder, check_model
from hf_eagle.door.names import check_branch
from hf_eagle.door.printer import run_verb


@dataclass
class PublishArguments:
    draft: str = field(metadata={"help": "Folder of the draft; may also come first, without its flag."})
    repo_id: str = field(metadata={"help": "Repository on the Hub, `you/your-draft`; made if it does not exist."})
    target: str | None = _arg(None, "The target, a folder or a Hub id, to check taps, context and vocabulary against.")
    publish_anyway: bool = _arg(False, "Publish a folder that servers would not run as it was trained.")
    license: str | None = _arg(None, "Licence of the draft, as the Hub spells it, if its card states none.")
    base_model: str | None = _arg(None, "Hub id of the target, if the card names only a folder on this machine.")
    private: bool = _arg(False, "Make a new repository private.")
    revision: str | None = _arg(None, "Branch to commit to, made if it does not exist. Unset: main.")
    include: list[str] = field(
        default_factory=list, metadata={"help": "Patterns of further files in the folder, for example checkpoint-*/*."}
    )
    commit_message: str = _arg("Upload draft", "Message of the commit.")
    token: str | None = _arg(None, "Token of the Hub. Unset: the one that `hf auth login` stored.")
    dry_run: bool = _arg(False, "Upload nothing; list the files and print the card.")


def parser() -> EagleArgumentParser:
    return EagleArgumentParser(PublishArguments, description=__doc__)


def door(argv: list[str] | None = None) -> PublishArguments:
    """Return the arguments, after checking every path."""
    (args,) = parser().parse_args_and_config(argv, first="draft")
    args.token = read_key(args.token, "`token`")
    check_branch("revision", args.revision)
    check_folder("draft", args.draft, "config.json")
    if args.target is not None:
        check_model("target", args.target, "config.json")
    return args


def main() -> None:
    args = door()

    from hf_eagle.hub.local_paths import local_paths
    from hf_eagle.hub.publish import CARD, check_card, contents, facts_to_publish, files_of, publish_draft

    files_of(args.draft, args.include)
    check_card(args.draft)
    refused = check(args.draft, args.target)
    facts = {"license": args.license, "base_model": args.base_model}
    told = facts_to_publish(args.draft, args.repo_id, facts)
    if told is not None and told.base_model is None:
        print(f"The card names no repository of {told.target}, a folder of this machine: give `base_model`.")
    named = local_paths(_own_card(args.draft)) if told is None else []
    if named:
        what = "a folder" if len(named) == 1 else "folders"
        print(f"README.md was edited, and goes as it is: it names {', '.join(named)}, {what} of this machine.")
    if args.dry_run:
        files = contents(args.draft, args.repo_id, args.include, facts)
        sizes = {name: len(x) if isinstance(x, bytes) else x.stat().st_size for name, x in files.items()}
        for name, size in sizes.items():
            print(f"{size:>14,}  {name}")
        print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files, to {args.repo_id}")
        if CARD in files:
            print(f"\n{files[CARD].decode()}")
        else:
            print("\nThere is no README.md, so the repository would have no card.")
    if refused and not args.publish_anyway:
        raise ValueError(
            f"{args.draft} would not be served as it was trained: mend it, by scripts/check_draft.py with `fix` for "
            "instance, or set `publish_anyway`."
        )
    if args.dry_run:
        return
    commit = publish_draft(
        args.draft,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        token=args.token,
        commit_message=args.commit_message,
        include=args.include,
        facts=facts,
    )
    print(f"published {commit.commit_url}")


def _own_card(draft: str) -> str:
    card = Path(draft) / "README.md"
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""


def check(draft: str, target: str | None) -> bool:
    """Print what is wrong for servers; return whether they would not run the draft as it was trained."""
    from hf_eagle.drafts.kinds import kind_of_folder
    from hf_eagle.serving.check import check_draft
    from hf_eagle.targets.loading import load_config

    kind = kind_of_folder(draft)
    found = check_draft(draft, None if target is None else load_config(target), kind=kind and kind.name)
    for finding in found:
        print(finding)
    return any(finding.level == "fault" for finding in found)


if __name__ == "__main__":
    run_verb(main)
