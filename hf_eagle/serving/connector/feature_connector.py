"""A KV connector for a stock vLLM: it writes a target's hidden states of a prompt to a file, for a trainer to read.

vLLM loads it by `kv_connector_module_path`, together with its own method `extract_hidden_states`; `hf-eagle
serve-features` prints the whole command. It runs inside the server, so it imports vLLM's extension point alone, and
nothing of hf_eagle.

A request asks for features by `"kv_transfer_params": {"features": NAME}`, a name of 32 hexadecimal digits. When its
prompt has been read, and before the answer arrives, `<folder>/<NAME>.safetensors` is whole:

* `features` `(tokens, states, hidden)`, in the server's dtype. State k is what enters layer k; with N layers, state N
  enters the final norm. They are ascending.
* `token_ids` `(tokens,)` int32, the prompt.
* in its header: `model`, `revision`, `layer_ids` as JSON, `dtype` and `quantization`.

If that fails, `<NAME>.failed` holds the reason. With `port`, files are handed out over HTTP too, see `feature_port.py`
beside this file; the answer tells the port. Other requests leave no file. vLLM keeps the states in blocks of its KV
cache, so cached prefixes, chunks and preempted prompts have theirs too.
"""

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA
from vllm.logger import init_logger


logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name

_NAME = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(rf"{_NAME.pattern}(\.\d+)?\.(safetensors|part|failed)")
# of the layer in which `extract_hidden_states` keeps the states
_LAYER, _SPEC = "cache_only_layers.", "HiddenStateCacheSpec"
_KEPT = 3600.0  # seconds after which nobody will fetch a file any more
_BETWEEN_SWEEPS = 60.0


@dataclass
class Prompt:
    """A prompt whose features are asked for; `blocks` of the cache hold them once it is read."""

    name: str
    token_ids: list[int]
    blocks: list[int] = field(default_factory=list)


@dataclass
class ReadPrompts(KVConnectorMetadata):
    """What the scheduler tells the workers: the prompts that this step reads to their end."""

    prompts: list[Prompt] = field(default_factory=list)


class FeatureConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. `kv_connector_extra_config` holds `folder`, and if they are wanted `port`, the port's `host`, and
    `kept_seconds`, for how long files that nobody fetches are kept.

    No exception leaves a method that runs in a step: it would end the engine.

    Raises:
        ValueError: while the server starts, for options or a cache that it cannot work with.
    """

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        option = self._kv_transfer_config.get_from_extra_config
        if not option("folder", None):
            raise ValueError("`kv_connector_extra_config` must name the `folder` that features are written to.")

        self._folder, self._kept = Path(option("folder", None)), float(option("kept_seconds", _KEPT))
        self._host, self._port = option("host", "127.0.0.1"), option("port", None)
        self._header = _header(vllm_config)
        self._group = _group_of_states(kv_cache_config)
        self._asked: dict[str, Prompt] = {}  # by request, in the scheduler
        self._cache: torch.Tensor | None = None  # in the one worker that writes
        self._swept = 0.0

    # ---- in the scheduler ----

    def bind_kv_cache_manager(self, kv_cache_manager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._blocks_of = kv_cache_manager.get_block_ids

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False  # it only writes

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output) -> ReadPrompts:
        try:
            return ReadPrompts(self._read_in(scheduler_output))
        except Exception:
            logger.exception("Features of this step's prompts are not written.")
            return ReadPrompts()

    def _read_in(self, step) -> list[Prompt]:
        """The prompts that end in this step: in chunks, behind a cached prefix, or once more after a preemption."""
        for new in step.scheduled_new_reqs:
            name = _name_in(new.sampling_params)
            if name is not None and new.prompt_token_ids is not None:
                self._asked.setdefault(new.req_id, Prompt(name, list(new.prompt_token_ids)))

        known = step.scheduled_cached_reqs
        computed = dict(zip(known.req_ids, known.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}

        read = []
        for request, scheduled in step.num_scheduled_tokens.items():
            prompt = self._asked.get(request)
            if prompt is None:
                continue
            if computed[request] < len(prompt.token_ids) <= computed[request] + scheduled:
                blocks = list(self._blocks_of(request)[self._group])
                read.append(Prompt(prompt.name, prompt.token_ids, blocks))
        return read

    def request_finished(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        """Also called for requests that were aborted. The answer names the file, and no block is held back."""
        prompt = self._asked.pop(request.request_id, None)
        if prompt is None:
            return False, None
        port = {} if self._port is None else {"port": self._port}
        return False, {"features": prompt.name, "tokens": len(prompt.token_ids), **port}

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids)

    # ---- in the workers ----

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        # with pipeline stages only the last one has the states; with tensor parallel all of its ranks have them
        cache = next((cache for name, cache in kv_caches.items() if _LAYER in name), None)
        if cache is None or get_tensor_model_parallel_rank() != 0:
            return

        size = self._kv_cache_config.kv_cache_groups[self._group].kv_cache_spec.block_size
        if cache.shape[2] != size:
            raise ValueError(
                f"The states lie in blocks of {cache.shape[2]} tokens, but are counted in blocks of {size}."
            )

        self._folder.mkdir(parents=True, exist_ok=True)
        if self._port is not None:
            from feature_port import TOKEN, FeaturePort

            FeaturePort(self._folder, self._host, self._port, os.environ.get(TOKEN))
        self._cache = cache
        self._sweep()

    def wait_for_save(self) -> None:
        """Called in every step, after `extract_hidden_states` has put the states of its tokens into the cache."""
        if self._cache is None or not self.has_connector_metadata():
            return
        for prompt in self._get_connector_metadata().prompts:
            self._write(prompt)
        if time.monotonic() > self._swept + _BETWEEN_SWEEPS:
            self._sweep()

    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs: Any) -> None:
        pass  # the cache holds the states already

    def _write(self, prompt: Prompt) -> None:
        """Write a prompt's file, under another name until it is whole; or else the reason why there is none."""
        kinds = ("safetensors", f"{os.getpid()}.part", "failed")  # several servers may write to one folder
        whole, part, failed = (self._folder / f"{prompt.name}.{kind}" for kind in kinds)
        try:
            # (blocks, states, tokens of a block, hidden)
            states = self._cache[torch.tensor(prompt.blocks, device=self._cache.device)]
            states = states.transpose(1, 2).flatten(0, 1)[: len(prompt.token_ids)]
            tensors = {"features": states.contiguous().cpu(), "token_ids": torch.tensor(prompt.token_ids).int()}
            save_file(tensors, part, self._header)
            os.replace(part, whole)
        except Exception as problem:
            logger.exception("The features of a prompt of %d tokens are not written.", len(prompt.token_ids))
            with suppress(OSError):
                part.unlink()
            with suppress(OSError):  # apart: the reason must not depend on what can be deleted
                failed.write_text(f"{type(problem).__name__}: {problem}")

    def _sweep(self) -> None:
        """Delete what clients that left have not fetched."""
        self._swept = time.monotonic()
        with suppress(OSError):
            for file in list(os.scandir(self._folder)):
                with suppress(OSError):  # a client may fetch it right now
                    if _FILE.fullmatch(file.name) and file.stat().st_mtime < time.time() - self._kept:
                        os.unlink(file.path)


def _header(vllm_config) -> dict[str, str]:
    """What every file says of the server. vLLM sorts the layers that it is given, and so does the header."""
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    config = None if speculative is None else speculative.draft_model_config.hf_config
    ids = list(getattr(config, "eagle_aux_hidden_state_layer_ids", None) or [])
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(
            "`speculative_config` must be of method extract_hidden_states, and its `eagle_aux_hidden_state_layer_ids` "
            f"must name each layer once, got {ids}."
        )

    dtype = str(model.dtype).removeprefix("torch.")
    told = {"model": model.model, "revision": model.revision, "dtype": dtype, "quantization": model.quantization}
    return {name: str(value or "") for name, value in told.items()} | {"layer_ids": json.dumps(sorted(ids))}


def _group_of_states(kv_cache_config) -> int:
    """The group of cache blocks that holds the states; the scheduler of a pipeline sees the first stage's names."""
    groups = kv_cache_config.kv_cache_groups
    ways = (
        [n for n, group in enumerate(groups) if any(_LAYER in name for name in group.layer_names)],
        [n for n, group in enumerate(groups) if type(group.kv_cache_spec).__name__ == _SPEC],
        [0] if len(groups) == 1 else [],
    )
    found = next((way for way in ways if len(way) == 1), None)
    if found is None:
        raise ValueError(f"None of the {len(groups)} groups of cache blocks is known to hold the states.")
    return found[0]


def _name_in(sampling_params) -> str | None:
    """The name that a request asks for its features by; `None` for other requests, and for names that may be paths."""
    arguments = getattr(sampling_params, "extra_args", None) or {}
    name = (arguments.get("kv_transfer_params") or {}).get("features")
    return name if isinstance(name, str) and _NAME.fullmatch(name) else None
