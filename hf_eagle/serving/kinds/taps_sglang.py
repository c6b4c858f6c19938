"""What SGLang requires of drafts with taps and their own head: EAGLE-3 with either attention."""

from collections.abc import Callable, Iterator, Mapping

from .. import rules_sglang
from ..draft_folder import DraftFolder, Finding, Shape, TargetFacts
from ..rules_sglang import READER, captured_ids, counts_entries
from .parameters import layer


_TAPS = "eagle_aux_hidden_state_layer_ids"
_FIELD = f"eagle_config.{_TAPS}"
# targets whose class also captures after the last layer, entry id N
_CAPTURES_THE_END = ("gemma3", "gemma4", "gpt_oss", "laguna", "mimo_v2", "minimax_m3", "nemotron_h")

CountTaps = Callable[[dict], int]


# ---- the config ----


def draft_vocabulary(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """The config counts the head's rows, and a draft with part of the vocabulary has a `d2t`."""
    config = folder.config
    if "draft_vocab_size" not in config:
        yield Finding(
            READER, "`draft_vocab_size` is missing, and SGLang has no default.", "set it to the rows of the head"
        )
    elif config["draft_vocab_size"] is None:
        yield Finding(
            READER,
            "`draft_vocab_size` is null: the trained head is thrown away for the target's.",
            "set it to the rows of the head",
        )

    size = config.get("draft_vocab_size") or config.get("vocab_size")
    vocab = config.get("vocab_size") if target is None else target.vocab_size
    if size != vocab and not any("d2t" in name for name in folder.shapes):
        yield Finding(
            READER,
            f"there is no `d2t` for the {size} draft tokens: they are taken for the target's first ones.",
            "restore `d2t`; without it no one knows which tokens the rows of the head are",
        )


def taps(folder: DraftFolder, target: TargetFacts | None, num_taps: CountTaps) -> Iterator[Finding]:
    """SGLang captures as many layers as `fc` takes, in order, and the same that vLLM records.

    Args:
        folder, target: as for every rule.
        num_taps: counts the taps that `fc` takes, from the config.
    """
    config, captured = folder.config, captured_ids(folder.config, target)
    if captured is None:
        yield Finding(
            READER, f"`{_FIELD}` is missing: taps are the target class's default.", "write the ids of training, minus 1"
        )
        return

    if not config["eagle_config"].get("use_aux_hidden_state", True):
        yield Finding(READER, "`eagle_config.use_aux_hidden_state` is false: nothing is captured.", "set it to true")
    if len(set(captured)) != num_taps(config):
        yield Finding(
            READER,
            f"`fc` is made for {num_taps(config)} taps, but `{_FIELD}` names {len(set(captured))}.",
            "let both say what the draft was trained with",
        )

    if captured != sorted(captured):
        ids = config["eagle_config"][_TAPS]
        yield Finding(READER, f"`{_FIELD}` {ids} is captured in the order of layers, not in this one.", "sort the ids")

    if target is not None and max(captured) == target.num_layers:
        if not target.model_type.startswith(_CAPTURES_THE_END):
            yield Finding(
                READER,
                f"entry {target.num_layers}, the input of the final norm, is not captured of a {target.model_type} "
                "target.",
                f"train with taps below {target.num_layers}",
                level="limit",
            )

    entries = config.get(_TAPS)
    if entries and captured != list(entries):
        yield _other_taps(config["eagle_config"][_TAPS], captured, entries, target)


def _other_taps(nested: list[int], captured: list[int], entries: list[int], target: TargetFacts | None) -> Finding:
    """The finding for captured layers that are not the `entries` that vLLM records."""
    if target is not None and counts_entries(target) and entries[0] == 1:
        return Finding(
            READER,
            f"with this target ids that begin with 1 are raised by one, and no ids give the taps {entries}.",
            "train with taps that begin elsewhere",
            level="limit",
        )

    if target is None and list(nested) == list(entries):
        return Finding(
            READER,
            f"`{_FIELD}` {nested} gives the taps of `eagle_aux_hidden_state_layer_ids` only with DeepSeek, Kimi and "
            "GLM-4-lite.",
            "name the target of the draft to the check",
            level="note",
        )

    return Finding(
        READER,
        f"`{_FIELD}` {nested} captures the entries of layers {captured}, where vLLM records {list(entries)}: one of "
        "the two serves other taps than were trained, and acceptance silently collapses.",
        "make both say the taps of training",
    )


# ---- the tensors ----


def parameters(
    config: dict, num_layers: int, attention: Callable[[dict, int], Mapping[str, Shape]], num_taps: CountTaps
) -> dict[str, Shape]:
    """SGLang's parameters of a draft with taps by their names in a checkpoint, without what the target lends.

    Args:
        config: `config.json`.
        num_layers: the first layer reads embedding and features side by side, later ones a row of `hidden_size`.
        attention: the shapes of its projections, from the config and the width that it reads.
        num_taps: counts the taps that `fc` takes, from the config.
    """
    hidden = config["hidden_size"]
    width, taps = config.get("target_hidden_size") or hidden, num_taps(config)
    found = {"fc.weight": (hidden, taps * width), "norm.weight": (hidden,)}
    found["lm_head.weight"] = (config.get("draft_vocab_size") or config.get("vocab_size"), hidden)

    norms = ("post_attention_layernorm", "hidden_norm")
    found |= layer(config, attention(config, 2 * hidden), (*norms, "input_layernorm"), "layers.0")
    for index in range(1, num_layers):  # later layers norm by `hidden_norm` alone
        found |= layer(config, attention(config, hidden), norms, f"layers.{index}")

    if config.get("fc_norm") or config.get("use_aux_norm"):
        found |= {f"fc_norm.{i}.weight": (width,) for i in range(taps)}
    return found


def tensors(
    folder: DraftFolder,
    target: TargetFacts | None,
    own: Callable[[dict, int], Mapping[str, Shape]],
    place: Callable[[str], str],
    passed_over: tuple[str, ...] = (),
) -> Iterator[Finding]:
    """As `rules_sglang.tensors`, for a draft with its own vocabulary.

    Args:
        folder, target: as for every rule.
        own: the kind's parameters, from the config and the number of layers.
        place: name of a tensor -> the parameter that the loader looks for.
        passed_over: endings of names that need no parameter here.
    """
    names = [name for name in folder.shapes if "d2t" not in name and "t2d" not in name]
    places = {name: place(name) for name in names if not name.endswith(passed_over)}
    yield from rules_sglang.tensors(folder, own(folder.config, folder.num_layers), places)
