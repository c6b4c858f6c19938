"""Sizes of a target and its draft, and whether what is asked of them can be built and fits into memory. No torch."""

from dataclasses import dataclass, fields, replace


LONGEST = 2**17  # positions of the drafts that are made


@dataclass
class Shapes:
    """Sizes of a target and of the draft for it."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    num_hidden_layers: int  # the target's
    # of a draft with latent attention
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None


PRESETS = {
    "smollm2": Shapes(576, 1536, 9, 3, 64, 49152, 8192, 30),
    "llama3-8b": Shapes(4096, 14336, 32, 8, 128, 128256, 32000, 32),
    "qwen3-8b": Shapes(4096, 12288, 32, 8, 128, 151936, 32000, 36),
    "qwen3-30b-a3b": Shapes(2048, 6144, 32, 4, 128, 151936, 32000, 48),
    "kimi-mla": Shapes(7168, 18432, 64, 64, 112, 163840, 32000, 61, 1536, 512, 128, 64, 128),
}


def shapes_of(args) -> Shapes:
    """The preset's shapes, with what the arguments override."""
    preset = PRESETS[args.preset]
    given = {known.name: getattr(args, known.name) for known in fields(preset)}
    return replace(preset, **{name: value for name, value in given.items() if value is not None})


def turns_of(turns: int | None, length: int) -> int:
    """Turns of a row: as asked, or one every 512 tokens."""
    return turns or max(1, length // 512)


def check_shapes(shapes: Shapes, with_target: bool) -> None:
    """`ValueError` for sizes that the draft, and the target if one is built, cannot have together."""
    heads, kv_heads = shapes.num_attention_heads, shapes.num_key_value_heads
    rotated = [] if shapes.qk_rope_head_dim is None else ["qk_rope_head_dim"]
    plain = with_target or not rotated  # latent attention has neither of these
    if plain and heads % kv_heads:
        raise ValueError(f"`num_attention_heads` {heads} must be a multiple of `num_key_value_heads` {kv_heads}.")

    for name in (*rotated, *(("head_dim",) if plain else ())):
        size = getattr(shapes, name)
        if size % 2:
            raise ValueError(f"`{name}` must be even, since numbers are rotated in pairs, got {size}.")

    if with_target and shapes.hidden_size % heads:  # transformers checks this for every Llama
        raise ValueError(f"`hidden_size` {shapes.hidden_size} must be a multiple of `num_attention_heads` {heads}.")
    if with_target and shapes.num_hidden_layers < 7:
        raise ValueError(
            "`num_hidden_layers` must be at least 7, so that three layers can be tapped, got "
            f"{shapes.num_hidden_layers}."
        )

    if shapes.draft_vocab_size > shapes.vocab_size:
        raise ValueError(
            f"`draft_vocab_size` {shapes.draft_vocab_size} must be at most `vocab_size` {shapes.vocab_size}."
        )


def check_turns(length: int, turns: int, supervised_share: float) -> None:
    """`ValueError` unless each turn of a row has a token that a draft can learn."""
    most = length // 4  # a draft learns nothing from a turn of fewer tokens
    if turns > most:
        raise ValueError(f"`turns` must be at most {most} in rows of `length` {length}, got {turns}.")

    tokens = length // turns
    if int(supervised_share * tokens) < 2:  # the first token of an answer is the target's own, not the draft's
        raise ValueError(
            f"`supervised_share` {supervised_share:g} of a turn of {tokens} tokens is less than two tokens: give at "
            f"least {-(-2000 // tokens) / 1000:g}, or longer turns."
        )


def check_memory(
    shapes: Shapes, batch_size: int, length: int, target_layers: int, room: int | None, where: str
) -> None:
    """`ValueError` if what is held at the least does not fit into memory.

    Args:
        shapes: of target and draft.
        batch_size, length: of the batch.
        target_layers: how many layers of the target are built.
        room: bytes of memory; `None` if unknown, then nothing is refused.
        where: the device, as named in the error.
    """
    width, heads = shapes.hidden_size, shapes.num_attention_heads * shapes.head_dim
    layer = 3 * width * shapes.intermediate_size + 2 * width * heads
    weights = {
        "hidden_size": width * (shapes.vocab_size + shapes.draft_vocab_size) + layer * (1 + target_layers),
        # ids, and the features of three layers
        "batch_size": batch_size * length * (2 + 3 * width),
    }

    needed = 2 * sum(weights.values())  # bytes, if all were bfloat16
    if room is not None and needed > room:
        name = max(weights, key=weights.get)
        value = batch_size if name == "batch_size" else width
        sizes = f" with `length` {length}" if name == "batch_size" else " with the other sizes"
        raise ValueError(
            f"`{name}` {value}{sizes} needs {needed / 2**30:,.1f} GiB or more, but {where} has {room / 2**30:,.1f}: "
            "give smaller ones."
        )
