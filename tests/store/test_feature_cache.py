"""Training from a store equals training with the target: same curves, and same bits where it computes the same."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import random_chats, tiny_eagle1_pair, tiny_llama, tiny_pair
from tiny_blocks import tiny_block_pair
from tiny_tokenizer import CHATML, word_tokenizer
from transformers import TrainerCallback
from workers import run_worker

from hf_eagle import EagleTrainer, EagleTrainingArguments, FrozenTarget
from hf_eagle.arguments.groups import DataArguments
from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.packing import pack_dataset
from hf_eagle.store.cache import fill, open_cache
from hf_eagle.store.dtypes import decode, encode
from hf_eagle.store.feature_store import FeatureStore
from hf_eagle.store.fingerprints import drop_layers, target_fingerprints
from hf_eagle.targets.target import TargetFeatures


DATA = Dataset.from_list([r for r in random_chats(20, seed=1) if "111" in "".join(map(str, r["loss_mask"]))][:8])
PAIRS = {"eagle3": tiny_pair, "eagle1": tiny_eagle1_pair, "dflash": tiny_block_pair}
TOKENIZER = word_tokenizer(96, 2)


def pair(method="eagle3", dtype=torch.float32):
    target, draft = PAIRS[method]()
    target.model.to(dtype)
    draft.attach(target)
    target.tap_ids = draft.config.tap_ids
    return target, draft


def cache_of(folder, target, data=DATA, dtype="float32", write=False, tokenizer=TOKENIZER, max_length=64, tap_ids=...):
    tap_ids = target.tap_ids if tap_ids is ... else tap_ids
    return open_cache(
        folder, target, tokenizer, [data], tap_ids=tap_ids, max_length=max_length, dtype=dtype, write=write
    )


def filled(folder, target, data=DATA, dtype="float32", batch_size=1):
    cache = cache_of(folder, target, data, dtype, write=True)
    fill(cache, target, [data], EagleDataCollator(0), batch_size)
    cache.lock.release()


def curve(out, target, draft, data=DATA, feature_cache=None, callbacks=None, resume=None, **fields):
    """Every step's loss, the loss of an evaluation at the end, and a sum over the trained weights, bit for bit."""
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    steps = {"ttt_steps": 3} if draft.kind.name == "eagle3" else {}
    args = EagleTrainingArguments(
        output_dir=str(out), report_to="none", disable_tqdm=True, **{**defaults, **steps, **fields}
    )
    trainer = EagleTrainer(
        draft, args, target, train_dataset=data, eval_dataset=data, feature_cache=feature_cache, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = sum(float(p.detach().double().abs().sum()) for p in draft.parameters() if p.requires_grad)
    return [*losses, trainer.evaluate()["eval_loss"], weights]


SEQUENTIAL = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}


@pytest.mark.parametrize(
    ("method", "dtype", "way"),
    [
        ("eagle3", torch.float32, {}),  # conversations one by one, shuffled
        ("eagle3", torch.bfloat16, {}),
        ("eagle1", torch.bfloat16, {}),
        ("eagle3", torch.float32, {"gradient_accumulation_steps": 3}),
        ("eagle3", torch.bfloat16, SEQUENTIAL),  # stored in the batches that are trained on
        ("eagle1", torch.float32, {**SEQUENTIAL, "dataloader_num_workers": 2}),
        ("dflash", torch.float32, {"num_anchors": 2}),
        ("dflash", torch.bfloat16, {**SEQUENTIAL, "num_anchors": 2}),
    ],
)
def test_the_curve_is_the_live_one_bit_for_bit(method, dtype, way, tmp_path):
    """In float32 and, as a recipe has it, with a bfloat16 target under mixed precision."""
    name, size = str(dtype).removeprefix("torch."), way.get("per_device_train_batch_size", 1)
    fields = {**way, "per_device_eval_batch_size": size, "bf16": dtype == torch.bfloat16}
    live = curve(tmp_path / "live", *pair(method, dtype), **fields)
    target, draft = pair(method, dtype)
    filled(tmp_path / "store", target, dtype=name, batch_size=size)
    cache = cache_of(tmp_path / "store", target, dtype=name)
    drop_layers(target)
    assert curve(tmp_path / "stored", target, draft, feature_cache=cache, **fields) == live
    assert live[0] != live[1]


def test_packed_rows_are_read_from_a_store_of_either_kind(tmp_path):
    """Stored packed: bit for bit. Stored one by one: the same conversations, computed apart."""
    rows = pack_dataset(DATA, 64)
    assert len(rows) < len(DATA)
    live = curve(tmp_path / "live", *pair(), data=rows, max_steps=5)
    for name, data, tolerance in (("packed", rows, 0), ("apart", DATA, 1e-5)):
        target, draft = pair()
        filled(tmp_path / name, target, data)
        stored = curve(tmp_path / "out", target, draft, rows, cache_of(tmp_path / name, target, rows), max_steps=5)
        assert stored == pytest.approx(live, rel=tolerance, abs=0)


class Rounded(FrozenTarget):
    """A target whose features are rounded as a store of `store_dtype` rounds them: the live run to compare with.

    What its head says of all tokens is stored of the exact ones.
    """

    store_dtype = "bfloat16"

    def __call__(self, *args, **kwargs):
        seen = super().__call__(*args, **kwargs)
        taps, last = (decode(encode(x, self.store_dtype, 32), x.dtype) for x in (seen.taps, seen.last_hidden))
        head_summary = self.head_summary(seen.last_hidden.flatten(0, 1))
        return TargetFeatures(taps, last, head_summary=head_summary)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_a_narrower_store_is_live_training_on_rounded_features(dtype, tmp_path):
    target, draft = pair()
    rounded = Rounded(target.model)
    rounded.store_dtype = dtype
    live = curve(tmp_path / "live", rounded, draft)
    target, draft = pair()
    filled(tmp_path / "store", target, dtype=dtype)
    assert (
        curve(tmp_path / "stored", target, draft, feature_cache=cache_of(tmp_path / "store", target, dtype=dtype))
        == live
    )
    exact = curve(tmp_path / "exact", *pair(), max_steps=3)[:3]
    assert live[:3] != exact and live[:3] == pytest.approx(exact, rel=0.02)


def test_the_first_epoch_fills_the_store(tmp_path):
    """The target is asked once for each conversation; what was stored before is read."""
    live = curve(tmp_path / "live", *pair())
    target, draft = pair()
    filled(tmp_path / "store", target, DATA.select(range(3)))
    cache = cache_of(tmp_path / "store", target, write=True)
    asked, forward = [], target._forward
    target._forward = lambda *args, **kwargs: asked.append(1) or forward(*args, **kwargs)
    assert curve(tmp_path / "stored", target, draft, feature_cache=cache) == live
    assert len(asked) == 5
    cache.lock.release()
    target, draft = pair()
    cache = cache_of(tmp_path / "store", target)
    drop_layers(target)
    assert curve(tmp_path / "again", target, draft, feature_cache=cache) == live


def test_ranks_agree_on_what_is_missing(tmp_path):
    """They divide it by its order: no rank may write before the slowest has listed what is missing."""
    run_worker(tmp_path, 2, worker="feature_cache_worker.py")
    assert [json.loads((tmp_path / f"missing_{rank}.json").read_text()) for rank in (0, 1)] == [8, 8]
    assert len(FeatureStore(tmp_path / "store")) == 8


def test_what_is_said_of_the_size_is_what_the_disk_holds(tmp_path, caplog):
    target, _ = pair()
    for dtype in ("bfloat16", "float8"):
        with caplog.at_level(logging.INFO):
            cache = cache_of(tmp_path / dtype, target, dtype=dtype, write=True)
        cache.writer.shard_bytes = 10**9
        fill(cache, target, [DATA], EagleDataCollator(0), 4)
        (shard,) = (tmp_path / dtype).glob("*.safetensors")
        tokens = sum(map(len, DATA["input_ids"]))
        said = float(caplog.messages[-1].split(f"{tokens} tokens: ")[1].split(" bytes")[0])
        assert said == pytest.approx(shard.stat().st_size / tokens, rel=0.05), caplog.messages[-1]


def test_a_store_that_the_disk_cannot_hold_is_refused(tmp_path, monkeypatch):
    target, _ = pair()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(
        ValueError, match=r"needs another 0.00 GiB but only 0.00 GiB are free .* `--store_dtype float8`"
    ):
        cache_of(tmp_path / "store", target, write=True)
    assert not list((tmp_path / "store").glob("*.safetensors"))


def test_every_mismatch_is_one_sentence(tmp_path):
    target, _ = pair()
    with pytest.raises(ValueError, match="is not a feature store"):
        cache_of(tmp_path / "store", target)
    filled(tmp_path / "store", target, DATA.select(range(6)))

    def refused(message, target=target, **arguments):
        with pytest.raises(ValueError, match=message):
            cache_of(tmp_path / "store", target, **arguments)

    refused("lacks 2 of the run's 8 different conversations")
    cut = DATA.map(lambda row: {name: x[:-1] for name, x in row.items()})
    refused("lacks 8 of the run's 8 different .* different tokens or a different loss mask", data=cut)
    refused("was made with `max_length` 64, this run has 65", max_length=65)
    refused(r"was made with `tap_ids` \[2, 4, 5\], this run has \[2, 4, 6\]", tap_ids=[2, 4, 6])
    refused(r"`tap_ids` \[2, 4, 5\], this run has None", tap_ids=None)
    refused("`store_dtype` float32, this run has bfloat16", dtype="bfloat16")
    refused("tokenizer of fingerprint", tokenizer=word_tokenizer(97, 2))
    template = word_tokenizer(96, 2)
    template.chat_template = CHATML
    refused("chat template of fingerprint", tokenizer=template)

    def other(model):
        return FrozenTarget(model, tap_ids=[2, 4, 5])

    refused("`target_dtype` float32, this run has bfloat16", target=other(tiny_llama().bfloat16()))
    refused("weights of fingerprint", target=other(tiny_llama(seed=1)))
    refused("a `target` of configuration", target=other(tiny_llama(rope_theta=5e5)))


def test_the_old_name_of_the_argument_works_and_warns(tmp_path):
    target, draft = pair()
    cache = cache_of(tmp_path / "store", target, write=True)
    args = EagleTrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", disable_tqdm=True)
    with pytest.warns(FutureWarning, match="`features` is now called `feature_cache`; version 0.2"):
        assert EagleTrainer(draft, args, target, train_dataset=DATA, features=cache).feature_cache is cache


def test_arguments_that_do_not_fit_are_one_sentence():
    with pytest.raises(ValueError, match="`store_dtype` is float8, but `feature_store` names no folder"):
        DataArguments(train_data=["chats.jsonl"], store_dtype="float8")


def test_fingerprints_are_of_the_function_and_not_of_the_folder(tmp_path):
    target, _ = pair()
    known = target_fingerprints(target)
    target.model.save_pretrained(tmp_path / "somewhere")
    assert target_fingerprints(FrozenTarget.from_pretrained(str(tmp_path / "somewhere"))) == known
    with torch.no_grad():
        target.model.model.layers[5].mlp.up_proj.weight.mul_(1.01)
    changed = target_fingerprints(target)
    assert changed["config"] == known["config"] and changed["weights"] != known["weights"]


def test_dropped_layers_are_gone_and_say_so():
    target, draft = pair()
    head, embedding = target.head_weight(), target.embedding_weight()
    drop_layers(target)
    assert sum(p.numel() for p in target.model.parameters()) == head.numel() + embedding.numel() + 32
    target.tap_ids = [2, 4, 5]  # it still has as many layers
    assert target.distribution(torch.randn(3, 32), draft.draft_ids).probs.shape == (3, 40)
    with pytest.raises(RuntimeError, match="layers were dropped since all features are stored"):
        target(torch.randint(3, 96, (1, 5)))


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_an_interrupted_first_epoch_goes_on(tmp_path):
    """What was stored up to the checkpoint is there; what waited behind it is lost and asked for again."""
    fields = {"save_strategy": "steps", "save_steps": 3}
    live = curve(tmp_path / "live", *pair(), **fields)
    target, draft = pair()
    cache = cache_of(tmp_path / "store", target, write=True)
    with pytest.raises(KeyboardInterrupt):
        curve(tmp_path / "run", target, draft, feature_cache=cache, callbacks=[Stop()], **fields)
    assert len(FeatureStore(tmp_path / "store")) == 3
    cache.lock.release()
    target, draft = pair()
    cache = cache_of(tmp_path / "store", target, write=True)
    resumed = curve(tmp_path / "run", target, draft, feature_cache=cache, resume="last", **fields)
    assert resumed == live
    assert len(FeatureStore(tmp_path / "store")) == len(DATA)
