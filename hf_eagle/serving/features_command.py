"""The command that starts a stock vLLM which gives a target's features."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .vllm_server import SERVER, flags_of


CONNECTOR = Path(__file__).parent / "connector"  # vLLM imports the module in it


@dataclass(frozen=True)
class FeaturesCommand:
    """How to start the server: variables of its environment, and its options."""

    environment: dict[str, str]
    options: dict[str, Any]

    @property
    def words(self) -> tuple[str, ...]:
        """What stands behind `python`."""
        return (*SERVER, *flags_of(self.options))

    def shown(self, python: str = "python") -> str:
        """The command for a shell, an option a line."""
        words = [shlex.quote(word) for word in self.words]
        lines = [" ".join([*(f"{name}={shlex.quote(x)}" for name, x in self.environment.items()), python])]
        for word in words:
            if word.startswith("--"):
                lines.append(word)
            else:
                lines[-1] += f" {word}"
        return " \\\n    ".join(lines)


def features_command(
    target: str,
    layer_ids: list[int],
    folder: str | Path,
    longest: int,
    dtype: str,
    beyond_config: bool = False,
    features_port: int | None = None,
    **options: Any,
) -> FeaturesCommand:
    """Return the command of a server for `ServedTarget`.

    Args:
        target: folder or Hub id, as the trainer calls it.
        layer_ids: entry ids of the states that files hold, N (what enters the final norm) among them.
        folder: that features are written to.
        longest: tokens of the longest document.
        dtype: of the states, which must be that of the trainer's target.
        beyond_config: whether `longest` is all that the target's config allows, so that the answer of one token, which
            nobody needs, goes beyond it.
        features_port: on which files are handed out too, to trainers that do not see the folder.
        options: further ones of vLLM's, see `flags_of`.
    """
    connector = {"folder": str(Path(folder).absolute())}
    if features_port is not None:
        connector |= {"port": features_port, "host": options.get("host", "127.0.0.1")}
    draft = {"hf_config": {"eagle_aux_hidden_state_layer_ids": sorted(set(layer_ids))}}
    fixed = {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": draft,
        },
        "kv_transfer_config": {
            "kv_connector": "FeatureConnector",
            "kv_connector_module_path": "feature_connector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": connector,
        },
    }

    found = os.environ.get("PYTHONPATH")
    environment = {"PYTHONPATH": os.pathsep.join([str(CONNECTOR), *([found] if found else [])])}
    if beyond_config:
        environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    given = {"model": target, "dtype": dtype, "max_model_len": longest + 1, **options, **fixed}
    return FeaturesCommand(environment, given)


def check_engine_args(given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for one of vLLM's options that the recipe decides."""
    decided = ("model", "dtype", "max_model_len", "speculative_config", "kv_transfer_config", "port", "host")
    name = next((name for name in given if name.replace("-", "_") in decided), None)
    if name is not None:
        raise ValueError(
            f"`engine_args` holds `{name}`, which follows from the recipe and other arguments: leave it out."
        )
