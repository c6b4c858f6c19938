"""Features of a served target are those of the target; what a server does wrong is one sentence, and nothing hangs."""

import json
import socket
import threading
import time

import pytest
import torch
from feature_server import FeatureServer
from tiny import VOCAB, pad_batch, random_chats, tiny_llama
from tiny_targets import tiny_family

from hf_eagle import FrozenTarget
from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.packing import pack_dataset
from hf_eagle.door.sentences import is_sentence
from hf_eagle.serving.connector.feature_port import FeaturePort
from hf_eagle.targets.ends import load_ends
from hf_eagle.targets.feature_client import FeatureClient, FeaturesRefused, ServerGone
from hf_eagle.targets.served import ServedTarget


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "target"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "features").mkdir()
    return tmp_path / "features"


def served(path, servers, folder, tap_ids=None, **options):
    options = {"server_model": "target", "first_delay": 0.001, "timeout": 30.0} | options
    client = FeatureClient([server.url for server in servers], folder, path, **options)
    return ServedTarget(load_ends(path), client, tap_ids)


def assert_equal_where_real(seen, wanted, real):
    if wanted.taps is None:
        assert seen.taps is None
    else:
        torch.testing.assert_close(seen.taps[real], wanted.taps[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.last_hidden[real], wanted.last_hidden[real], rtol=1e-4, atol=1e-5)
    assert seen.last_hidden.shape == wanted.last_hidden.shape


# ---- the same features ----


@pytest.mark.parametrize("tap_ids", [None, [0, 2, 5], [3, 7]], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "phi3"])
@pytest.mark.parametrize("side", ["right", "left", None])
def test_padded_batches(name, side, tap_ids, folder, tmp_path):
    model = tiny_family(name)
    model.save_pretrained(tmp_path / "target")
    batch = pad_batch(random_chats(4), side or "right")
    mask = batch["attention_mask"] if side else None

    with FeatureServer(model, folder) as server:
        target = served(str(tmp_path / "target"), [server], folder, tap_ids)
        seen = target(batch["input_ids"], attention_mask=mask)
        documents = [asked["prompt"] for asked in server.asked[16:]]  # behind the check

    wanted = FrozenTarget(model, tap_ids)(batch["input_ids"], attention_mask=mask)
    real = torch.ones_like(batch["input_ids"]).bool() if side is None else batch["attention_mask"] == 1
    assert_equal_where_real(seen, wanted, real)
    assert sorted(documents) == sorted(row[keep].tolist() for row, keep in zip(batch["input_ids"], real, strict=True))
    assert not any(folder.iterdir())


@pytest.mark.parametrize("positions", [True, False])
def test_packed_batches_are_a_request_for_each_document(model, saved, folder, positions):
    rows = pack_dataset(_dataset(random_chats(12)), 60)
    batch = EagleDataCollator(0)(list(rows))
    inputs = {name: batch[name] for name in ("documents", *(["position_ids"] if positions else []))}
    with FeatureServer(model, folder) as server:
        seen = served(saved, [server], folder, [2, 4])(batch["input_ids"], **inputs)
        assert len(server.asked) == 16 + 12
        assert 1 < server.most <= 8
    wanted = FrozenTarget(model, [2, 4])(batch["input_ids"], **inputs)
    assert_equal_where_real(seen, wanted, batch["documents"] >= 0)


def _dataset(records):
    from datasets import Dataset

    return Dataset.from_list(records)


def test_several_servers_are_used_in_turn(model, saved, folder):
    batch = pad_batch(random_chats(8))
    with FeatureServer(model, folder) as one, FeatureServer(model, folder) as other:
        served(saved, [one, other], folder, [2])(batch["input_ids"], batch["attention_mask"])
        assert (len(one.asked), len(other.asked)) == (16 + 4, 16 + 4)


def test_a_server_may_give_more_layers_than_are_asked_for(model, saved, folder):
    batch = pad_batch(random_chats(2))
    for layers in ([2, 4, 8], [0, 1, 2, 4, 6, 8]):
        with FeatureServer(model, folder, layers) as server:
            seen = served(saved, [server], folder, [2, 4])(**{k: batch[k] for k in ("input_ids", "attention_mask")})
        wanted = FrozenTarget(model, [2, 4])(batch["input_ids"], batch["attention_mask"])
        assert_equal_where_real(seen, wanted, batch["attention_mask"] == 1)


def test_servers_may_give_different_layers(model, saved, folder):
    batch = pad_batch(random_chats(8))
    with FeatureServer(model, folder, [2, 4, 8]) as one, FeatureServer(model, folder, [1, 2, 4, 5, 8]) as other:
        seen = served(saved, [one, other], folder, [2, 4])(batch["input_ids"], batch["attention_mask"])
        assert len(one.asked) == len(other.asked)
    wanted = FrozenTarget(model, [2, 4])(batch["input_ids"], batch["attention_mask"])
    assert_equal_where_real(seen, wanted, batch["attention_mask"] == 1)


def test_a_key_is_sent(model, saved, folder):
    with FeatureServer(model, folder, key="secret-key") as server:
        served(saved, [server], folder, [2], api_key="secret-key")(torch.tensor([[5, 6]]))
        with pytest.raises(FeaturesRefused, match="401 .*OPENAI_API_KEY") as problem:
            served(saved, [server], folder, [2], api_key="another-key")(torch.tensor([[5, 6]]))
        assert "another-key" not in str(problem.value)


# ---- without a folder in common ----


@pytest.fixture
def port(folder):
    with FeaturePort(folder, "127.0.0.1", 0, "port-secret") as port:
        yield port.server_port
        port.shutdown()


@pytest.mark.parametrize("fault", [None, "disk full", "drop"])
def test_features_come_from_a_port(model, saved, folder, port, fault):
    batch = pad_batch(random_chats(6))
    with FeatureServer(model, folder, port=port, fault=lambda number: fault if number % 4 == 0 else None) as server:
        target = served(saved, [server], None, [2, 4], token="port-secret")
        seen = target(batch["input_ids"], batch["attention_mask"])
    wanted = FrozenTarget(model, [2, 4])(batch["input_ids"], batch["attention_mask"])
    assert_equal_where_real(seen, wanted, batch["attention_mask"] == 1)
    assert not any(folder.iterdir())


@pytest.mark.parametrize("token", [None, "another-secret"])
def test_another_token_is_one_sentence(model, saved, folder, port, token):
    with FeatureServer(model, folder, port=port) as server:
        target = served(saved, [server], None, [2], token=token)
        with pytest.raises(FeaturesRefused, match="asks for another token: set the environment variable") as seen:
            target(torch.tensor([[5, 6]]))
    assert "another-secret" not in str(seen.value) and is_sentence(seen.value)


def test_a_server_without_a_port_is_one_sentence(model, saved, folder):
    with FeatureServer(model, folder) as server:
        target = served(saved, [server], None, [2])
        with pytest.raises(FeaturesRefused, match="has no port for features, and `features_folder` is not set"):
            target(torch.tensor([[5, 6]]))


def test_a_port_that_does_not_answer_is_one_sentence(model, saved, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    with FeatureServer(model, folder, port=closed) as server:
        target = served(saved, [server], None, [2], token="port-secret", retries=1)
        with pytest.raises(ServerGone, match=f"failed 2 times in a row, .*from its port {closed}"):
            target(torch.tensor([[5, 6]]))


# ---- what cannot be sent ----

REFUSED_INPUTS = {
    "pictures": ({"pixel_values": torch.zeros(1)}, "but pixel_values came with them"),
    "a cache": ({"use_cache": True}, "but use_cache came with them"),
    "a mask of its own": ({"attention_mask": torch.ones(1, 1, 3, 3)}, "4-D `attention_mask`"),
    "masks of its own": ({"attention_mask": {"full_attention": None}}, "4-D `attention_mask`"),
    "other positions": ({"position_ids": torch.tensor([[4, 5, 6]])}, "`position_ids` do not count"),
}


@pytest.mark.parametrize("name", REFUSED_INPUTS)
def test_what_a_server_cannot_be_sent_is_refused(model, saved, folder, name):
    inputs, message = REFUSED_INPUTS[name]
    with FeatureServer(model, folder) as server, pytest.raises(ValueError, match=message):
        served(saved, [server], folder, [2])(torch.tensor([[5, 6, 7]]), **inputs)


# ---- what passes ----


@pytest.mark.parametrize(
    "fault", [(500, "lost"), (503, "busy"), (429, "wait"), "drop", "garbage", "disk full"], ids=str
)
def test_what_passes_is_asked_again_by_the_same_name(model, saved, folder, fault):
    """Some attempts of many fail, the features are the same, and no file is left."""
    batch = pad_batch(random_chats(6))
    with FeatureServer(model, folder, fault=lambda number: fault if number % 3 == 0 else None) as server:
        seen = served(saved, [server], folder, [2, 4])(batch["input_ids"], batch["attention_mask"])
        names = [asked["kv_transfer_params"]["features"] for asked in server.asked]
    assert len(set(names)) == 16 + 6 < len(names)
    wanted = FrozenTarget(model, [2, 4])(batch["input_ids"], batch["attention_mask"])
    assert_equal_where_real(seen, wanted, batch["attention_mask"] == 1)
    left = list(folder.iterdir())
    assert not left or fault == "garbage"  # whose file is overwritten by the next attempt


def test_another_server_takes_over(model, saved, folder):
    batch = pad_batch(random_chats(6))
    with FeatureServer(model, folder) as one:
        with FeatureServer(model, folder) as other:
            target = served(saved, [one, other], folder, [2])
            target.check()
        seen = target(batch["input_ids"], batch["attention_mask"])  # the other one has ended
    wanted = FrozenTarget(model, [2])(batch["input_ids"], batch["attention_mask"])
    assert_equal_where_real(seen, wanted, batch["attention_mask"] == 1)


# ---- what does not ----


def _other_answer(answer, tensors, header):
    answer["choices"][0]["prompt_token_ids"] = [1, *answer["choices"][0]["prompt_token_ids"]]


def _no_connector(answer, tensors, header):
    del answer["kv_transfer_params"]


def _other_tokens(answer, tensors, header):
    tensors["token_ids"] = tensors["token_ids"] + 1


def _one_token_less(answer, tensors, header):
    tensors["features"] = tensors["features"][:-1].clone()


def _other_file(answer, tensors, header):
    tensors["hidden_states"] = tensors.pop("features")


def _no_header(answer, tensors, header):
    header.clear()


def _layers_as_text(answer, tensors, header):
    header["layer_ids"] = "[2, true]"


GONE = {
    "lost": ((500, "EngineCore encountered an issue"), "failed 3 times in a row, .*EngineCore"),
    "drops": ("drop", "failed 3 times in a row, the last time with: RemoteDisconnected"),
    "disk full": ("disk full", "could not write the features of .* tokens .*No space left on device"),
    "no json": ("garbage", "an answer that cannot be read"),
}
REFUSED = {
    "too long": ((400, "maximum context length is 8"), "answers POST /v1/completions with 400 .*maximum context"),
    "other tokens read": (_other_answer, "reads other tokens than it was sent"),
    "no connector": (_no_connector, "answers without features, so it runs without the connector: start it"),
    "no file": ("no file", "says that it wrote features, but `features_folder` .* does not hold them"),
    "torn": ("torn", "does not say what it holds"),
    "other tokens": (_other_tokens, "other tokens than the"),
    "one less": (_one_token_less, "holds features of shape"),
    "another file": (_other_file, "does not hold `features`"),
    "no header": (_no_header, "does not say what it holds \\(its header lacks `model`"),
    "layers as text": (_layers_as_text, "does not say what it holds \\(`layer_ids` is '\\[2, true\\]'"),
}


@pytest.mark.parametrize("name", [*GONE, *REFUSED])
def test_what_stays_wrong_is_one_sentence(model, saved, folder, monkeypatch, name):
    monkeypatch.setattr("hf_eagle.targets.feature_files._WITHIN", 0.05)
    fault, message = (GONE | REFUSED)[name]
    with FeatureServer(model, folder, fault=lambda number: fault) as server:
        target = served(saved, [server], folder, [2], retries=2)
        with pytest.raises(ServerGone if name in GONE else FeaturesRefused, match=message) as problem:
            target(torch.tensor([[5, 6, 7]]))
        assert "`target_url` http://127.0.0.1" in str(problem.value) and is_sentence(problem.value)


def test_a_server_that_is_slow_for_too_long_is_given_up(model, saved, folder):
    with FeatureServer(model, folder, fault=lambda number: 5.0) as server:
        target = served(saved, [server], folder, [2], timeout=0.2)
        with pytest.raises(ServerGone, match="gave no answer to POST /v1/completions in 0.2 seconds"):
            target(torch.tensor([[5, 6, 7]]))
        assert len(server.asked) <= 16  # none was asked for twice


def test_a_server_that_never_was_there_is_said_at_once(saved, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerGone, match=f"`target_url` {url} does not answer .*: start it with"):
        FeatureClient([url], folder, saved)


def test_a_client_that_leaves_does_not_wait(model, saved, folder):
    batch = pad_batch(random_chats(8))
    let_go = threading.Event()

    def hold(number):
        let_go.wait(20) if number >= 16 else None

    with FeatureServer(model, folder, fault=hold) as server:
        target = served(saved, [server], folder, [2])
        target.check()
        target.ask_ahead(batch["input_ids"], batch["attention_mask"] - 1)
        while server.most < 8:
            time.sleep(0.01)
        threading.Timer(0.05, let_go.set).start()
        target.forget_asked()
    assert not any(folder.iterdir())


# ---- is it this target? ----


def test_what_was_asked_ahead_is_what_a_call_takes(model, saved, folder):
    first, second = (pad_batch(random_chats(4, seed=seed)) for seed in (1, 2))
    with FeatureServer(model, folder) as server:
        target = served(saved, [server], folder, [2])
        target.check()
        for batch in (first, second):
            target.ask_ahead(batch["input_ids"], batch["attention_mask"] - 1)
        for batch in (first, second):
            seen = target(batch["input_ids"], batch["attention_mask"])
            # another model, since the server is at work on this one
            wanted = FrozenTarget(tiny_llama(), [2])(batch["input_ids"], batch["attention_mask"])
            assert_equal_where_real(seen, wanted, batch["attention_mask"] == 1)
        assert len(server.asked) == 16 + 8


ANOTHER = {
    "another head": (lambda: tiny_llama(seed=3), {}, "is not this target: of 16 documents"),
    "another width": (lambda: _wide(), {}, "states of 64 numbers, and `target` has 32"),
    "other layers": (
        tiny_llama,
        {"layer_ids": [1, 4, 8]},
        r"the layers \[1, 4, 8\], and this run needs \[2, 8\]",
    ),
    "another revision": (tiny_llama, {"told": {"revision": "v2"}}, "revision v2, and `target_revision` is main"),
    "no last state": (tiny_llama, {"layer_ids": [2, 4]}, r"the layers \[2, 4\], and this run needs \[2, 8\]"),
    "other numbers": (
        lambda: tiny_llama().bfloat16(),
        {},
        "bfloat16, and `target` is float32 here: start it",
    ),
}


def _wide():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).eval()


@pytest.mark.parametrize("name", ANOTHER)
def test_another_target_is_refused_with_what_differs(saved, folder, name):
    make, options, message = ANOTHER[name]
    with FeatureServer(make(), folder, **options) as server:
        with pytest.raises(FeaturesRefused, match=f"`target_url` {server.url} .*{message}") as problem:
            served(saved, [server], folder, [2]).check()
    assert is_sentence(problem.value)


def test_the_second_server_is_compared_too(model, saved, folder):
    with FeatureServer(model, folder) as one, FeatureServer(tiny_llama(seed=3), folder) as other:
        with pytest.raises(FeaturesRefused, match=f"{other.url} is not this target"):
            served(saved, [one, other], folder, [2]).check()


def test_a_server_that_is_started_anew_with_other_layers_is_seen(model, saved, folder):
    with FeatureServer(model, folder) as server:
        target = served(saved, [server], folder, [2])
        target.check()
        server.told["layer_ids"] = json.dumps(list(range(1, 10)))
        target.tap_ids = [0, 2]
        with pytest.raises(FeaturesRefused, match="this run needs \\[0, 2, 8\\]"):
            target(torch.tensor([[5, 6]]))


def test_near_ties_are_no_reason(model, saved, folder):
    """A few of the server's tokens are others, as rounding makes them."""

    def other_token(answer, tensors, header):
        answer["choices"][0]["token_ids"] = [VOCAB - 1]

    with FeatureServer(model, folder, fault=lambda number: other_token if number % 5 == 0 else None) as server:
        served(saved, [server], folder, [2]).check()


@pytest.mark.parametrize("name", ["target", None])
def test_the_model_is_found_by_name(model, saved, folder, name):
    listed = "target" if name else saved
    with FeatureServer(model, folder, name=listed) as server:
        FeatureClient([server.url], folder, saved, server_model=name)
    with FeatureServer(model, folder, name="another") as server:
        wanted = f"`server_model` {name}" if name else f"`target` {saved}"
        with pytest.raises(FeaturesRefused, match=f"serves another, not {wanted}: serve the target, or say in"):
            FeatureClient([server.url], folder, saved, server_model=name)


@pytest.mark.parametrize(("quantization", "told"), [("", "not quantised"), ("fp8", "quantised as fp8")])
def test_a_card_says_what_was_served(model, saved, folder, quantization, told):
    with FeatureServer(model, folder, told={"quantization": quantization}) as server:
        target = served(saved, [server], folder, [2])
        assert target.told_to_card() == []
        target.check()
    assert target.told_to_card() == [
        f"The target's hidden states are those of a vLLM that served it in float32, {told}"
    ]


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://a:99999", "http://a/?x=1", "ftp://a"])
def test_addresses_are_read_first(saved, folder, url):
    with pytest.raises(ValueError, match="`target_url`"):
        FeatureClient([url], folder, saved)


def test_a_folder_that_is_not_there_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="`features_folder` .*nowhere is no folder"):
        FeatureClient(["http://localhost:1"], tmp_path / "nowhere", saved)


def test_without_a_server_nothing_is_asked(saved):
    target = ServedTarget(load_ends(saved), tap_ids=[2])
    target.check()
    with pytest.raises(ValueError, match="no server to ask for features: give `target_url`"):
        target(torch.tensor([[1, 2]]))
