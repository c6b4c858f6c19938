"""What vLLM requires of drafts with taps and their own head: EAGLE-3 with either attention."""

from collections.abc import Callable, Iterator, Mapping

from .. import rules_vllm
from ..draft_folder import DraftFolder, Finding, Shape, TargetFacts
from ..rules_vllm import READER
from .parameters import layer


TAPS = "eagle_aux_hidden_state_layer_ids"


# ---- what is read of the config ----


def resolve(name: str) -> str:
    """The name that vLLM with method `eagle3` looks up for one in `architectures`."""
    return name if name.startswith("Eagle3") or name.endswith("Eagle3") else f"Eagle3{name}"


def _target_vocab(folder: DraftFolder, target: TargetFacts | None) -> int | None:
    return folder.config.get("vocab_size") if target is None else target.vocab_size


def _draft_vocab(folder: DraftFolder) -> int | None:
    size = folder.config.get("draft_vocab_size")
    return folder.config.get("vocab_size") if size is None else size


def _tap_width(config: dict) -> int:
    return config.get("target_hidden_size") or config.get("hidden_size") or 0


def nested(config: dict) -> dict:
    """The fields in `eagle_config`."""
    return config.get("eagle_config") or {}


def num_taps(config: dict) -> int:
    """Number of taps that `fc` takes."""
    number = config.get("num_aux_hidden_states")
    return len(nested(config).get(TAPS) or [0, 0, 0]) if number is None else number


# ---- rules ----


def draft_vocabulary(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """For a draft with its own head: there is a `d2t` for a part of the vocabulary, and none for the whole."""
    whole = _draft_vocab(folder) == _target_vocab(folder, target)
    if whole and "d2t" in folder.shapes:
        yield Finding(
            READER,
            f"`draft_vocab_size` is the whole vocabulary of {_draft_vocab(folder)}, for which `d2t` has no parameter: "
            "loading fails.",
            "remove `d2t` and `t2d`, or set `draft_vocab_size` to the rows of the head",
        )

    if not whole and not any("d2t" in name for name in folder.shapes):
        yield Finding(
            READER,
            f"the {_draft_vocab(folder)} draft tokens have no `d2t`: they are silently taken for the target's first "
            "tokens.",
            "restore `d2t`; without it no one knows which tokens the rows of the head are",
        )


def tap_width(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """For a draft with taps: the width of one, which sizes `fc`."""
    config = folder.config
    if "target_hidden_size" in config and config["target_hidden_size"] is None:
        yield Finding(
            READER,
            "`target_hidden_size` is null, and the width of `fc` is computed from it.",
            "set it to the width of one tap, or leave it out if that is `hidden_size`",
        )
    elif target is not None and _tap_width(config) != target.hidden_size:
        yield Finding(
            READER,
            f"`target_hidden_size` is {_tap_width(config)}, but the target's features are {target.hidden_size} wide.",
            "serve the draft with the target that it was trained for",
        )


def taps(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """For a draft with taps: vLLM records the entry ids of training, and as many as `fc` takes."""
    config = folder.config
    ids = config.get(TAPS) or nested(config).get(TAPS) or [2, 3, 4]  # entry ids, or as many as the default has
    if not config.get(TAPS):
        instead = "those in `eagle_config`, as ENTRY ids" if nested(config).get(TAPS) else "(2, N // 2, N - 3)"
        yield Finding(
            READER,
            f"the top-level `{TAPS}` is missing: vLLM takes {instead}.",
            "write the entry ids of the taps that the draft was trained with",
        )

    # `fc` has a block of columns for each tap, in the order in which vLLM records them
    if ids != sorted(set(ids)):
        yield Finding(
            READER,
            f"`{TAPS}` {ids} is sorted and de-duplicated before use, so the columns of `fc` meet other taps.",
            "write ascending unique ids and order the columns of `fc` by them",
        )

    if len(set(ids)) != num_taps(config):
        yield Finding(
            READER,
            f"`num_aux_hidden_states` makes `fc` for {num_taps(config)} taps, but {len(set(ids))} are recorded.",
            "set `num_aux_hidden_states` to the number of taps",
        )

    if target is not None and not all(0 <= i <= target.num_layers for i in ids):
        yield Finding(
            READER,
            f"`{TAPS}` {ids} names layers that a target of {target.num_layers} layers does not have.",
            f"use entry ids of 0..{target.num_layers}, those of training",
        )

    if not nested(config).get("use_aux_hidden_state", True):
        yield Finding(
            READER,
            "`eagle_config.use_aux_hidden_state` is false: the draft gets the last hidden state instead of its taps.",
            "set it to true",
        )


def norm_before_residual(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """EAGLE-3's residual is what was fed back, not its norm."""
    if folder.config.get("norm_before_residual"):
        yield other_norm("norm_before_residual")


def other_norm(name: str) -> Finding:
    """The finding for a norm that EAGLE-3 does not run at this place."""
    return Finding(
        READER,
        f"`{name}` is true: vLLM runs another draft than EAGLE-3 as the paper and SGLang have it.",
        "set it to false, unless the draft was trained so",
    )


# ---- the tensors ----


def parameters(
    config: dict, num_layers: int, attention: Callable[[dict, int], Mapping[str, Shape]]
) -> dict[str, Shape]:
    """vLLM's parameters of a draft with taps by their names in a checkpoint, without vocabulary and head.

    Args:
        config: `config.json`.
        num_layers: the first layer reads embedding and features side by side, later ones a row of `hidden_size`.
        attention: the shapes of its projections, from the config and the width that it reads.
    """
    hidden, width = config["hidden_size"], _tap_width(config)
    norms = ("post_attention_layernorm", "input_layernorm", "hidden_norm")
    found = {"fc.weight": (hidden, num_taps(config) * width), "norm.weight": (hidden,)}
    for index in range(num_layers):
        read = hidden if index else 2 * hidden
        found |= layer(config, attention(config, read), norms, f"layers.{index}")

    if config.get("fc_norm"):
        found |= {f"fc_norm.{i}.weight": (width,) for i in range(num_taps(config))}
    return found


def tensors(
    folder: DraftFolder, target: TargetFacts | None, own: Callable[[dict, int], Mapping[str, Shape]]
) -> Iterator[Finding]:
    """As `rules_vllm.tensors`, for a draft with its own head and possibly its own vocabulary.

    Args:
        folder, target: as for every rule.
        own: the kind's parameters, from the config and the number of layers.
    """
    config, rows = folder.config, _draft_vocab(folder)
    wanted = {**own(config, folder.num_layers), "lm_head.weight": (rows, config["hidden_size"])}
    if rows != _target_vocab(folder, target):
        wanted["d2t"] = (rows,)

    places = {name: name.replace("midlayer.", "layers.0.") for name in folder.shapes if "t2d" not in name}
    # `draft_vocabulary` reports a `d2t` without a parameter
    yield from rules_vllm.tensors(folder, wanted, places, elsewhere=("d2t",))
