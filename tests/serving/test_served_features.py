"""A stock vLLM gives the features that the target has in process, and trains the draft that it trains."""

import json
import os
import signal
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import harness
import pytest
from harness import TARGET

from hf_eagle.serving.features_command import features_command
from hf_eagle.serving.vllm_server import vllm_server


TAPS = [2, 15, 27]
LENGTHS = (1, 2, 17, 64, 128, 129, 300, 700, 2000)
# small enough that long prompts are read in many steps, and beside each other only by preempting one
OPTIONS = {"enforce_eager": True, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 24}
OPTIONS |= {"enable_prefix_caching": True, "enable_chunked_prefill": True}


def serving(shared, name, layers=(*TAPS, 30), **options):
    folder = shared / name
    folder.mkdir(exist_ok=True)
    command = features_command(str(TARGET), list(layers), folder, 2048, "float32", **OPTIONS | options)
    given = {key: x for key, x in command.options.items() if key != "model"}
    log = shared / f"{name}.log"
    return vllm_server(TARGET, log, environment=command.environment, **given)


@pytest.fixture(scope="module")
def url(shared):
    with serving(shared, "features") as url:
        yield url


@pytest.fixture(scope="module")
def documents(shared, tokenizer, answers):
    """Real text, since random tokens tell little of a model, of 1 to 2,000 tokens."""
    rows = [json.loads(line)["messages"][1]["content"] for line in answers["train_data"].read_text().splitlines()]
    text = tokenizer("\n\n".join(rows * 2), add_special_tokens=False)["input_ids"]
    assert len(text) > 3000
    path = shared / "documents.json"
    path.write_text(json.dumps([text[7 * n : 7 * n + length] for n, length in enumerate(LENGTHS)]))
    return path


def metric(url, name):
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}"))


def test_features_are_those_of_the_target_in_process(url, shared, documents):
    """In chunks, behind cached prefixes, and with prompts that are preempted."""
    arguments = {"target": TARGET, "url": url, "folder": shared / "features", "tap_ids": TAPS, "documents": documents}
    arguments["times"] = 2
    printed = harness.call(harness.project(), "tests/serving/show_features.py", *harness.options(arguments))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    print(found)
    assert found["tokens"] == sum(LENGTHS) == found["same_argmax"]
    assert max(found[name] for name in ("taps", "last_hidden", "packed", "logits")) < 1e-4
    assert found["left"] == 0
    assert metric(url, "prefix_cache_hits") > 0


TRAINING = {
    **{"target_dtype": "float32", "bf16": None, "max_steps": 20, "warmup_steps": None, "logging_steps": 1},
    **{"cache_mode": None, "feature_store": None, "per_device_train_batch_size": 2},
}
WAYS = {
    "padded": {"draft_vocab_size": 512},
    "packed": {"draft_vocab_size": 512, "packing": True, "per_device_train_batch_size": 1},
    "dflash": {"method": "dflash", "draft_num_layers": 1, "block_size": 4, "ttt_steps": None, "mask_token_id": 5},
}


def train(folder, answers, served=None, **changes):
    values = TRAINING | changes | (served or {})
    values["draft_vocab_size"] = values.get("draft_vocab_size")
    harness.train(folder, answers["train_data"], **values)
    return losses(folder)


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_beside_the_target(url, shared, answers, way):
    served = {"target_url": url, "features_folder": shared / "features"}
    changes = WAYS[way]
    if way == "dflash":  # whose taps are others
        changes = changes | {"tap_ids": TAPS}
    wanted = train(shared / f"beside-{way}", answers, **changes)
    seen = train(shared / f"served-{way}", answers, served, **changes)
    assert len(seen) == 20 and seen == pytest.approx(wanted, rel=1e-4)
    assert not os.listdir(shared / "features")


def test_a_server_that_is_killed_in_training_and_started_anew(shared, answers):
    """The run ends with one sentence, and goes on from its checkpoint to the losses of an undisturbed one."""
    changes = {"draft_vocab_size": 512, "max_steps": 12, "save_strategy": "steps", "save_steps": 2}
    wanted = train(shared / "undisturbed", answers, **changes)
    out, folder = shared / "disturbed", shared / "killed"

    with serving(shared, "killed") as url:
        killer = threading.Thread(target=end_server, args=(url, out / "checkpoint-2"), daemon=True)
        killer.start()
        with pytest.raises(AssertionError, match="`target_url` .* failed 7 times in a row.*last checkpoint"):
            train(out, answers, {"target_url": url, "features_folder": folder}, **changes)
        killer.join()
    with serving(shared, "killed") as url:
        served = {"target_url": url, "features_folder": folder}
        seen = train(out, answers, served, **changes, resume_from_checkpoint="last")
    assert len(seen) == 12 and seen == pytest.approx(wanted, rel=1e-4)
    assert not os.listdir(folder)


def end_server(url, there):
    """Wait until something is there, then kill the server of this address, and what it has started."""
    while not there.exists():
        time.sleep(0.05)
    port = url.rpartition(":")[2].encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"vllm.entrypoints.openai.api_server" in words and words[words.index(b"--port") + 1] == port:
                os.killpg(int(pid), signal.SIGKILL)  # it leads a group of its own


def test_servers_that_do_not_fit_are_refused(shared, answers):
    with vllm_server(TARGET, shared / "plain.log", dtype="float32", max_model_len=2304, enforce_eager=True) as url:
        served = {"target_url": url, "features_folder": shared / "features"}
        with pytest.raises(AssertionError, match="answers without features, so it runs without the connector"):
            train(shared / "no-connector", answers, served, draft_vocab_size=512)
    with serving(shared, "others", layers=(1, 5, 30)) as url:
        served = {"target_url": url, "features_folder": shared / "others"}
        with pytest.raises(AssertionError, match=r"layers \[1, 5, 30\], and this run needs \[2, 15, 27, 30\]"):
            train(shared / "others-layers", answers, served, draft_vocab_size=512)
