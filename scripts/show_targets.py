"""Show which targets are tested, and what is done with each: tapped, packed, decoded, sharded, served.

    python scripts/show_targets.py
    python scripts/show_targets.py qwen3_5_text
    python scripts/show_targets.py path/to/a/target

Without a target it prints the table of page `targets`. A family or a model type gives its row. A folder or a Hub id is
answered from its `config.json`, without any weights: whether it is shown pictures, how it can be sharded and which
drafts fit follow from the config itself, all else from its family's row.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.door.printer import run_verb


@dataclass
class TargetsArguments:
    target: str | None = field(
        default=None,
        metadata={
            "help": "Family, model type, folder or Hub id; may also come first, without its flag. A folder of the same "
            "name as a family is ./NAME."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the target's config."})


def parser():
    from hf_eagle.arguments.parser import EagleArgumentParser

    return EagleArgumentParser(TargetsArguments, description=__doc__)


def door(argv: list[str] | None = None) -> TargetsArguments:
    """Return the arguments, after checking the path."""
    from hf_eagle.door.inputs import check_model

    (args,) = parser().parse_args_and_config(argv, first="target")
    if args.target is not None and family_named(args.target) is None:
        check_model("target", args.target, "config.json")
    return args


def family_named(name: str):
    """Return the family of this name or model type, `None` if it is none's."""
    from hf_eagle.targets.architectures import FAMILIES

    return next((x for x in FAMILIES if name.lower() in (x.name.lower(), *x.model_types)), None)


def main() -> None:
    args = door()

    from hf_eagle.docs import read_page
    from hf_eagle.targets.architectures import family_of
    from hf_eagle.targets.loading import load_config
    from hf_eagle.training.target_row import MEASURED, as_table, read_table, row_of_folder

    table = read_table(read_page("targets"))
    if args.target is None:
        print(as_table(table))
        return

    family, config = family_named(args.target), None
    if family is None:
        config = load_config(args.target, trust_remote_code=args.trust_remote_code)
        family = family_of(config)

    if family is None:
        kind = config.get_text_config().model_type
        row = {"family": f"{kind} (not tested)", **dict.fromkeys(MEASURED, "checked when loaded")}
    else:
        row = next(row for row in table if row["family"] == family.name)
    print(as_table([row if config is None else row_of_folder(row, config)]))


if __name__ == "__main__":
    run_verb(main)
