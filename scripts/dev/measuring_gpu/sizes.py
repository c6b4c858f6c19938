"""Shapes that are measured: real ones for a GPU, and tiny ones with which a CPU runs everything in a test."""

from dataclasses import dataclass

from hf_eagle.benchmark.shapes import PRESETS, Shapes


_TINY = Shapes(64, 96, 4, 2, 16, 300, 128, 8)


@dataclass(frozen=True)
class Sizes:
    """What each part is run with.

    Attributes:
        drafts: shapes of the drafts that are measured alone.
        batches: rows and length of their batches.
        steps: of the training-time test.
        target: shapes of the target that is run, and of its draft.
        target_batches: rows and length of its batches.
        launched: shapes and batches for which the host's time is shown.
        small: shapes of the runs that are watched for waits and for their losses.
        run_steps: optimizer steps of a short run.
        new_tokens: tokens that are decoded, fewer and more; the difference is free of the prompt.
        repeats: of what is timed; medians are shown.
        tests: what pytest is given.
        workers: of pytest; 0 for none beside itself.
    """

    drafts: dict[str, Shapes]
    batches: tuple[tuple[int, int], ...]
    steps: int
    target: Shapes
    target_batches: tuple[tuple[int, int], ...]
    launched: dict[str, tuple[Shapes, int, int]]
    small: Shapes
    run_steps: int
    new_tokens: tuple[int, int]
    repeats: int
    tests: tuple[str, ...]
    workers: int


REAL = Sizes(
    drafts={name: PRESETS[name] for name in ("llama3-8b", "qwen3-8b", "qwen3-30b-a3b", "kimi-mla")},
    batches=((1, 2048), (4, 2048), (1, 8192), (1, 32768)),
    steps=7,
    target=PRESETS["llama3-8b"],
    target_batches=((1, 2048), (4, 2048)),
    launched={
        "smollm2 1 x 512": (PRESETS["smollm2"], 1, 512),
        "llama3-8b 1 x 2048": (PRESETS["llama3-8b"], 1, 2048),
        "llama3-8b 4 x 2048": (PRESETS["llama3-8b"], 4, 2048),
    },
    small=Shapes(256, 512, 4, 2, 64, 4096, 1024, 8),
    run_steps=40,
    new_tokens=(8, 40),
    repeats=3,
    tests=("tests/drafts", "tests/losses", "tests/decoding", "tests/targets", "tests/training/test_trainer.py"),
    workers=8,
)

TINY = Sizes(
    drafts={"llama": _TINY, "latent": Shapes(64, 96, 4, 4, 16, 300, 128, 8, 24, 40, 16, 8, 12)},
    batches=((1, 48), (2, 32)),
    steps=3,
    target=_TINY,
    target_batches=((2, 48),),
    launched={"llama 1 x 48": (_TINY, 1, 48)},
    small=_TINY,
    run_steps=4,
    new_tokens=(2, 6),
    repeats=1,
    tests=("tests/losses/test_supervision.py",),
    workers=0,
)
