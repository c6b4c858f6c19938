"""Measure what a training step costs on this machine, and compare it with other ways of training.

    python scripts/benchmark_training_step.py --preset smollm2 --batch_size 1 --length 2048 --compare eager
    python scripts/benchmark_training_step.py --target your/model --data answers.jsonl --compare padded
    python scripts/benchmark_training_step.py --preset smollm2 --sweep length --output_json length.json
    python scripts/benchmark_training_step.py --method dflash --num_anchors 64 --sweep length --longest 32768 \\
        --compare eagle3

Prints a table: the seconds of each part of a step, supervised rows per second, additional memory, FLOP/s, and their
share of what this machine's matrix products reach. Which rows of a batch count is planned before the clock starts, as a
run does while it collates. `--compare` also measures a second way, in alternation, and prints the ratios:

    eager    unroll every row, and hold its attention scores and full-vocabulary logits (draft only)
    eagle3   an EAGLE-3 draft of the same sizes, for --method dflash
    full     the same draft without its window, for --draft_sliding_window
    float32  the same step without mixed precision, for --dtype bfloat16
    padded   the same chats in padded batches instead of packed rows, whole step; and a naive version: padded, with
             every row of the draft and full-vocabulary logits computed as under `eager`
    trainer  the same batches through EagleTrainer instead of a bare loop, whole step
    live     epochs through EagleTrainer that run the target, and epochs from a feature store that is made first
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Bounds, Count, Depth, Repeats, Rows, Turns, Width, check_numbers
from hf_eagle.benchmark.shapes import LONGEST
from hf_eagle.door.printer import run_verb
from hf_eagle.targets.latent import LATENT_SIZES


SWEEPS = {"ttt": (1, 2, 3, 5, 7), "batch": (1, 2, 4, 8)}
SHORTEST = 512  # length that a sweep begins with
SWEPT_BESIDE = ("none", "eager", "eagle3", "full")  # values of `compare`
# method -> arguments that it does not take, or not with these values
REFUSED = {
    "dflash": {"data": None, "compare": ("eager",), "preset": ("kimi-mla",), "draft_sliding_window": None},
}
Vocabulary = Annotated[int, Bounds(least=2, most=2**22)]
Layers = Annotated[int, Bounds(least=1, most=1000)]
Rank = Annotated[int, Bounds(least=0, most=2**17)]  # 0: no bottleneck


@dataclass
class BenchmarkArguments:
    preset: Literal["smollm2", "llama3-8b", "qwen3-8b", "qwen3-30b-a3b", "kimi-mla"] = field(
        default="smollm2", metadata={"help": "Shapes of the target and of the draft's layer."}
    )
    method: Literal["eagle3", "dflash"] = field(default="eagle3", metadata={"help": "The kind of draft."})
    draft_num_layers: Annotated[int, Bounds(least=1, most=64)] | None = field(
        default=None, metadata={"help": "--method dflash: layers of the draft; 1 by default."}
    )
    block_size: Annotated[int, Bounds(least=2, most=65)] | None = field(
        default=None, metadata={"help": "--method dflash: slots of a block; 8 by default."}
    )
    num_anchors: Count | None = field(
        default=None, metadata={"help": "--method dflash: blocks of a row at most; 512 by default."}
    )
    draft_sliding_window: Annotated[int, Bounds(least=2, most=2**24)] | None = field(
        default=None, metadata={"help": "Keys that the draft's attention sees; all by default."}
    )
    batch_size: Rows = field(default=1, metadata={"help": "Rows of a batch."})
    length: Annotated[int, Bounds(least=4, most=LONGEST)] = field(
        default=2048, metadata={"help": "Tokens per row; with --data the longest chat or packed row."}
    )
    supervised_share: Annotated[float, Bounds(above=0, below=1)] = field(
        default=0.4, metadata={"help": "Share of each turn that is the answer."}
    )
    turns: Turns | None = field(default=None, metadata={"help": "Turns per row; one per 512 tokens by default."})
    ttt_steps: Depth = field(default=7, metadata={"help": "Steps of the training-time test."})
    hidden_size: Width | None = field(default=None, metadata={"help": "This and the next seven override the preset."})
    intermediate_size: Width | None = field(default=None, metadata={"help": "Width of the MLP."})
    num_attention_heads: Width | None = field(default=None, metadata={"help": "Query heads."})
    num_key_value_heads: Width | None = field(default=None, metadata={"help": "Key and value heads."})
    head_dim: Width | None = field(default=None, metadata={"help": "Width of a head."})
    vocab_size: Vocabulary | None = field(default=None, metadata={"help": "The target's vocabulary."})
    draft_vocab_size: Vocabulary | None = field(
        default=None, metadata={"help": "The draft's vocabulary; with --data the whole one by default."}
    )
    num_hidden_layers: Layers | None = field(default=None, metadata={"help": "The target's layers."})
    kv_lora_rank: Width | None = field(
        default=None, metadata={"help": "This and the next four override a preset whose draft has latent attention."}
    )
    q_lora_rank: Rank | None = field(default=None, metadata={"help": "Rank of the queries' bottleneck."})
    qk_nope_head_dim: Width | None = field(default=None, metadata={"help": "Width of a head's unrotated key."})
    qk_rope_head_dim: Width | None = field(default=None, metadata={"help": "Width of the rotated key."})
    v_head_dim: Width | None = field(default=None, metadata={"help": "Width of a head's value."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "bfloat16: mixed precision of the draft, and the target's dtype."}
    )
    target: str = field(
        default="none",
        metadata={
            "help": "`none`: random features, to measure the draft alone; `random`: a Llama of the preset's shapes "
            "with random weights; with --data: a folder or Hub id."
        },
    )
    data: str | None = field(default=None, metadata={"help": "Real chats instead of random tokens; needs a --target."})
    num_chats: Count = field(default=64, metadata={"help": "How many chats of `data` to use, drawn at random."})
    compare: Literal["none", "eager", "eagle3", "full", "float32", "padded", "trainer", "live"] = field(
        default="none", metadata={"help": "What to compare with, in alternation."}
    )
    store_dtype: Literal["bfloat16", "float32", "float8"] = field(
        default="bfloat16", metadata={"help": "--compare live: number format of the feature store."}
    )
    store_dir: str | None = field(
        default=None, metadata={"help": "--compare live: folder for the feature store; a temporary one by default."}
    )
    sweep: Literal["none", "length", "ttt", "batch"] = field(
        default="none", metadata={"help": "Measure at several values of this, and draw how the cost grows."}
    )
    longest: Annotated[int, Bounds(least=SHORTEST, most=LONGEST)] = field(
        default=8192, metadata={"help": f"--sweep length: it doubles from {SHORTEST} to this."}
    )
    repeats: Repeats = field(default=5, metadata={"help": "Runs of each way of training; medians are shown."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; by default cuda if there is one."})
    output_json: str | None = field(
        default=None, metadata={"help": "JSON file for the numbers; a sweep's plot is written next to it."}
    )

    def __post_init__(self):
        check_numbers(self)
        if self.compare in ("padded", "trainer", "live") and self.data is None:
            raise ValueError(f"`compare` {self.compare} needs real chats: name a `data` file and a `target`.")
        if self.data is not None and self.target in ("none", "random"):
            raise ValueError("`data` needs a tokenizer and features: name a `target`.")
        if self.data is None and self.target not in ("none", "random"):
            raise ValueError(
                f"`target` {self.target} is measured on real chats: name a `data` file, or take `random` or `none`."
            )
        if self.data is not None and (self.compare in ("eager", "float32") or self.sweep != "none"):
            raise ValueError("`data` goes with `compare` none, padded, trainer or live, and without a `sweep`.")

        if self.compare == "full" and self.draft_sliding_window is None:
            raise ValueError("`compare` full is without a window: set `draft_sliding_window`.")
        if self.draft_sliding_window is not None and (self.preset == "kimi-mla" or self.data is not None):
            raise ValueError(
                "`draft_sliding_window` goes neither with `data` nor with `preset` kimi-mla, whose draft has latent "
                "attention: leave it out."
            )
        if self.compare == "float32" and self.dtype == "float32":
            raise ValueError("`compare` float32 needs `dtype` bfloat16.")
        latent = {name: getattr(self, name) for name in LATENT_SIZES if getattr(self, name) is not None}
        if latent and self.preset != "kimi-mla":
            name, size = next(iter(latent.items()))
            raise ValueError(f"`{name}` is {size}, but the draft of `preset` {self.preset} has no latent attention.")
        if self.sweep != "none" and self.compare not in SWEPT_BESIDE:
            raise ValueError("`sweep` goes with `compare` eager, eagle3, full or none.")
        self._check_method()
        if self.data is None:
            self._check_workload()

    def _check_method(self):
        from hf_eagle.drafts.kinds import kind_of_method

        kind = kind_of_method(self.method)
        others = kind.refused.difference(kind.meaningless)  # without a meaning to it, they may be of the one beside it
        refused = {**dict.fromkeys(others), **REFUSED.get(self.method, {})}
        if self.compare == self.method:
            refused["compare"] = (self.method,)
        for name, values in refused.items():
            value = getattr(self, name, None)
            if value is not None and (values is None or value in values):
                raise ValueError(f"`{name}` {value} does not go with `method` {self.method}: leave it out.")

    @property
    def swept(self) -> tuple[int, ...]:
        """Values of what is swept."""
        if self.sweep != "length":
            return SWEEPS[self.sweep]
        return tuple(SHORTEST << n for n in range((self.longest // SHORTEST).bit_length()))

    def _check_workload(self):
        from hf_eagle.benchmark.shapes import check_shapes, check_turns, shapes_of, turns_of

        check_shapes(shapes_of(self), with_target=self.target == "random")
        for length in self.swept if self.sweep == "length" else (self.length,):
            check_turns(length, turns_of(self.turns, length), self.supervised_share)


def parser():
    from hf_eagle.arguments.parser import EagleArgumentParser

    return EagleArgumentParser(BenchmarkArguments, description=__doc__)


def door(argv: list[str] | None = None) -> BenchmarkArguments:
    """Return the arguments, after checking every path."""
    from hf_eagle.door.inputs import check_data, check_target
    from hf_eagle.door.outputs import check_output_file, check_output_folder, check_pictures, holds_object_with

    (args,) = parser().parse_args_and_config(argv)
    if args.data is not None:
        check_data("data", [args.data])
        check_target("target", args.target)
    reads = {"data": args.data, "target": None if args.data is None else args.target}
    if args.store_dir is not None:
        check_output_folder("store_dir", args.store_dir, reads, overwrite=True, ours=lambda folder: True)
    if args.output_json is not None:
        check_output_file("output_json", args.output_json, reads, holds_object_with("arguments", "machine"))
        drawn = [] if args.sweep == "none" else [Path(args.output_json).with_suffix(".png")]
        check_pictures("output_json", drawn, args.output_json, reads)
    return args


def main() -> None:
    args = door()

    import torch

    from hf_eagle.arguments.devices import device_of
    from hf_eagle.benchmark import run
    from hf_eagle.door.writing import output, write_output

    torch.manual_seed(0)
    if args.store_dir is not None:
        Path(args.store_dir).mkdir(parents=True, exist_ok=True)
    device = torch.device(device_of(args.device))
    if args.sweep == "none":
        result = run.measure(args, device)
        print(run.describe(result))
    else:
        result = run.sweep(args, device, args.swept)

    result["arguments"], result["machine"] = asdict(args), run.machine(device)
    if args.output_json:
        write_output("output_json", args.output_json, json.dumps(result, indent=2))
        if args.sweep != "none":
            picture = Path(args.output_json).with_suffix(".png")
            with output("output_json", picture) as part:
                run.draw_sweep(result, part)
            print(f"wrote {picture}")


if __name__ == "__main__":
    run_verb(main)
