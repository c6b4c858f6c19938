"""Forms of training for `pretended_training_worker.py`: each a draft, its data, and arguments of a run."""

import torch
from datasets import Dataset
from peft import LoraConfig
from plain_varlen import plain_varlen
from tiny import random_chats, tiny_eagle1_pair, tiny_pair
from tiny_blocks import tiny_block_pair
from tiny_mla import tiny_mla_pair
from tiny_tokenizer import word_tokenizer
from tiny_vision import CHATS, tiny_vision_model, vision_processor, write_records
from torch.utils.data import IterableDataset
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from hf_eagle import FrozenTarget
from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.packing import pack_dataset
from hf_eagle.data.vision_dataset import build_vision_dataset
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle3.configuration import EagleConfig
from hf_eagle.drafts.vocabulary import VocabularyMapping
from hf_eagle.store.cache import fill, open_cache


STEPS, ROWS = 3, 2  # of a run, and of a batch
NARROWEST = 8  # heads that the pretended device's attention takes: those of these drafts, where a GPU wants 16
PADDED = Dataset.from_list(random_chats(STEPS * ROWS, seed=0))
EVEN = Dataset.from_list([{"input_ids": x["input_ids"][:8], "loss_mask": x["loss_mask"][:8]} for x in PADDED])
PACKED = pack_dataset(Dataset.from_list(random_chats(50, seed=0)), 64).select(range(STEPS * ROWS))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(PADDED)


FLASH = "plain_flash"  # by this name a target is asked as `flash_attention_2` is


def flash_attention(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, max_length_q=None, **others
):
    """As the kernels of `flash-attn`, to which transformers hands where documents begin; if not, each row is one."""
    batch, _, length, _ = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = length * torch.arange(batch + 1, device=query.device).int(), length
    rows = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value))
    where = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    attended = plain_varlen(*rows, *where, scale=scaling, window_size=(-1, 0), enable_gqa=True)
    return attended.unflatten(0, (batch, length)), None


AttentionInterface.register(FLASH, flash_attention)
AttentionMaskInterface.register(FLASH, flash_attention_mask)


def eagle3(data=PADDED, vocabulary=40, draft=None, peft=None, own_attention="sdpa", attention=None, **args):
    def parts(folder):
        pair = target, made = tiny_pair(vocabulary, **(draft or {}))
        made.set_attn_implementation(own_attention)  # `new_draft` sets its default, whatever the config says
        if attention is not None:
            target.model.config._attn_implementation = attention  # past the search for a package of this name
        return {"pair": pair, "data": data, "peft_config": peft}

    return parts, {"ttt_steps": 3, **args}


def eagle1(data=PADDED, **args):
    return lambda folder: {"pair": tiny_eagle1_pair(), "data": data}, args


def latent(data=PADDED):
    return lambda folder: {"pair": tiny_mla_pair(), "data": data}, {"ttt_steps": 3}


def dflash(data=PADDED, peft=None, attention="sdpa", fields=(), **args):
    def parts(folder):
        pair = _, draft = tiny_block_pair(fields=fields, draft_num_layers=2)
        draft.set_attn_implementation(attention)
        return {"pair": pair, "data": data, "peft_config": peft}

    return parts, {"num_anchors": 4, **args}


def stored(dtype="float32", make=tiny_pair):
    def parts(folder):
        pair = target, draft = make()
        draft.attach(target)
        asked = {"tap_ids": draft.config.tap_ids, "max_length": 64, "dtype": dtype}
        cache = open_cache(folder, target, word_tokenizer(96, 2), [PADDED], write=True, **asked)
        fill(cache, target, [PADDED], EagleDataCollator(0), ROWS)
        cache.lock.release()
        return {"pair": pair, "data": PADDED, "feature_cache": cache}

    return parts, {"ttt_steps": 3} if make is tiny_pair else {}


def pictures(chats, rope="mrope", embeddings="token"):
    def parts(folder):
        target, processor = FrozenTarget(tiny_vision_model("qwen3-vl")), vision_processor("qwen3-vl")
        torch.manual_seed(1)
        ids = torch.randperm(target.vocab_size)[:200]
        fields = {"rope": rope, "image_embeddings": embeddings, "initializer_range": 0.2}
        config = EagleConfig.from_target(target.model.config, len(ids), **fields)
        draft = new_draft(config, target.embedding_weight(), VocabularyMapping.from_token_ids(ids, target.vocab_size))
        data = build_vision_dataset(write_records(folder, chats * ROWS), processor)
        return {"pair": (target, draft), "data": data, "data_collator": EagleDataCollator.of(processor)}

    return parts, {"ttt_steps": 3, "oov_rows": "renormalize"}


# where the target has one kernel for all documents, as GPUs have it in half precision
ONE_KERNEL = ("EAGLE-3, one kernel for all documents", "EAGLE-3, one kernel for padded rows")
FORMS = {
    "EAGLE-3, padded": eagle3(),
    "EAGLE-3, packed": eagle3(PACKED),
    "EAGLE-3, rows of one length": eagle3(EVEN),
    "EAGLE-3, a stream": eagle3(Stream()),
    "EAGLE-3, whole vocabulary, padded": eagle3(vocabulary=None),
    "EAGLE-3, whole vocabulary, packed": eagle3(PACKED, None),
    "EAGLE-3.1, normed taps": eagle3(draft={"fc_norm": True, "norm_output": True}),
    "EAGLE-3, accumulated": eagle3(gradient_accumulation_steps=2, num_train_epochs=2),
    "EAGLE-3, lk_alpha": eagle3(loss="lk_alpha"),
    "EAGLE-3, lk_lambda, packed": eagle3(PACKED, loss="lk_lambda"),
    "EAGLE-3, rows outside kept": eagle3(oov_rows="renormalize"),
    "EAGLE-3, reference rows": eagle3(supervision="reference"),
    "EAGLE-3, LoRA": eagle3(peft=LoraConfig(r=4)),
    "EAGLE-3, LoRA on the head, packed": eagle3(PACKED, peft=LoraConfig(r=4, target_modules=["fc", "lm_head"])),
    "EAGLE-3, LoRA behind attention": eagle3(peft=LoraConfig(r=4, target_modules=["down_proj"])),
    "EAGLE-3, gradient checkpointing": eagle3(gradient_checkpointing=True),
    "EAGLE-3, eager": eagle3(own_attention="eager"),
    "EAGLE-3, heads too narrow, packed": eagle3(PACKED, draft={"head_dim": NARROWEST // 2}),
    "EAGLE-3, one kernel for all documents": eagle3(PACKED),
    "EAGLE-3, one kernel for padded rows": eagle3(),
    "EAGLE-3, flash attention, packed": eagle3(PACKED, attention=FLASH),
    "latent attention, padded": latent(),
    "latent attention, packed": latent(PACKED),
    "EAGLE-1, padded": eagle1(),
    "EAGLE-1, noise, packed": eagle1(PACKED, feature_noise="uniform"),
    "EAGLE-1, gradient checkpointing": eagle1(gradient_checkpointing=True),
    "DFlash, padded": dflash(),
    "DFlash, packed": dflash(PACKED),
    "DFlash, a stream": dflash(Stream()),
    "DFlash, label": dflash(loss="label"),
    "DFlash, dpace, packed": dflash(PACKED, loss="dpace"),
    "DFlash, accumulated": dflash(gradient_accumulation_steps=2, num_train_epochs=2),
    "DFlash, LoRA": dflash(peft=LoraConfig(r=4)),
    "DFlash, gradient checkpointing": dflash(gradient_checkpointing=True),
    "DFlash, eager": dflash(attention="eager"),
    "DFlash, heads too narrow, packed": dflash(PACKED, fields={"head_dim": NARROWEST // 2}),
    "EAGLE-3, stored": stored(),
    "EAGLE-3, stored in 8 bits": stored("float8"),
    "EAGLE-1, stored": stored(make=tiny_eagle1_pair),
    "DFlash, stored": stored(make=tiny_block_pair),
    "pictures and films": pictures(CHATS),
    "pictures, embedded": pictures(CHATS[:1] * 4, "1d", "vision"),
    "a target with pictures, text": pictures(CHATS[1:2] * 4),
}
