"""The commands that start each server with a draft."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from ..door.config_readings import window_keys
from ..door.names import at_home
from .draft_folder import DraftFolder
from .kinds import ServedKind, kind_of, rows_of, serves
from .schedule import Schedule, schedule_fields
from .windows import sglang_flag, trained_window


def served_as(kind: str) -> ServedKind:
    """Return the servers' names for one of hf_eagle's kinds of draft, which all rows of the kind share.

    Raises:
        ValueError: if no server is known to run it.
    """
    rows = rows_of(kind)
    if not rows:
        raise ValueError(
            f"No server is known to run a draft of kind `{kind}`: decode with hf_eagle, as `hf-eagle evaluate` does."
        )
    return rows[0]


# limits of media that vLLM's processors of Qwen's models take; of frames it chooses itself
_PIXELS = ("min_pixels", "max_pixels")


def tokens_of_a_round(kind: str, config: Mapping[str, object]) -> int:
    """Return how many tokens a draft with this `config.json` drafts in a round, unless another number is asked for."""
    return served_as(kind).drafted(config) or 3


def serve_commands(
    target: str,
    draft: str,
    num_speculative_tokens: int = 3,
    kind: str = "eagle3",
    media_limits: Mapping[str, float] | None = None,
    config: Mapping[str, object] | None = None,
    schedule: Schedule | None = None,
) -> dict[str, str]:
    """Return shell commands that serve `target` with `draft`, by server; SGLang drafts as many tokens as vLLM.

    Args:
        target, draft: folders or Hub ids; expands a `~`, since servers do not and the shell does not in quotes.
        num_speculative_tokens: tokens drafted in a round.
        kind: hf_eagle's name of the draft's kind.
        media_limits: with which the target's media were shown in training; vLLM is told those of pixels.
        config: the draft's `config.json`; if transformers alone can generate with such a folder, a command says how.
            A window that it was trained with is passed on.
        schedule: number of drafted tokens by load, which vLLM takes in place of one number.

    Returns:
        Server name -> command; empty for a kind that no server is known to run.
    """
    if not serves(kind):
        return {}

    row = served_as(kind)
    target, draft = str(at_home(target)), str(at_home(draft))
    pixels = {name: value for name, value in (media_limits or {}).items() if name in _PIXELS}
    limits = f" \\\n    --mm-processor-kwargs {shlex.quote(json.dumps(pixels))}" if pixels else ""
    in_vllm = in_sglang = ""
    if (window := trained_window(config or {})) is not None:
        # vLLM gives such a draft its keys in a group of their own, which costs time at every step
        in_vllm, in_sglang = " \\\n    --disable-hybrid-kv-cache-manager", f" {sglang_flag(window)}"

    speculative = {"method": row.vllm.name, "model": draft, "num_speculative_tokens": num_speculative_tokens}
    speculative |= {} if schedule is None else schedule_fields(schedule)

    # as modules: these run wherever the package can be imported, even if its console command is not on the path
    commands = {
        "vLLM": f"python -m vllm.entrypoints.openai.api_server --model {shlex.quote(target)} \\\n"
        f"    --speculative-config {shlex.quote(json.dumps(speculative))}{limits}{in_vllm}",
        "SGLang": f"python -m sglang.launch_server --model-path {shlex.quote(target)} \\\n"
        f"    --speculative-algorithm {row.sglang.name} --speculative-draft-model-path {shlex.quote(draft)} \\\n"
        f"    {row.sglang.options(num_speculative_tokens)}{in_sglang}",
    }

    lines = row.in_python(config or {}, target, draft)
    return commands if lines is None else {**commands, "transformers": f"python - <<'END'\n{lines}\nEND"}


def serve_window(folder: str | Path, window: int) -> list[str]:
    """Return lines that say how each server shows the draft in a folder only the last `window` tokens.

    vLLM counts the query's own token. SGLang passes its flag on as it is; FlashAttention shows one token more.
    """
    row = kind_of(DraftFolder.read(folder))
    if not row.windowed:
        return [f"no server is known to run {row.label({})} drafts with a window"]

    keys = json.dumps(window_keys(window))[1:-1]
    return [
        f"window {window:,} in vLLM: {keys} in the draft's config.json, both; --disable-hybrid-kv-cache-manager saves "
        "time per step",
        f"window {window:,} in SGLang: {sglang_flag(window)} with FlashAttention, {window} with Triton",
    ]
