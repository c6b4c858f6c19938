"""Publish a draft on the Hub.

    python scripts/publish_draft.py outputs/my-draft --repo_id you/your-draft --dry_run
    python scripts/publish_draft.py outputs/my-draft --repo_id you/your-draft [--private] [--revision v2]

One commit holds the config, the weights, the card, its pictures and measurements, and `custom_generate/`, with which
plain transformers decodes. Checkpoints, optimizer states and `training_args.bin` stay at home unless `--include` names
them. `--dry_run` lists the files with their sizes and prints the card. An interrupted upload goes on when run again.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

from hf_eagle.parser import EagleArgumentParser
from hf_eagle.parser import argument as _arg


@dataclass
class PublishArguments:
    draft: str = field(metadata={"help": "Folder of the draft; may also come first, without its flag."})
    repo_id: str = field(metadata={"help": "Repository on the Hub, `you/your-draft`; made if it does not exist."})
    private: bool = _arg(False, "Make a new repository private.")
    revision: str | None = _arg(None, "Branch to commit to, made if it does not exist. Unset: main.")
    include: list[str] = field(
        default_factory=list, metadata={"help": "Patterns of further files in the folder, for example checkpoint-*/*."}
    )
    commit_message: str = _arg("Upload draft", "Message of the commit.")
    token: str | None = _arg(None, "Token of the Hub. Unset: the one that `hf auth login` stored.")
    dry_run: bool = _arg(False, "Upload nothing; list the files and print the card.")


def main() -> None:
    (args,) = EagleArgumentParser(PublishArguments, description=__doc__).parse_args_and_config(first="draft")

    from hf_eagle.hub.publish import CARD, contents, publish_draft

    if args.dry_run:
        files = contents(args.draft, args.repo_id, args.include)
        sizes = {name: len(x) if isinstance(x, bytes) else x.stat().st_size for name, x in files.items()}
        for name, size in sizes.items():
            print(f"{size:>14,}  {name}")
        print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files, to {args.repo_id}")
        if CARD in files:
            print(f"\n{files[CARD].decode()}")
        else:
            print("\nThere is no README.md, so the repository would have no card.")
        return
    commit = publish_draft(
        args.draft,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        token=args.token,
        commit_message=args.commit_message,
        include=args.include,
    )
    print(f"published {commit.commit_url}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as problem:
        raise SystemExit(f"error: {problem}") from None
