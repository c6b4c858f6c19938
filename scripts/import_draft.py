"""Import a draft that another project published: write an ordinary draft folder that computes the same.

    python scripts/import_draft.py DRAFT --target TARGET --output_dir OUT
    python scripts/import_draft.py DRAFT --target TARGET --output_dir OUT --form modelopt

Forms: SafeAILab's EAGLE-1 and EAGLE-3, SpecForge, NVIDIA's ModelOpt and NeMo Automodel, vLLM's speculators, TorchSpec;
of DFlash also z-lab's and transformers'.
The form is recognised and printed. The script refuses, and names, anything that the servers would not run or would run
differently. It runs no code that comes with the draft, and reads only the target's config, tokenizer and, if they are
on this machine, its embeddings.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Bounds, Whole
from hf_eagle.arguments.parser import EagleArgumentParser
from hf_eagle.door.inputs import check_draft, check_model
from hf_eagle.door.outputs import check_new_folder
from hf_eagle.door.printer import run_verb
from hf_eagle.door.writing import output_folder
from hf_eagle.foreign.forms import FORMS


@dataclass
class ImportArguments:
    draft: str = field(metadata={"help": "Draft to import, a folder or a Hub id; may come first, without its flag."})
    target: str = field(metadata={"help": "The draft's target, a folder or a Hub id."})
    output_dir: str = field(metadata={"help": "New folder for the imported draft."})
    form: str = field(default="auto", metadata={"help": "Project that wrote the draft.", "choices": ["auto", *FORMS]})
    tap_ids: list[Whole] | None = field(
        default=None,
        metadata={
            "help": "Layers whose inputs the draft was trained on, as vLLM counts them, if its files do not say. "
            "Values that differ from its files are refused."
        },
    )
    rope_theta: Annotated[float, Bounds(above=1, most=1e15)] | None = field(
        default=None, metadata={"help": "RoPE base that the draft was trained with, if its config states another."}
    )
    drop_fc_bias: bool = field(
        default=False, metadata={"help": "Drop the trained bias of an EAGLE-1 draft's `fc`, as vLLM does."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the target's config or tokenizer."}
    )


def parser() -> EagleArgumentParser:
    return EagleArgumentParser(ImportArguments, description=__doc__)


def door(argv: list[str] | None = None) -> ImportArguments:
    """Return the arguments, after checking every path."""
    (args,) = parser().parse_args_and_config(argv, first="draft")
    check_draft("draft", args.draft)
    check_model("target", args.target, "config.json")
    check_new_folder("output_dir", args.output_dir, {"draft": args.draft, "target": args.target})
    return args


def main() -> None:
    args = door()

    from hf_eagle.foreign.convert import from_foreign

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("hf_eagle.foreign").setLevel(logging.INFO)
    draft = from_foreign(
        args.draft,
        args.target,
        form=args.form,
        tap_ids=args.tap_ids,
        rope_theta=args.rope_theta,
        drop_fc_bias=args.drop_fc_bias,
        trust_remote_code=args.trust_remote_code,
    )
    with output_folder("output_dir", args.output_dir) as folder:
        draft.save_pretrained(folder)
    parameters = sum(p.numel() for name, p in draft.named_parameters() if name not in draft.lent_tensors)
    size = draft.config.draft_vocab_size
    print(f"{args.output_dir}: {type(draft).__name__}, {parameters:,} parameters, {draft.dtype}, {size} draft tokens")


if __name__ == "__main__":
    run_verb(main)
