"""Training on features from a server is training beside the target: the same losses, and no file is left behind."""

import pytest
import torch
from datasets import Dataset
from feature_server import FeatureServer
from tiny import random_chats, tiny_eagle1_pair, tiny_llama, tiny_pair
from tiny_blocks import tiny_block_pair
from tiny_tokenizer import word_tokenizer
from transformers import TrainerCallback

from hf_eagle import EagleTrainer, EagleTrainingArguments
from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.packing import pack_dataset
from hf_eagle.data.streaming import RankStream
from hf_eagle.store.cache import fill, open_cache
from hf_eagle.targets.ends import load_ends
from hf_eagle.targets.feature_client import FeatureClient, ServerGone
from hf_eagle.targets.served import ServedTarget


DATA = Dataset.from_list(random_chats(24, seed=1))
PAIRS = {"eagle3": tiny_pair, "eagle1": tiny_eagle1_pair, "dflash": tiny_block_pair}
FORMS = {
    "padded": (DATA, {}),
    "packed": (pack_dataset(DATA, 64), {"per_device_train_batch_size": 2}),
    "accumulated": (DATA, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
    "by workers": (DATA, {"dataloader_num_workers": 2}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "target"
    tiny_llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "features").mkdir()
    return tmp_path / "features"


def served(saved, server, folder, **options):
    options = {"server_model": "target", "first_delay": 0.001, "retries": 2} | options
    return ServedTarget(load_ends(saved), FeatureClient([server.url], folder, saved, **options))


def trainer_of(out, target, draft, data=DATA, **fields):
    defaults = {
        **{"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1},
        **{"report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
    }
    cache, callbacks = fields.pop("feature_cache", None), fields.pop("callbacks", None)
    args = EagleTrainingArguments(output_dir=str(out), **defaults | fields)
    held_out = None if isinstance(data, RankStream) else data.select(range(2))
    return EagleTrainer(
        model=draft, args=args, target=target, train_dataset=data, eval_dataset=held_out, feature_cache=cache,
        callbacks=callbacks,
    )  # fmt: skip


def losses(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    told = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*told, trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", PAIRS)
def test_losses_are_those_beside_the_target(method, form, saved, folder, tmp_path):
    data, fields = FORMS[form]
    target, draft = PAIRS[method]()
    wanted = losses(trainer_of(tmp_path / "beside", target, draft, data, **fields))

    _, draft = PAIRS[method]()
    with FeatureServer(tiny_llama(), folder) as server:
        seen = losses(trainer_of(tmp_path / "served", served(saved, server, folder), draft, data, **fields))
    assert seen == pytest.approx(wanted, rel=1e-5)
    assert not any(folder.iterdir())


def test_the_next_batch_is_asked_for_while_a_step_runs(saved, folder, tmp_path):
    asked, at_steps = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            at_steps.append(len(asked))

    _, draft = tiny_pair()
    with FeatureServer(tiny_llama(), folder) as server:
        target = served(saved, server, folder)
        ask, target.client.ask = target.client.ask, lambda *document: asked.append(document) or ask(*document)
        trainer = trainer_of(tmp_path, target, draft, callbacks=[Watch()])
        asked.clear()  # those of the check
        trainer.train()
    # the own batch of each step and the next, and each once: five steps, and the batch behind them
    assert at_steps == [8, 12, 16, 20, 24] and len(asked) == 24
    assert not any(folder.iterdir())


def test_a_stream_is_served_too(saved, folder, tmp_path):
    wanted, seen = [], []
    for into, by_server in ((wanted, False), (seen, True)):
        target, draft = tiny_pair()
        stream = DATA.to_iterable_dataset()
        with FeatureServer(tiny_llama(), folder) as server:
            target = served(saved, server, folder) if by_server else target
            trainer = trainer_of(tmp_path / str(by_server), target, draft, RankStream(stream))
            trainer.train()
            into += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen == pytest.approx(wanted, rel=1e-5) and len(seen) == 5


def test_a_server_that_ends_is_one_sentence_and_the_run_goes_on_later(saved, folder, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    target, draft = tiny_pair()
    wanted = losses(trainer_of(tmp_path / "beside", target, draft, **fields))

    _, draft = tiny_pair()
    server = FeatureServer(tiny_llama(), folder, fault=lambda number: "drop" if number >= 16 + 4 * 4 else None)
    with server, pytest.raises(ServerGone, match="failed 3 times in a row.*continue the run from its last checkpoint"):
        losses(trainer_of(tmp_path / "served", served(saved, server, folder), draft, **fields))

    _, draft = tiny_pair()
    with FeatureServer(tiny_llama(), folder) as server:
        trainer = trainer_of(tmp_path / "served", served(saved, server, folder), draft, **fields)
        seen = losses(trainer, resume=str(tmp_path / "served" / "checkpoint-2"))
    assert seen == pytest.approx(wanted, rel=1e-5)
    assert not any(folder.iterdir())


@pytest.mark.parametrize("method", PAIRS)
def test_a_store_is_filled_from_a_server_and_read_without_one(method, saved, folder, tmp_path):
    """Each document is asked for once, and training from the store is training beside the server."""
    tokenizer, store = word_tokenizer(96, 2), tmp_path / "store"

    def cache_of(target, write):
        _, draft = PAIRS[method]()
        target.tap_ids = draft.config.tap_ids
        options = {"tap_ids": draft.config.tap_ids, "max_length": 64, "dtype": "float32", "write": write}
        return open_cache(store, target, tokenizer, [DATA], **options), draft

    with FeatureServer(tiny_llama(), folder) as server:
        target = served(saved, server, folder)
        cache, draft = cache_of(target, write=True)
        wanted = losses(trainer_of(tmp_path / "first", target, draft, feature_cache=cache, num_train_epochs=1))
        fill(cache, target, [DATA], EagleDataCollator(0), 4)
        cache.lock.release()
        assert {len(x["prompt"]) for x in server.asked[16:]} == {len(row["input_ids"]) for row in DATA}

    target = ServedTarget(load_ends(saved))
    cache, draft = cache_of(target, write=False)
    seen = losses(trainer_of(tmp_path / "second", target, draft, feature_cache=cache, num_train_epochs=1))
    assert seen == pytest.approx(wanted, rel=1e-5)
    assert not any(folder.iterdir())


def test_a_store_is_filled_batches_ahead(saved, folder, tmp_path, monkeypatch):
    """So that the server has something to do while a batch is stored; each document is asked for once."""
    asked, at_batches = [], []
    with FeatureServer(tiny_llama(), folder) as server:
        target = served(saved, server, folder)
        target.tap_ids = [2, 4]
        ask, target.client.ask = target.client.ask, lambda *document: asked.append(document) or ask(*document)
        target.check()
        asked.clear()

        options = {"tap_ids": [2, 4], "max_length": 64, "dtype": "float32", "write": True}
        cache = open_cache(tmp_path / "store", target, word_tokenizer(96, 2), [DATA], **options)
        compute = cache.compute
        monkeypatch.setattr(cache, "compute", lambda *given: at_batches.append(len(asked)) or compute(*given))
        fill(cache, target, [DATA], EagleDataCollator(0), 4)
        cache.lock.release()
    # six batches of four: two are begun ahead, the third begins as the first is taken
    assert at_batches == [8, 12, 16, 20, 24, 24] and len(asked) == 24
    assert not any(folder.iterdir())


def test_the_trainer_compares_the_server_before_it_trains(saved, folder, tmp_path):
    _, draft = tiny_pair()
    with FeatureServer(tiny_llama(seed=7), folder) as server, pytest.raises(ValueError, match="is not this target"):
        trainer_of(tmp_path, served(saved, server, folder), draft)
    assert torch.is_grad_enabled()
