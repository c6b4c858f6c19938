"""A run whose target is served: look for its servers before anything is prepared, and load what is needed here."""

import os

from ..arguments.groups import DataArguments, TargetArguments
from ..targets.feature_client import TOKEN, FeatureClient
from ..targets.served import ServedTarget


def only_reads(data_args: DataArguments) -> bool:
    """Return whether training reads all features from a store, so that the target never runs."""
    return data_args.feature_store is not None and data_args.cache_mode == "read"


def check_server(target_args: TargetArguments, data_args: DataArguments, writes: bool = False) -> None:
    """Check that the servers of a target answer, that they serve it, and that they read rows of `max_length`.

    Args:
        writes: whether the run only writes a store.

    Raises:
        ConnectionError, ValueError: naming the server.
    """
    if target_args.target_url is None or (only_reads(data_args) and not writes):
        return

    urls, folder, name = target_args.target_url, target_args.features_folder, target_args.server_model
    client = FeatureClient(urls, folder, target_args.target, name, **_secrets())
    for server in client.servers:
        # the answer, which nobody needs, is one token
        if server.longest is not None and server.longest <= data_args.max_length:
            raise ValueError(
                f"`max_length` is {data_args.max_length}, but `target_url` {server.address.shown} reads and writes "
                f"{server.longest} tokens altogether: start it with `--max-model-len {data_args.max_length + 1}`."
            )


def served_target(target_args: TargetArguments, stored: bool = False) -> ServedTarget:
    """The target that servers run.

    Args:
        stored: whether all of its features are in a store, so that no server is asked for them.
    """
    return ServedTarget.from_server(
        target_args.target,
        dtype=target_args.target_dtype,
        trust_remote_code=target_args.trust_remote_code,
        revision=target_args.target_revision,
        **({} if stored else target_args.server | _secrets()),
    )


def _secrets() -> dict[str, str | None]:
    return {"api_key": os.environ.get("OPENAI_API_KEY"), "token": os.environ.get(TOKEN)}
