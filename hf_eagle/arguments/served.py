"""Arguments of a target that a server runs, instead of the process that trains."""

from dataclasses import dataclass, fields
from typing import Any

from ..door.connection import Address
from .parser import argument as _arg


# what says how a target in this process runs
_IN_PROCESS = ("target_sharding", "target_shard_size", "target_cpu_offload", "compile_target", "tap_method")
_IN_PROCESS += ("attn_implementation", "gguf_file")


@dataclass(kw_only=True)
class ServedTargetArguments:
    """Where the target is served."""

    _argument_group_name = "server of the target"

    target_url: list[str] | None = _arg(
        None,
        "Addresses of servers that run the target: its features come from them, and only its embedding, final norm and "
        "head are loaded here. `hf-eagle serve-features` starts such a server. Several are used in turn.",
    )
    features_folder: str | None = _arg(
        None,
        "`target_url`: the folder that the servers write features to, as it is called here. Unset: fetch them from the "
        "port that a server hands them out on (`--features_port` of `hf-eagle serve-features`).",
    )
    server_model: str | None = _arg(
        None, "`target_url`: the servers' name of the target, if they do not call it as `target` does."
    )

    @property
    def server(self) -> dict[str, Any]:
        """Return this as arguments of `ServedTarget.from_server`."""
        return {"urls": self.target_url, "features_folder": self.features_folder, "server_model": self.server_model}

    def check_server(self) -> None:
        """Check that these arguments fit each other, and those of a target in this process.

        Raises:
            ValueError: naming the argument.
        """
        if self.target_url is None:
            for name in ("features_folder", "server_model"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` is {getattr(self, name)}, but `target_url` names no server: set it, or leave out "
                        f"`{name}`."
                    )
            return

        for url in self.target_url:
            Address.read(url, "target_url")
        if len(set(self.target_url)) != len(self.target_url):
            raise ValueError("`target_url` names a server twice: name each once.")

        defaults = {known.name: known.default for known in fields(self)}
        for name in _IN_PROCESS:
            value = getattr(self, name)
            if value != defaults[name]:
                raise ValueError(
                    f"`{name}` is {value}, but the layers of the target run in the server that `target_url` names: "
                    "leave it out here, and start the server as it shall run them."
                )
