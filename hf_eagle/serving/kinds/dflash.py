"""DFlash: a block of masked slots over taps of the target, in one forward; head and embeddings are the target's."""

from collections.abc import Mapping

from ...door.config_readings import SECOND_TYPE, named
from .. import rules_folder
from ..draft_folder import DraftFolder
from . import dflash_fields as fields
from . import dflash_transformers as in_transformers
from .dflash_math import ServedDFlash
from .dflash_mending import MENDING
from .dflash_sglang import SGLANG
from .dflash_vllm import VLLM, converted_causal
from .row import ServedKind


CITATION = """@misc{chen2026dflash,
  title         = {DFlash: Block Diffusion for Flash Speculative Decoding},
  author        = {Jian Chen and Yesheng Liang and Zhijian Liu},
  year          = {2026},
  eprint        = {2602.06036},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CL}
}"""


def tells(folder: DraftFolder) -> bool:
    """Whether a norm follows `fc`, outside of the layers, or the config has fields or names of such a draft."""
    config, names = folder.config, {fields.place(name.removeprefix("model.")) for name in folder.shapes}
    if "hidden_norm.weight" in names or "dflash_config" in config:
        return True

    said = any("DFlash" in str(name) for name in config.get("architectures") or [])
    return said or config.get("model_type") == SECOND_TYPE


def _drafted(config: Mapping[str, object]) -> int | None:
    """The slots of a block, less that of the newest token; `None` if their number is not known."""
    size = named(dict(config), "block_size")
    return size - 1 if isinstance(size, int) and size > 1 else None


ROW = ServedKind(
    name="dflash",
    kind="dflash",
    tells=tells,
    vllm=VLLM,
    sglang=SGLANG,
    folder_rules=(fields.other_kind, rules_folder.spellings, rules_folder.dtypes, rules_folder.leftovers),
    value_rules=(rules_folder.numbers,),
    mathematics=ServedDFlash,
    mending=MENDING,
    label=lambda config: "DFlash",
    citation=CITATION,
    drafted=_drafted,
    others=(in_transformers.rules, in_transformers.forms),
    converted=(converted_causal,),
    in_python=in_transformers.in_python,
)
