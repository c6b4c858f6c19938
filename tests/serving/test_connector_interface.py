"""The installed vLLM still has what the connector builds on; no server is started."""

import inspect

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA

from hf_eagle.serving.connector.feature_connector import FeatureConnector, ReadPrompts


# what vLLM calls in the connector, with the arguments that it is given
CALLED = {
    "__init__": ["vllm_config", "role", "kv_cache_config"],
    "bind_kv_cache_manager": ["kv_cache_manager"],
    "build_connector_meta": ["scheduler_output"],
    "get_num_new_matched_tokens": ["request", "num_computed_tokens"],
    "register_kv_caches": ["kv_caches"],
    "request_finished": ["request", "block_ids"],
    "request_finished_all_groups": ["request", "block_ids"],
    "update_state_after_alloc": ["request", "blocks", "num_external_tokens"],
    "wait_for_layer_load": ["layer_name"],
    "wait_for_save": [],
}


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", CALLED)
def test_methods_have_the_arguments_that_vllm_gives(name):
    base = next(kind for kind in (KVConnectorBase_V1, SupportsHMA) if name in vars(kind))
    assert parameters(getattr(base, name)) == parameters(getattr(FeatureConnector, name)) == CALLED[name]


def test_every_abstract_method_is_there():
    assert not inspect.isabstract(FeatureConnector)
    assert issubclass(ReadPrompts, KVConnectorMetadata)


def test_what_the_connector_uses_of_the_base_is_there():
    for name in ("has_connector_metadata", "_get_connector_metadata", "bind_connector_metadata"):
        assert callable(getattr(KVConnectorBase_V1, name))
    source = inspect.getsource(KVConnectorBase_V1.__init__)
    assert "self._kv_transfer_config" in source and "self._kv_cache_config" in source


def test_the_fields_of_a_step_are_there():
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    fields = {
        SchedulerOutput: {"scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens"},
        CachedRequestData: {"req_ids", "num_computed_tokens"},
        NewRequestData: {"req_id", "prompt_token_ids", "sampling_params", "num_computed_tokens"},
    }
    for kind, names in fields.items():
        assert names <= set(kind.__dataclass_fields__), kind
    assert parameters(KVCacheManager.get_block_ids) == ["request_id"]


def test_the_layer_that_keeps_the_states_is_there():
    from vllm.model_executor.models import extract_hidden_states

    source = inspect.getsource(extract_hidden_states)
    assert "cache_only_layers" in source and "HiddenStateCacheSpec" in source
