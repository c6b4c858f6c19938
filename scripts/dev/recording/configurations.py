"""What `record_steps.py` trains: every kind of training that the package has, with tiny models."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from tiny import VOCAB, random_chats, tiny_eagle1_pair, tiny_llama, tiny_mapping, tiny_pair
from tiny_mla import tiny_mla_pair
from tiny_tokenizer import word_tokenizer
from tiny_vision import CHATS, tiny_vision_model, vision_processor, write_records

from hf_eagle import EagleConfig, EagleDataCollator, FrozenTarget, VocabularyMapping, new_draft, pack_dataset

# the only modules that are not public: where they move, only these lines change
from hf_eagle.data.vision_dataset import build_vision_dataset
from hf_eagle.store.cache import fill, open_cache


STEPS = 20
ARGUMENTS = {
    "max_steps": STEPS,
    "save_steps": STEPS,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": STEPS // 2,
    "ttt_steps": 3,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "dataloader_num_workers": 0,
    "seed": 42,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass
class Configuration:
    """A kind of training.

    Args:
        build: makes, of a folder of its own, what the trainer is made of.
        arguments: that differ from `ARGUMENTS`.
        ranks: processes.
    """

    build: Callable[[Path], dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1


def chats(number: int = 16, seed: int = 1) -> Dataset:
    """Conversations of different lengths."""
    return Dataset.from_list(random_chats(number, seed))


def on_text(make_pair: Callable[[], tuple] = tiny_pair, packed: bool = False, **more) -> Callable:
    """Trains on text.

    Args:
        make_pair: makes target and draft.
        packed: several conversations share a row.
        more: further arguments of the trainer.
    """

    def build(folder: Path) -> dict:
        target, draft = make_pair()

        data, held_out = (chats(40), chats(9, seed=9)) if packed else (chats(), chats(5, seed=9))
        if packed:
            data, held_out = pack_dataset(data, 64), pack_dataset(held_out, 64)

        return {"model": draft, "target": target, "train_dataset": data, "eval_dataset": held_out, **more}

    return build


def on_stored_features(folder: Path) -> dict:
    """The target is asked beforehand, and its features are read from a store."""
    parts = on_text()(folder)
    target, datasets = parts["target"], [parts["train_dataset"], parts["eval_dataset"]]
    run = (folder / "store", target, word_tokenizer(VOCAB, 2), datasets)
    about = {"tap_ids": parts["model"].config.tap_ids, "max_length": 64}

    empty = open_cache(*run, **about, write=True)
    fill(empty, target, datasets, EagleDataCollator(0), batch_size=4)
    empty.lock.release()

    return {**parts, "feature_cache": open_cache(*run, **about)}


def on_pictures(folder: Path) -> dict:
    """Conversations with images, videos and neither; positions of the draft have three axes, as Qwen3-VL's have."""
    processor = vision_processor()
    target = FrozenTarget(tiny_vision_model())

    torch.manual_seed(1)
    ids = torch.randperm(target.vocab_size)[:200]
    config = EagleConfig.from_target(target.model.config, len(ids), rope="mrope", initializer_range=0.2)
    mapping = VocabularyMapping.from_token_ids(ids, target.vocab_size)
    draft = new_draft(config, target.embedding_weight(), mapping)

    (folder / "media").mkdir()
    data = build_vision_dataset(write_records(folder / "media", CHATS), processor)
    return {
        "model": draft,
        "target": target,
        "train_dataset": data,
        "eval_dataset": data,
        "processing_class": processor.tokenizer,
        "data_collator": EagleDataCollator.of(processor),
    }


def on_sharded_target(folder: Path) -> dict:
    """Each rank holds a part of the target, which it can only do of a target that it reads from files."""
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            tiny_llama().save_pretrained(folder / "target")
    target = FrozenTarget.from_pretrained(str(folder / "target"), sharding="fsdp2")

    torch.manual_seed(1)
    config = EagleConfig.from_target(target.config, 40, initializer_range=0.2)
    draft = new_draft(config, target.embedding_weight(), tiny_mapping(40), target.head_weight())
    return on_text(lambda: (target, draft))(folder)


ADAPTER = LoraConfig(
    r=4,
    lora_alpha=6,
    lora_dropout=0.1,
    target_modules=["fc", "q_proj", "v_proj", "down_proj", "lm_head"],
    modules_to_save=["norm"],
)
EAGLE1 = {"ttt_steps": 1, "feature_noise": "uniform"}
TWO_RANKS = {"per_device_train_batch_size": 2}

CONFIGURATIONS = {
    "eagle3": Configuration(on_text()),
    "eagle3_whole_vocabulary": Configuration(on_text(lambda: tiny_pair(None))),
    "eagle3_1": Configuration(on_text(lambda: tiny_pair(fc_norm=True, norm_output=True))),
    "eagle3_lk_lambda": Configuration(on_text(), {"loss": "lk_lambda"}),
    "eagle3_bf16": Configuration(on_text(), {"bf16": True}),
    "eagle3_checkpointing": Configuration(on_text(), {"gradient_checkpointing": True}),
    "eagle1": Configuration(on_text(tiny_eagle1_pair), EAGLE1),
    "mla": Configuration(on_text(tiny_mla_pair)),
    "lora": Configuration(on_text(peft_config=ADAPTER)),
    "packed": Configuration(on_text(packed=True)),
    "padded_left": Configuration(on_text(data_collator=EagleDataCollator(0, padding_side="left"))),
    "padded_right": Configuration(on_text(data_collator=EagleDataCollator(0, padding_side="right"))),
    "eagle1_packed": Configuration(on_text(tiny_eagle1_pair, packed=True), EAGLE1),
    "accumulation": Configuration(on_text(), {"gradient_accumulation_steps": 3}),
    "feature_store": Configuration(on_stored_features),
    "pictures": Configuration(on_pictures, {"per_device_train_batch_size": 2}),
    "ddp": Configuration(on_text(), TWO_RANKS, ranks=2),
    "fsdp2_target": Configuration(on_sharded_target, TWO_RANKS, ranks=2),
    "fsdp2_draft": Configuration(on_text(), {**TWO_RANKS, "fsdp": True, "fsdp_config": {}}, ranks=2),
}
