"""Let the target answer the prompts of a data set itself; train the draft on what it says.

    python scripts/regenerate_answers.py --target TARGET --data prompts.jsonl --output answers.jsonl

Every user turn is answered, in order, with the model's own earlier answers in view; answers in the data are dropped.
The output holds `messages`, one conversation a line, ready for `train_data` of scripts/train_eagle.py. Interrupt it
when you like: the same command goes on where it stopped.
"""

import logging
from dataclasses import dataclass, field
from typing import Literal

from hf_eagle.parser import EagleArgumentParser


def _arg(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class RegenerationArguments:
    target: str = field(metadata={"help": "Target model: a folder or a Hub id, also of a PEFT adapter."})
    data: list[str] = field(
        metadata={
            "help": "Chats whose user turns are answered: JSON, JSONL, Parquet or CSV files, folders, or Hub ids."
        }
    )
    output: str = field(metadata={"help": "JSONL file to write; `<output>.journal` beside it holds finished batches."})
    num_records: int | None = _arg(None, "Take the first so many records only.")
    max_new_tokens: int = _arg(128, "Length of an answer at most, in tokens.")
    batch_size: int = _arg(96, "Prompts answered together.")
    temperature: float = _arg(0.0, "0 is greedy.")
    top_p: float = _arg(1.0, "Nucleus, when sampling.")
    seed: int = _arg(0, "Seed of sampling and of the order of the batches.")
    time_limit: float | None = _arg(None, "Minutes after which no further batch starts; another call goes on.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _arg("auto", "Data type the target runs in.")
    device: str | None = _arg(None, "Device of the target. Unset: cuda if there is one, else cpu.")
    gguf_file: str | None = _arg(None, "Name of a GGUF file inside `target`, if it is one.")
    trust_remote_code: bool = _arg(False, "Run code that comes with the target.")

    def __post_init__(self):
        if self.num_records is not None and self.num_records < 1:
            raise ValueError(f"`num_records` must be at least 1, got {self.num_records}.")


def main() -> None:
    (args,) = EagleArgumentParser(RegenerationArguments, description=__doc__).parse_args_and_config()

    import torch

    from hf_eagle.data.records import load_records
    from hf_eagle.data.regeneration import regenerate_answers
    from hf_eagle.targets.loading import load_causal_lm, load_tokenizer

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        records = load_records(args.data)
        if args.num_records is not None:
            records = records.select(range(min(args.num_records, len(records))))

        source = {"gguf_file": args.gguf_file} if args.gguf_file else {}
        source["trust_remote_code"] = args.trust_remote_code
        tokenizer = load_tokenizer(args.target, **source)
        model = load_causal_lm(args.target, dtype=args.dtype, **source).eval()
        regenerate_answers(
            model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu")),
            tokenizer,
            records,
            args.output,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            time_limit=None if args.time_limit is None else 60 * args.time_limit,
        )
    except ValueError as problem:
        raise SystemExit(f"error: {problem}") from None


if __name__ == "__main__":
    main()
