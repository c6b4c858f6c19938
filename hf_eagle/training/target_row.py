"""What is done with a target, as the table of page `targets` says it: the columns that follow from a config."""

from transformers import PreTrainedConfig

from ..arguments.groups import DraftArguments, TargetArguments
from ..door.logs import errors_only
from ..drafts.kinds import KINDS
from ..targets.architectures import Family, family_of
from ..targets.media_inputs import why_not_shown
from ..targets.shard_layout import MODES, layout_of
from .parts import config_of_draft


# what only a run shows; then what follows from the config, and from the family
MEASURED = ("tapped", "packed", "decoded", "pictures")
COLUMNS = ("family", *MEASURED, "sharded", "drafts", "vLLM", "SGLang")


def row_from_config(config: PreTrainedConfig) -> dict[str, str]:
    """How a target can be sharded over two ranks, which kinds of draft fit it, and which server takes its taps."""
    # warnings are about what is only tried here, and come when a run chooses it
    with errors_only(__name__.partition(".")[0]):
        return {"sharded": _ways(config), "drafts": _kinds(config), **_servers(family_of(config))}


def row_of_folder(row: dict[str, str], config: PreTrainedConfig) -> dict[str, str]:
    """The row of a target's family, with what its own config says, which may be that of a family's text part alone."""
    return {**row, "pictures": "no" if why_not_shown(config) else "yes", **row_from_config(config)}


def _ways(config: PreTrainedConfig) -> str:
    def possible(mode: str) -> bool:
        try:
            return layout_of(config, mode, world=2) is not None
        except ValueError:
            return False

    return ", ".join(mode for mode in MODES if possible(mode)) or "no"


def _kinds(config: PreTrainedConfig) -> str:
    def fits(method: str) -> bool:
        try:
            config_of_draft(config, TargetArguments(target=""), DraftArguments(method=method))
        except ValueError:
            return False
        return True

    return ", ".join(kind.title for kind in KINDS.values() if fits(next(iter(kind.methods)))) or "none"


def _servers(family: Family | None) -> dict[str, str]:
    if family is None:
        return dict.fromkeys(("vLLM", "SGLang"), "unknown")
    vllm = "no" if family.recurrent else "by transformers"
    return {
        "vLLM": "yes" if "vllm" in family.servers else vllm,
        "SGLang": "yes" if "sglang" in family.servers else "no",
    }


def as_table(rows: list[dict[str, str]]) -> str:
    """The rows as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([row[name] for name in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def read_table(page: str) -> list[dict[str, str]]:
    """The rows of the first table of a page that has these columns."""
    _, found, after = page.partition(f"| {' | '.join(COLUMNS)} |\n")
    lines = after.partition("\n\n")[0].splitlines()[1:] if found else []
    return [dict(zip(COLUMNS, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines]
