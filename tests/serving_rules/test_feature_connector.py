"""The connector beside a scheduler and a cache written down here: every prompt's file is whole, or says why not."""

import importlib.util
import json
import os
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hf_eagle import serving


FILE = Path(serving.__file__).parent / "connector" / "feature_connector.py"
BLOCK, HIDDEN, IDS = 4, 8, [1, 3, 5]
NAMES = [f"{number:032x}" for number in range(8)]


class Base:
    """As much of vLLM's `KVConnectorBase_V1` as a subclass may rely on."""

    def __init__(self, vllm_config, role, kv_cache_config):
        self._kv_transfer_config, self._kv_cache_config = vllm_config.kv_transfer_config, kv_cache_config
        self._metadata = None

    def bind_kv_cache_manager(self, kv_cache_manager):
        pass

    def bind_connector_metadata(self, metadata):
        self._metadata = metadata

    def has_connector_metadata(self):
        return self._metadata is not None

    def _get_connector_metadata(self):
        return self._metadata


@pytest.fixture(scope="module")
def connector_module():
    """The file as vLLM loads it, with a stand-in for the few names that it imports of vLLM."""
    base, logger = "vllm.distributed.kv_transfer.kv_connector.v1.base", SimpleNamespace(exception=lambda *_: None)
    modules = {name: types.ModuleType(name) for name in (base, "vllm.logger", "vllm.distributed.parallel_state")}
    vars(modules[base]).update(KVConnectorBase_V1=Base, KVConnectorMetadata=object, SupportsHMA=object)
    modules["vllm.logger"].init_logger = lambda name: logger
    modules["vllm.distributed.parallel_state"].get_tensor_model_parallel_rank = lambda: 0

    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("feature_connector", FILE)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "feature_connector", module)
        spec.loader.exec_module(module)
        yield module


def config_of(folder, ids=IDS, **options):
    extra = {"folder": folder and str(folder), **options}
    draft = SimpleNamespace(hf_config=SimpleNamespace(eagle_aux_hidden_state_layer_ids=ids))
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(get_from_extra_config=lambda name, default: extra.get(name, default)),
        model_config=SimpleNamespace(model="some/target", revision=None, dtype=torch.bfloat16, quantization="fp8"),
        speculative_config=SimpleNamespace(draft_model_config=draft),
    )


def group(*names, spec="FullAttentionSpec", size=BLOCK):
    return SimpleNamespace(layer_names=list(names), kv_cache_spec=type(spec, (), {"block_size": size})())


ONE_GROUP = SimpleNamespace(kv_cache_groups=[group("model.layers.0", "cache_only_layers.6")])


class Server:
    """A scheduler that reads prompts in chunks, and may preempt them, and one worker whose cache it fills.

    The state of token `t` of a prompt in column `c` is `[t, c, ...]`, so that a lost or repeated token shows.
    """

    def __init__(self, module, folder, blocks=64, **options):
        made = (config_of(folder, **options), "role", ONE_GROUP)
        self.scheduler, self.worker = (module.FeatureConnector(*made) for _ in range(2))
        self.cache = torch.zeros(blocks, len(IDS), BLOCK, HIDDEN)
        self.worker.register_kv_caches({"model.layers.0": torch.zeros(1), "cache_only_layers.6": self.cache})
        self.scheduler.bind_kv_cache_manager(SimpleNamespace(get_block_ids=lambda request: (self.tables[request],)))
        self.tables, self.begun, self.free = {}, {}, torch.randperm(blocks).tolist()

    def begin(self, request, prompt, name=None, cached=0):
        """The next step is the first one of this request; some of its tokens may be cached."""
        self.tables[request] = [self.free.pop() for _ in range(-(-len(prompt) // BLOCK))]
        parameters = {} if name is None else {"kv_transfer_params": {"features": name}}
        self.begun[request] = [prompt, 0, SimpleNamespace(extra_args=parameters)]
        self._fill(request, cached)

    def preempt(self, request):
        """Its blocks are lost, and it begins anew in others."""
        self.free[:0] = self.tables[request]
        self.tables[request] = [self.free.pop() for _ in self.tables[request]]
        self.begun[request][1] = 0

    def step(self, new=(), known=(), tokens=BLOCK):
        before = {request: self.begun[request][1] for request in (*new, *known)}
        scheduled = {request: self._fill(request, tokens) for request in before}
        output = SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(
                    req_id=request,
                    prompt_token_ids=self.begun[request][0],
                    sampling_params=self.begun[request][2],
                    num_computed_tokens=before[request],
                )
                for request in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=list(known), num_computed_tokens=[before[request] for request in known]
            ),
            num_scheduled_tokens=scheduled,
        )
        self.worker.bind_connector_metadata(self.scheduler.build_connector_meta(output))
        self.worker.wait_for_save()

    def finish(self, request):
        finished = SimpleNamespace(request_id=request)
        held, told = self.scheduler.request_finished_all_groups(finished, (self.tables[request],))
        assert held is False
        return told

    def _fill(self, request, tokens):
        prompt, done, _ = self.begun[request]
        tokens = min(tokens, len(prompt) - done)
        for place in range(done, done + tokens):
            block = self.tables[request][place // BLOCK]
            self.cache[block, :, place % BLOCK] = torch.arange(len(IDS))[:, None] + 1000.0 * prompt[place] + place
        self.begun[request][1] += tokens
        return tokens


def check_file(path, prompt):
    with safe_open(path, "pt") as file:
        features, ids, header = file.get_tensor("features"), file.get_tensor("token_ids"), file.metadata()
    assert ids.tolist() == prompt and ids.dtype == torch.int32
    wanted = torch.arange(len(IDS))[None, :, None] + torch.tensor(prompt)[:, None, None] * 1000.0
    wanted = wanted + torch.arange(len(prompt))[:, None, None]
    assert torch.equal(features, wanted.expand(-1, -1, HIDDEN))
    assert header == {
        **{"model": "some/target", "revision": "", "dtype": "bfloat16", "quantization": "fp8"},
        "layer_ids": json.dumps(IDS),
    }


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_token_is_lost_or_repeated(connector_module, tmp_path_factory, data):
    """In chunks of any size, behind cached prefixes, beside others, and preempted at any point."""
    folder = tmp_path_factory.mktemp("features")
    server = Server(connector_module, folder)
    prompts = data.draw(st.lists(st.integers(1, 19), min_size=1, max_size=5))
    prompts = [[100 * n + k for k in range(length)] for n, length in enumerate(prompts)]
    waiting, reading = list(range(len(prompts))), []

    while waiting or reading:
        new = waiting[: data.draw(st.integers(0 if reading else 1, len(waiting)))]
        for n in new:
            server.begin(f"r{n}", prompts[n], NAMES[n], cached=data.draw(st.integers(0, len(prompts[n]) - 1)))
        waiting = waiting[len(new) :]
        if reading and data.draw(st.booleans()):
            server.preempt(f"r{reading[0]}")

        server.step([f"r{n}" for n in new], [f"r{n}" for n in reading], data.draw(st.integers(1, 20)))
        reading += new
        for n in [n for n in reading if server.begun[f"r{n}"][1] == len(prompts[n])]:
            check_file(folder / f"{NAMES[n]}.safetensors", prompts[n])  # before the answer says so
            assert server.finish(f"r{n}") == {"features": NAMES[n], "tokens": len(prompts[n])}
            reading.remove(n)

    assert sorted(file.name for file in folder.iterdir()) == [f"{name}.safetensors" for name in NAMES[: len(prompts)]]


@pytest.mark.parametrize("name", [None, "", "../../../tmp/evil", "0" * 31, "0" * 33, "G" * 32, "A" * 32, 7, ["0" * 32]])
def test_other_requests_leave_no_file(connector_module, tmp_path, name):
    server = Server(connector_module, tmp_path / "features")
    server.begin("r", [1, 2, 3], name)
    server.step(["r"])
    assert server.finish("r") is None
    assert [path.name for path in tmp_path.rglob("*")] == ["features"]


def test_a_request_that_ends_early_is_forgotten(connector_module, tmp_path):
    server = Server(connector_module, tmp_path)
    server.begin("r", list(range(9)), NAMES[0])
    server.step(["r"])
    server.finish("r")
    assert not server.scheduler._asked and not any(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["disk full", "in the way", "both", "cache"])
def test_a_failure_leaves_the_reason_and_the_engine_alive(connector_module, tmp_path, monkeypatch, fault):
    server = Server(connector_module, tmp_path)
    if fault in ("disk full", "both"):

        def full(tensors, path, header):
            Path(path).touch()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(connector_module, "save_file", full)
    if fault in ("in the way", "both"):
        (tmp_path / f"{NAMES[0]}.safetensors").mkdir()
    if fault == "both":  # what is left of the file cannot be deleted either
        monkeypatch.setattr(Path, "unlink", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    if fault == "cache":
        server.worker._cache = torch.zeros(0, len(IDS), BLOCK, HIDDEN)

    server.begin("r", [1, 2, 3], NAMES[0])
    server.step(["r"])
    assert "Error" in (tmp_path / f"{NAMES[0]}.failed").read_text()
    assert server.finish("r") is not None
    if fault != "both":
        assert not list(tmp_path.glob("*.part"))


def test_no_exception_leaves_the_scheduler(connector_module, tmp_path):
    server = Server(connector_module, tmp_path)
    server.begin("r", [1, 2, 3], NAMES[0])
    server.scheduler.bind_kv_cache_manager(SimpleNamespace(get_block_ids=lambda request: ()))
    server.step(["r"])
    assert not any(tmp_path.iterdir())


def test_only_files_of_its_own_that_nobody_fetched_are_swept(connector_module, tmp_path):
    old, young = time.time() - 7200, time.time()
    ours = {f"{NAMES[0]}.safetensors", f"{NAMES[1]}.failed", f"{NAMES[2]}.12.part"}
    others = {"model.safetensors", f"{NAMES[3]}.txt", f"x{NAMES[3]}.failed"}
    for name in ours | others:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))
    (tmp_path / f"{NAMES[4]}.safetensors").touch()
    os.utime(tmp_path / f"{NAMES[4]}.safetensors", (young, young))

    Server(connector_module, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == others | {f"{NAMES[4]}.safetensors"}


def test_only_the_rank_that_has_the_states_writes(connector_module, tmp_path, monkeypatch):
    def worker():
        return connector_module.FeatureConnector(config_of(tmp_path), "role", ONE_GROUP)

    first_stage = worker()
    first_stage.register_kv_caches({"model.layers.0": torch.zeros(2, 2, BLOCK, HIDDEN)})
    parallel = sys.modules["vllm.distributed.parallel_state"]
    monkeypatch.setattr(parallel, "get_tensor_model_parallel_rank", lambda: 1)
    second_rank = worker()
    second_rank.register_kv_caches({"cache_only_layers.6": torch.zeros(2, len(IDS), BLOCK, HIDDEN)})

    for one in (first_stage, second_rank):
        one.bind_connector_metadata(connector_module.ReadPrompts([connector_module.Prompt(NAMES[0], [1], [0])]))
        one.wait_for_save()
    assert not any(tmp_path.iterdir())


GROUPS = {
    "by name": ([group("model.layers.0"), group("cache_only_layers.6")], 1),
    "of a pipeline": ([group("model.layers.0"), group("model.layers.1", spec="HiddenStateCacheSpec")], 1),
    "the only one": ([group("model.layers.0")], 0),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_group_of_the_states_is_found(connector_module, tmp_path, name):
    groups, wanted = GROUPS[name]
    made = connector_module.FeatureConnector(config_of(tmp_path), "role", SimpleNamespace(kv_cache_groups=groups))
    assert made._group == wanted


def test_a_port_is_opened_by_the_worker_that_writes_and_told_by_the_scheduler(connector_module, tmp_path, monkeypatch):
    opened = []
    stand_in = types.ModuleType("feature_port")
    stand_in.TOKEN, stand_in.FeaturePort = "FEATURES_TOKEN", lambda *given: opened.append(given)
    monkeypatch.setitem(sys.modules, "feature_port", stand_in)
    monkeypatch.setenv("FEATURES_TOKEN", "secret")

    server = Server(connector_module, tmp_path, port=9001, host="0.0.0.0")
    assert opened == [(tmp_path, "0.0.0.0", 9001, "secret")]
    server.begin("r", [1, 2, 3], NAMES[0])
    server.step(["r"])
    assert server.finish("r") == {"features": NAMES[0], "tokens": 3, "port": 9001}


REFUSED = {
    "no folder": ({"folder": ""}, ONE_GROUP, "`folder`"),
    "no layers": ({"ids": []}, ONE_GROUP, "eagle_aux_hidden_state_layer_ids"),
    "a layer twice": ({"ids": [2, 2, 5]}, ONE_GROUP, "each layer once, got \\[2, 2, 5\\]"),
    "no group": ({}, SimpleNamespace(kv_cache_groups=[group("a"), group("b")]), "None of the 2 groups"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_work_with_is_refused_at_the_start(connector_module, tmp_path, name):
    options, groups, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        connector_module.FeatureConnector(config_of(**{"folder": tmp_path, **options}), "role", groups)


def test_blocks_of_another_size_are_refused_at_the_start(connector_module, tmp_path):
    made = connector_module.FeatureConnector(config_of(tmp_path), "role", ONE_GROUP)
    with pytest.raises(ValueError, match="blocks of 2 tokens, but are counted in blocks of 4"):
        made.register_kv_caches({"cache_only_layers.6": torch.zeros(3, 1, 2, 8)})


def test_the_header_has_the_layers_as_vllm_sorts_them(connector_module, tmp_path):
    made = connector_module.FeatureConnector(config_of(tmp_path, ids=[5, 1, 3]), "role", ONE_GROUP)
    assert json.loads(made._header["layer_ids"]) == [1, 3, 5]
