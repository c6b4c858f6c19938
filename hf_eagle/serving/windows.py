"""A draft's sliding window: what each server makes of the fields in config.json, and how it is told.

vLLM takes a window from `layer_types` and `sliding_window` together. One of them alone is ignored, or ends the server.
SGLang reads neither: it has a flag. Neither reads `draft_sliding_window`, the window of training.
"""

from collections.abc import Iterator, Mapping

from ..door.config_readings import SLIDING
from . import rules_sglang, rules_vllm
from .draft_folder import DraftFolder, Finding, TargetFacts


def trained_window(config: Mapping[str, object]) -> int | None:
    """The window that a draft with this config.json was trained with; `None` for none."""
    return config.get("draft_sliding_window")


def sglang_flag(window: int) -> str:
    """SGLang's flag. FlashAttention shows one key more than it says, Triton as many."""
    return f"--speculative-draft-window-size {window - 1}"


def vllm_window(folder: DraftFolder, target: TargetFacts | None, reads_layer_types: bool = True) -> Iterator[Finding]:
    """vLLM shows the draft the keys that training showed.

    A window at least as long as the context hides nothing. Beside a target all of whose layers slide a draft needs a
    window of its own, since vLLM else gives it the target's.

    Args:
        folder, target: as for every rule.
        reads_layer_types: whether the draft's class can be loaded with that field; with EAGLE-1's loading fails.
    """
    own, sliding = folder.config.get("sliding_window"), SLIDING in (folder.config.get("layer_types") or [])
    trained = trained_window(folder.config)
    if sliding and not reads_layer_types:
        yield _finding("`layer_types` asks for sliding attention: loading fails.", "leave `layer_types` out")
    elif trained is not None:
        yield from _other_than_trained(own, sliding, trained)
        return
    else:
        yield from _untrained(folder, target, own, sliding)

    if target is None or target.window is None or sliding:
        return
    text = (
        f"all layers of the target slide, and a draft without a window of its own gets the target's {target.window} "
        "tokens: beyond them it does not see keys that training showed, and fewer of its tokens are accepted."
    )
    if reads_layer_types:
        yield _finding(text, _whole_context(target))
    else:
        fix = f"serve at most {target.window} tokens (`--max-model-len`), or train an EAGLE-3 draft"
        yield Finding(rules_vllm.READER, text, fix, level="limit")


def _other_than_trained(own: object, sliding: bool, trained: int) -> Iterator[Finding]:
    """Of a draft that was trained with a window."""
    if sliding and own == trained:
        return
    said = f"`draft_sliding_window` says that it was trained with a window of {trained} tokens, but "
    if not sliding:
        said += "`layer_types` names no sliding attention: it is shown all tokens, or as many as its target's window."
    elif isinstance(own, int):
        said += f"`sliding_window` is {own}: it is shown so many."
    else:
        said += "`sliding_window` is missing: loading fails."
    yield _finding(said, f'write `layer_types` ["{SLIDING}"] and `sliding_window` {trained}')


def _untrained(folder: DraftFolder, target: TargetFacts | None, own: object, sliding: bool) -> Iterator[Finding]:
    """Of a draft that was trained without a window, as far as its config says."""
    context = folder.config.get("max_position_embeddings") if target is None else target.max_positions
    hides = isinstance(own, int) and isinstance(context, int) and own < context

    if sliding and not isinstance(own, int):
        yield _finding(
            "`layer_types` asks for sliding attention, which hides keys that training showed, but no `sliding_window` "
            "says how many are left: loading fails.",
            "leave `layer_types` out",
        )
    elif sliding and hides:
        yield _finding(
            f"`layer_types` and `sliding_window` {own} ask for sliding attention, which hides keys that training "
            f"showed from a context of {context}.",
            f"{_whole_context(target)}; or, if it was trained with this window, `draft_sliding_window` {own} too",
        )
    # harmless, but whoever wrote it may have trained with it
    elif hides:
        yield Finding(
            rules_vllm.READER,
            f"`sliding_window` {own} without `layer_types` is ignored: the draft is shown all tokens.",
            f'leave it out; or, if it was trained with this window, write `layer_types` ["{SLIDING}"] and '
            f"`draft_sliding_window` {own} too",
            level="note",
        )


def _finding(text: str, fix: str) -> Finding:
    return Finding(rules_vllm.READER, text, fix)


def _whole_context(target: TargetFacts | None) -> str:
    if target is None or target.window is None:
        return "leave `layer_types` out"
    return f'write `layer_types` ["{SLIDING}"] and `sliding_window` {target.max_positions}, the whole context'


def sglang_window(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """SGLang is told the window of training when it starts: it reads no field for it."""
    trained = trained_window(folder.config)
    if trained is not None:
        yield Finding(
            rules_sglang.READER,
            f"the window of {trained} tokens that it was trained with is not read from config.json: without a flag it "
            "is shown all tokens.",
            f"start the server with `{sglang_flag(trained)}` (FlashAttention shows one more than it says)",
            level="note",
        )
