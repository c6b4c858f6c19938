"""Benchmark the whole step on real chats: packed rows against padded batches, the Trainer against a bare loop."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import TrainerCallback

from ..arguments.training import EagleTrainingArguments
from ..data.collators import EagleDataCollator
from ..data.conversations import build_dataset
from ..data.packing import pack_dataset
from ..data.records import load_records
from ..door.inputs import naming
from ..drafts.build import new_draft
from ..drafts.eagle3.configuration import EagleConfig
from ..drafts.vocabulary import VocabularyMapping, count_supervised_tokens
from ..losses.supervision import supervised_steps
from ..targets.loading import load_tokenizer
from ..targets.target import FrozenTarget
from ..training.trainer import EagleTrainer
from . import measures
from .workload import Step


# sequences in a padded batch
_PADDED_ROWS = 8


def measure(args, device: torch.device) -> dict:
    """Seconds and supervised rows a second for `args.num_chats` chats, and the ratio that `args.compare` names."""
    dtype = getattr(torch, args.dtype)
    tokenizer = load_tokenizer(args.target)
    target = FrozenTarget.from_pretrained(args.target, dtype=dtype, device=device)
    with naming("data"):
        everything = build_dataset(load_records([args.data]), tokenizer, args.length)
    data = everything.select(torch.randperm(len(everything))[: args.num_chats].tolist())

    draft = draft_for(target, everything, tokenizer, args).to(device)
    target.tap_ids = draft.config.tap_ids
    new_step = partial(Step, draft, target, args.ttt_steps, None if dtype == torch.float32 else dtype)

    if args.compare == "trainer":
        fast, collator = new_step(), EagleDataCollator.of(tokenizer)
        batches = [fast.planned(batch) for batch in _batches(data, collator, _PADDED_ROWS, device)]
        runs = {
            "bare": partial(_bare_loop, fast, batches, device),
            "trainer": partial(trainer_epoch, draft, target, data, tokenizer, args),
        }
    else:
        runs = _packed_and_padded(new_step, data, tokenizer, args, device)
    medians = measures.alternating_medians(runs, args.repeats)

    rows = supervised_rows(data)  # every way runs the same chats, so the same rows
    rates = {way: rows / sum(m.values()) for way, m in medians.items()}
    first = "bare" if args.compare == "trainer" else "packed"
    result = {"seconds": medians, "supervised_rows_per_second": rates[first], "rows_per_second": rates}
    for way in set(rates) - {first}:
        result[f"rows_per_second_{first}_vs_{way}"] = rates[first] / rates[way]
    return result


def _packed_and_padded(new_step: Callable[..., Step], data, tokenizer, args, device) -> dict[str, Callable]:
    """Epochs of padded batches and of packed rows, and a plain one if `args.compare` is `padded`."""
    collator, fast = EagleDataCollator.of(tokenizer), new_step()
    padded = _batches(data, collator, _PADDED_ROWS, device)
    # a packed batch holds about as many tokens as a padded one
    size = max(1, round(_PADDED_ROWS * sum(map(len, data["input_ids"])) / len(data) / args.length))
    packed = _batches(pack_dataset(data, args.length), collator, size, device)

    runs = {
        "padded": partial(_epoch, fast, [fast.planned(batch) for batch in padded], device),
        "packed": partial(_epoch, fast, [fast.planned(batch) for batch in packed], device),
    }
    if args.compare == "padded":  # the plain way: target and draft compute padding and mask it away
        plain = new_step(whole=True)
        masked = [{**plain.planned(batch), "attention_mask": _causal_mask(batch)} for batch in padded]
        runs["plain"] = partial(_epoch, plain, masked, device)
    return runs


def supervised_rows(data) -> int:
    """Number of rows that are supervised at the first step."""
    masks = (torch.tensor([mask]) for mask in data["loss_mask"])
    return sum(int(supervised_steps(mask, torch.zeros_like(mask), 1).sum()) for mask in masks)


def draft_for(target, data, tokenizer, args):
    """A new draft whose vocabulary is counted in `data`, in training mode."""
    size = args.draft_vocab_size
    config = EagleConfig.from_target(target.config, draft_vocab_size=size)
    mapping = None  # the whole vocabulary
    if size is not None:
        counts = count_supervised_tokens(data, config.vocab_size)
        mapping = VocabularyMapping.from_counts(counts, size, tokenizer.all_special_ids)
    return new_draft(config, target.embedding_weight(), mapping, target.head_weight()).train()


def _batches(data, collator, size: int, device) -> list[dict]:
    rows = list(data)
    made = [collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [{name: x.to(device) for name, x in batch.items()} for batch in made]


def _causal_mask(batch: dict) -> torch.Tensor:
    """bool `(batch, 1, length, length)`, as transformers makes it for a padded batch."""
    length = batch["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=batch["input_ids"].device).tril()
    return causal & batch["attention_mask"].bool()[:, None, None]


def _epoch(step: Step, batches: list[dict], device) -> dict[str, float]:
    """Seconds of the target's part of all batches, and of the draft's forward and backward."""
    found = {"target_seconds": 0.0, "draft_seconds": 0.0}
    for batch in batches:
        found["target_seconds"] += measures.seconds(lambda b=batch: step.run_target(b), device)
        found["draft_seconds"] += measures.seconds(lambda b=batch: step.forward(b).backward(), device)
        step.draft.zero_grad(set_to_none=True)
    return found


def _bare_loop(step: Step, batches: list[dict], device) -> dict[str, float]:
    """Seconds of only what the Trainer does with these batches after they are collated and planned."""
    trained = [p for p in step.draft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def loop():
        for batch in batches:
            step.run_target(batch)
            step.forward(batch).backward()
            torch.nn.utils.clip_grad_norm_(trained, 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return {"seconds": measures.seconds(loop, device)}


class _Clock(TrainerCallback):
    """Time from the first step's start to the last one's end, without setup and saving."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        measures.drain(args.device)
        self.seconds = time.perf_counter() - self.begun


def trainer_epoch(draft, target, data, tokenizer, args, feature_cache=None) -> dict[str, float]:
    """Seconds of an epoch in padded batches of 8, from the first step's start to the last one's end."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = EagleTrainingArguments(
            output_dir=str(Path(folder) / "run"),
            ttt_steps=args.ttt_steps,
            bf16=args.dtype == "bfloat16",
            per_device_train_batch_size=_PADDED_ROWS,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            learning_rate=1e-6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )

        # only the steps are timed
        clock = _Clock()
        trainer = EagleTrainer(
            draft,
            arguments,
            target,
            processing_class=tokenizer,
            train_dataset=data,
            feature_cache=feature_cache,
            callbacks=[clock],
        )
        trainer.train()
    return {"seconds": clock.seconds}
