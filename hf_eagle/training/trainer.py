"""`EagleTrainer`: a `transformers.Trainer` whose `compute_loss` runs a frozen target and unrolls a draft."""

import warnings
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import has_length

from ..arguments.objective import refuse_other_methods
from ..arguments.training import EagleTrainingArguments
from ..data.collators import EagleDataCollator
from ..data.given import look_at
from ..data.streaming import RankStream, empty_batch, keep_rank_stream
from ..drafts.adapters import AdaptedDraft
from ..drafts.configuration_base import DraftConfig
from ..drafts.modeling_base import EaglePreTrainedModel
from ..drafts.vocabulary import tokenizer_fingerprint
from ..store.cache import FeatureCache
from ..targets.architectures import longest_context
from ..targets.media_inputs import MEDIA
from ..targets.target import FrozenTarget
from .acceptance import AcceptanceLengthCallback
from .advice import DataAdvice
from .distributed import shard_draft, wrap_before_evaluation
from .health import HealthMixin
from .launching import asked_to_shard, tell_launch
from .log_lines import print_lines
from .memory import LESS_OF_TARGET, MemoryMixin, explained
from .order import Dealing, check_dealt, drawn
from .saving import SavingMixin
from .stalls import StallMixin
from .step import OWN_COLUMNS, EpochOfPlans, PlanningCollator, TrainingStep
from .stopping import StoppingMixin
from .stream_place import StreamPlace
from .totals import StepTotals
from .watch import runs_ahead


class EagleTrainer(MemoryMixin, StallMixin, StoppingMixin, SavingMixin, HealthMixin, Trainer):
    """Trains a draft on the features of a frozen target.

    The target is a plain attribute: it is neither saved, optimised, wrapped nor cast. Losses are sums over supervised
    rows, divided once by the count over the whole accumulated global batch. So accumulation and the number of ranks do
    not change the gradient.

    Args:
        model ([`LlamaForCausalLMEagle3`] or [`LlamaForCausalLMEagle`]): the draft, with its vocabulary mapping set.
        args ([`EagleTrainingArguments`]): arguments.
        target ([`FrozenTarget`]): the target; the draft's config sets its taps.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the target's tokenizer, for padding, and for the check
            that the draft's vocabulary was made with it.
        peft_config ([`~peft.LoraConfig`], *optional*): train this adapter on the draft instead of the draft, and save
            the draft with the adapter merged in, see [`AdaptedDraft`].
        feature_cache ([`FeatureCache`], *optional*): gives features instead of the target, whose head is still needed.
        kwargs: as for `Trainer`. `train_dataset` has the columns `input_ids` and `loss_mask`; a stream must be one
            that all ranks read in the same order, or a [`RankStream`] of this rank's own examples.

    Raises:
        ValueError: if draft, target and tokenizer do not belong together, or an argument is for another kind of draft.

    Example:
        >>> trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=chats)
        >>> trainer.train()
    """

    def __init__(
        self,
        model: EaglePreTrainedModel,
        args: EagleTrainingArguments,
        target: FrozenTarget,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator=None,
        peft_config: PeftConfig | None = None,
        feature_cache: FeatureCache | None = None,
        **kwargs: Any,
    ):
        if "features" in kwargs:
            warnings.warn("`features` is now called `feature_cache`; version 0.2 takes only that.", FutureWarning, 2)
            feature_cache = kwargs.pop("features")

        _check_fit(model, target, processing_class)
        refuse_other_methods(model.kind, args)
        training = model.kind.part("training").training_for(args, model.config)

        if processing_class is not None:
            model.config.tokenizer_fingerprint = tokenizer_fingerprint(processing_class)

        # a collator of the user's own may read other columns
        self._looked_at = partial(look_at, longest=longest_context(target.config), by_columns=data_collator is None)
        kwargs |= {name: self._looked_at(x, name) for name, x in kwargs.items() if name.endswith("_dataset")}

        if data_collator is None:
            data_collator = EagleDataCollator.of(processing_class)

        if peft_config is not None:
            if asked_to_shard(args):  # merging and resuming need whole tensors
                raise ValueError("`use_peft` cannot train a sharded draft: leave out `fsdp`.")
            model = AdaptedDraft(model, peft_config)

        self.feature_cache = feature_cache
        if feature_cache is not None:
            _check_stored(model.config)
            data_collator = feature_cache.collator(data_collator)

        seed = args.seed if args.data_seed is None else args.data_seed
        # every evaluation draws the same
        ahead = target.ask_ahead if feature_cache is None else None
        self._held_out_plans = PlanningCollator(data_collator, training, seed, target, ahead)
        self._plans = PlanningCollator(data_collator, training, seed, target, ahead)

        self.tokenizer_of_records = processing_class
        # Trainer gets no tokenizer: it would rewrite the draft's special ids from it. If one rank sends batches to the
        # others, these hold only tensors, and are planned on arrival
        dispatched = args.accelerator_config.dispatch_batches
        if args.dataloader_pin_memory and runs_ahead(args.device):
            args.accelerator_config.non_blocking = True  # or each column of a batch waits for the step before
        super().__init__(model=model, args=args, data_collator=data_collator if dispatched else self._plans, **kwargs)

        # `compute_loss` divides by the count over all parts of a step: `Trainer` must not divide by their number too
        self.model_accepts_loss_kwargs = True

        print_lines(self)
        tell_launch(self)
        self._passes = EpochOfPlans(self._plans)
        self.add_callback(self._passes)
        self.add_callback(DataAdvice(self))

        if self.args.n_gpu > 1:
            raise ValueError("Several GPUs need one process each: start with `torchrun` or `accelerate launch`.")
        check_dealt(self.args)

        self._share_stream()
        if feature_cache is not None:
            self.add_callback(feature_cache)

        self._take_target(target, model)
        self.step = TrainingStep(self.target, training, torch.bfloat16 if args.bf16 else torch.float32, feature_cache)
        self._train_totals = StepTotals()
        self._eval_totals = StepTotals()
        self._dealing: Dealing | None = None
        self._held_out_dealing: Dealing | None = None

    def _take_target(self, target: FrozenTarget, model: EaglePreTrainedModel) -> None:
        """Move the target to this process's device, check what it teaches, and give the draft what is lent."""
        with explained("while the target was moved to the device", LESS_OF_TARGET):
            self.target = target.to(self.args.device)

        self.target.tap_ids = model.config.tap_ids
        if self.feature_cache is None:  # else the target may have lost its layers; the store's writer compared it
            self.target.check()

        model.attach(target)
        if self.is_fsdp_enabled:
            shard_draft(model, self.accelerator)

    # ---- one batch ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ):
        """Loss of one batch, weighted over TTT steps: each step's sum divided by its count of supervised rows.

        Args:
            num_items_in_batch: `(steps,)` rows of the whole accumulated global batch; this batch's own if `None`.

        Raises:
            FloatingPointError: if the loss, or the gradient before it, is NaN or infinite; on a device, those of the
                batch before.
            ValueError: if a stream gave no supervised row for too long.
        """
        self.catch_up()
        output, counts = self.step(
            model,
            inputs,
            draft=self.accelerator.unwrap_model(model),
            total=num_items_in_batch,
            processes=self.accelerator.num_processes,
            draw=self._plans.draw,
        )

        loss = output.loss
        self.look_at(loss, inputs, num_items_in_batch)  # first: a run may end there, before this batch counts
        totals = self._train_totals if self.model.training else self._eval_totals
        counted = {} if output.leading is None else {"leading": output.leading}
        totals.add(loss=output.loss_sums, correct=output.correct, rows=counts, **counted, **(output.parts or {}))
        return (loss, output) if return_outputs else loss

    def _count_rows(self, batches: list, device: torch.device) -> torch.Tensor:
        """Supervised rows of this rank's batches at each step, `(steps,)`."""
        counts = torch.zeros(self.step.training.steps, dtype=torch.long, device=device)
        for batch in batches:
            batch["plan"] = self.step.plan(batch, self._plans.draw)  # the collator may not have planned
            counts += batch["plan"].counts.to(device, non_blocking=True)

        return counts

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        return self._summed(self._count_rows(batch_samples, device))

    def _summed(self, counts: torch.Tensor) -> torch.Tensor:
        """Counts, summed over ranks; the reduction also shows whether a rank was asked to stop."""
        return self.without_flags(self.accelerator.reduce(self.with_flags(counts), reduction="sum"))

    def _set_signature_columns_if_needed(self):
        # the target's forward takes the collator's columns; drop only what neither uses
        if self._signature_columns is None:
            names = ("input_ids", "attention_mask", "position_ids", "labels", "document_lengths")
            self._signature_columns = [*names, "media", "media_fingerprint", *MEDIA, *OWN_COLUMNS]

    # ---- streams ----

    def _share_stream(self) -> None:
        """Give each rank its own examples of a stream.

        Raises:
            ValueError: if several ranks evaluate on a stream, or if one rank must read it for all.
        """
        ranks = self.args.world_size
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if ranks > 1 and any(isinstance(data, IterableDataset) for data in held_out):
            raise ValueError(
                "`eval_dataset` is a stream, whose end the ranks would reach at different batches: give a "
                "`datasets.Dataset`."
            )

        if not isinstance(self.train_dataset, IterableDataset):
            return
        if self.args.accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches` is true in `accelerator_config`, but each rank reads a stream itself: leave it out."
            )
        if not isinstance(self.train_dataset, RankStream):
            self.train_dataset = RankStream(self.train_dataset, self.args.process_index, ranks)
        self.stream_place = StreamPlace.beginning(self.train_dataset, self.args, self._train_batch_size)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        """As in `Trainer`, but take the place in a stream from the checkpoint: `Trainer` cannot count its passes."""
        resume, steps = resume_from_checkpoint, num_update_steps_per_epoch
        passes, batches = super()._init_training_state(max_steps, steps, num_train_epochs, resume, trial)

        if isinstance(self.train_dataset, RankStream):
            place = StreamPlace.beginning(self.train_dataset, self.args, self._train_batch_size)
            if resume is not None:
                a_pass = steps if has_length(self.train_dataset) else None
                place.go_on_from(resume, a_pass, from_its_beginning=self.args.ignore_data_skip)

            self.stream_place = place
            passes, batches = place.number, place.steps * self.args.gradient_accumulation_steps
            if place.workers < 2:  # else the rows to skip are known only when they are read
                self.train_dataset.pass_over(passes, batches * self._train_batch_size)
        self._passes.next = passes
        return passes, batches

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`, but each example of a stream goes to one rank, and is read once a pass."""
        loader = super().get_train_dataloader()
        if isinstance(self.train_dataset, RankStream):
            return keep_rank_stream(loader)
        self._dealing = Dealing.of(loader, self.args)
        return loader

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        return drawn(super()._get_train_sampler(train_dataset), lambda: self._plans.draw, self._rows_per_step)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """As in `Trainer`, but rows that only fill up the last batches of a pass do not count.

        For a stream, all ranks get equally many batches, empty ones where a rank has run out. A pass ends when no rank
        has a batch left, which the ranks learn from the reduction of the row counts.
        """
        batches = list(islice(epoch_iterator, num_batches))
        if not isinstance(self.train_dataset, RankStream):
            if self._dealing is not None and self.accelerator.gradient_state.end_of_dataloader:
                batches = self._dealing.end_of_pass(batches)
            return batches, self._get_num_items_in_batch(batches, device)

        counts = self._count_rows(batches, device)
        counts = torch.cat([counts, counts.new_full((1,), len(batches))])
        counts = self._summed(counts)
        self.stop_in_front_of_step()  # the sums are read here anyway, and the stream's place is still before this step

        # one rank alone knows without asking the device
        if not batches and (self.args.world_size == 1 or counts[-1] == 0):
            self.control.should_epoch_stop = True
            self.stream_place.end_pass()
            return [], counts[:-1]

        self.stream_place.take_step(self._plans.draw.epoch)  # before anything is saved
        # only whole steps: Trainer would carry the gradient of half a step into the next pass
        return batches + [empty_batch(device) for _ in range(num_batches - len(batches))], counts[:-1]

    # ---- evaluation and logging ----

    def get_eval_dataloader(self, eval_dataset=None):
        """As in `Trainer`, with the same plans in every epoch."""
        if not isinstance(eval_dataset, str):  # the name of one that was looked at
            eval_dataset = self._looked_at(eval_dataset, "eval_dataset")
        return self._planned_alike(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As in `Trainer`, with the same plans in every epoch."""
        return self._planned_alike(super().get_test_dataloader, self._looked_at(test_dataset, "test_dataset"))

    def _planned_alike(self, make_loader, dataset):
        if self.data_collator is not self._plans:  # the user's own, whose batches the step plans
            return make_loader(dataset)
        self.data_collator = self._held_out_plans
        try:
            return make_loader(dataset)
        finally:
            self.data_collator = self._plans

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Compute only the loss: decoding judges what a draft predicts."""
        inputs = self._prepare_inputs(inputs)
        if self._held_out_dealing is not None:
            inputs = self._held_out_dealing.without_filler(inputs, next(self._held_out_places))

        # `without_filler` may have dropped the collator's plan
        inputs["plan"] = self.step.plan(inputs, self._held_out_plans.draw)

        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """As in `Trainer`, plus the loss over all supervised rows, accuracies and the estimated acceptance length."""
        wrap_before_evaluation(self)
        self._eval_totals = StepTotals()
        self._held_out_dealing, self._held_out_places = Dealing.of(dataloader, self.args), count()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)

        metrics = self.held_out_metrics(self._eval_totals)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, AcceptanceLengthCallback):  # so that early stopping and the best model see it
                metrics["acceptance_length"] = round(callback.measure(), 4)

        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add per-step accuracy, estimated acceptance length and supervised rows per second to a training log."""
        if "loss" in logs and self._train_totals.sums:
            metrics = self._train_totals.metrics(self.accelerator, self.step.training)
            metrics.pop("loss", None)  # Trainer's own is a mean over the same steps
            logs.update(metrics)
            self._train_totals = StepTotals()

        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        """As in `Trainer`, see [`SavingMixin.train`]."""
        if self.train_dataset is None:
            raise ValueError(
                "`train_dataset` is None, so there is nothing to train on: give `EagleTrainer` a `datasets.Dataset`."
            )
        self._train_totals = StepTotals()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.target.forget_asked()


def _check_stored(config: DraftConfig) -> None:
    if config.image_embeddings != "token":
        raise ValueError(
            f"`image_embeddings` is {config.image_embeddings}, which a `feature_store` does not hold: leave out one of "
            "the two."
        )


def _check_fit(draft, target: FrozenTarget, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if isinstance(draft, PeftModel):
        raise ValueError("`model` has an adapter already: pass the draft itself, and the adapter as `peft_config`.")

    config = draft.config
    if config.tap_ids is None:
        raise ValueError("The draft's config names no taps: set `eagle_aux_hidden_state_layer_ids`.")
    sizes = (config.vocab_size, config.target_hidden_size)
    if sizes != (target.vocab_size, target.hidden_size):
        raise ValueError(
            f"The draft was made for a target with vocabulary {sizes[0]} and hidden size {sizes[1]}, this target has "
            f"{target.vocab_size} and {target.hidden_size}."
        )

    if tokenizer is None:
        return
    made_with, this = config.tokenizer_fingerprint, tokenizer_fingerprint(tokenizer)
    if made_with not in (None, this):
        raise ValueError(
            f"The draft's vocabulary mapping was made with another tokenizer (fingerprint {made_with}, this one has "
            f"{this}): use that tokenizer, or start a new draft."
        )
