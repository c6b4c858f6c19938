"""Measure acceptance while a draft is trained, as decoding gives it."""

import logging
from dataclasses import replace

import torch
from transformers import TrainerCallback

from ..decoding.target_run import check_target, why_alone
from ..evaluation.acceptance import DecodingSettings, decode_prompts
from ..evaluation.acceptance_length import acceptance_length
from ..evaluation.prompt_batches import PromptBatch
from ..evaluation.prompts import Prompt
from .distributed import whole_draft
from .memory import explained


logger = logging.getLogger(__name__)

BATCH = 8  # prompts answered and read together


class AcceptanceLengthCallback(TrainerCallback):
    """
    Measure what decoding prompts with the draft accepts, every few steps and at every evaluation, and log the length.

    The target answers the prompts once, alone. A measurement only reads prompts and answers with the target, and counts
    what the draft would have accepted in every round. These are the counts of decoding, see `hf_eagle.decoding.replay`,
    so checkpoints rank as they would by decoding.

    Measurements every `every_steps` steps are logged as `acceptance_length`. Evaluations log `eval_acceptance_length`,
    which `metric_for_best_model="acceptance_length"`, `load_best_model_at_end` and `EarlyStoppingCallback` can use.

    On several ranks each decodes its share of the prompts and the counts are summed, so all ranks get the same number.
    Ranks that together hold one sharded target decode the same share together.

    Args:
        trainer ([`EagleTrainer`]):
            The trainer, whose target and draft decode. Add the callback to it with `trainer.add_callback`.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            The target's; its chat template renders the prompts. Those with images or videos need the processor.
        prompts (`list[Prompt]`):
            What `load_prompts` returns.
        every_steps (`int`, *optional*):
            Optimizer steps between measurements; by default only at evaluations.
        method (`str`, *optional*, defaults to `"chain"`):
            `"chain"`, or `"tree"` for EAGLE-2's dynamic draft tree of the default shape; both greedy.
        num_speculative_tokens (`int`, *optional*):
            Chain: K, the tokens drafted per round; by default what the draft's config says, see `chain_length`.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            The longest answer, in tokens.
        batch_size (`int`, *optional*):
            Prompts answered and read together; by default 8, or 1 for a target that can decode only one at a time.
        template_kwargs (`dict`, *optional*):
            Further arguments of the chat template, as in training: `{"enable_thinking": False}`.

    Raises:
        `ValueError`: no prompts, a value out of range, a prompt that cannot be rendered, settings that never measure,
            or a target that cannot verify drafts of this method.

    Example:
        >>> prompts = load_prompts("assets/prompts/mt_bench.jsonl", limit=16)
        >>> trainer.add_callback(AcceptanceLengthCallback(trainer, tokenizer, prompts, every_steps=500))
    """

    def __init__(
        self,
        trainer,
        tokenizer,
        prompts: list[Prompt],
        *,
        every_steps: int | None = None,
        method: str = "chain",
        num_speculative_tokens: int | None = None,
        max_new_tokens: int = 64,
        batch_size: int | None = None,
        template_kwargs: dict | None = None,
    ):
        if not prompts:
            raise ValueError("`prompts` is empty; give at least one prompt to measure acceptance on.")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"`every_steps` must be at least 1, but is {every_steps}.")
        if every_steps is None and trainer.args.eval_strategy == "no":
            raise ValueError(
                "`every_steps` is unset and `eval_strategy` is 'no', so acceptance would never be measured; set one of "
                "them."
            )

        settings = DecodingSettings(
            method=method,
            num_speculative_tokens=num_speculative_tokens,
            max_new_tokens=max_new_tokens,
            batch_size=BATCH if batch_size is None else batch_size,
        )

        # on every rank, and before any step
        branches = settings.shape.tree
        if batch_size is None and (told := why_alone(trainer.target, branches)) is not None:
            logger.info("%s", told)
            settings = replace(settings, batch_size=1)
        check_target(trainer.target, needs_masks=branches or settings.batch_size > 1, branches=branches)
        self.settings = settings

        for prompt in prompts:
            # on every rank, so that none fails alone
            PromptBatch.of([prompt], tokenizer, template_kwargs=template_kwargs)

        self.trainer, self.tokenizer, self.prompts, self.every_steps = trainer, tokenizer, prompts, every_steps
        self.template_kwargs = template_kwargs
        self._answers: dict[int, tuple] = {}  # the target's, which never change, by the number of a batch
        self._latest: tuple[int, float] | None = None  # step and value: one measurement a step is enough

    def on_step_end(self, args, state, control, **kwargs):
        if self.every_steps is not None and state.global_step % self.every_steps == 0:
            should_log = control.should_log
            self.trainer.log({"acceptance_length": round(self.measure(), 4)})
            control.should_log = should_log  # any log clears it, and would drop this step's loss

    def on_train_begin(self, args, state, control, **kwargs):
        self._latest = None

    def on_train_end(self, args, state, control, **kwargs):
        self._latest = None  # the best checkpoint may have been loaded

    def measure(self) -> float:
        """Measure the draft's current acceptance length; call this on all ranks at once.

        Raises:
            `ValueError`: if no answer has a second token, so that nothing was drafted.
        """
        step = self.trainer.state.global_step
        if self._latest is None or self._latest[0] != step:
            with explained(f"while acceptance was measured after step {step}", self._advice):
                self._latest = (step, self._replay())
        return self._latest[1]

    def _advice(self) -> str:
        size = self.settings.batch_size
        lower = "a lower `max_new_tokens`" if size == 1 else f"a lower `batch_size` than {size}"
        return f"give `AcceptanceLengthCallback` {lower}, or shorter prompts (`acceptance_prompts`)"

    def _replay(self) -> float:
        accelerator = self.trainer.accelerator
        draft = accelerator.unwrap_model(self.trainer.model)
        part, parts, counting = accelerator.process_index, accelerator.num_processes, True

        sharding = self.trainer.target.sharding
        if sharding is not None:
            part, parts, counting = sharding.replica, sharding.replicas, sharding.member == 0
        share = self.prompts[part::parts]

        training, counts = draft.training, torch.zeros(2, dtype=torch.long, device=accelerator.device)
        with whole_draft(draft):  # all ranks gather it together, also those without a prompt
            if share:
                draft.eval()
                try:
                    runs = decode_prompts(
                        self.trainer.target,
                        draft,
                        self.tokenizer,
                        share,
                        self.settings,
                        teacher_forced=True,
                        answers=self._answers,
                        progress=False,
                        template_kwargs=self.template_kwargs,
                    ).runs
                finally:
                    draft.train(training)

        if share and counting:
            counts[0] = sum(sum(run.accepted_per_position) for run in runs)
            counts[1] = sum(run.drafts for run in runs)
        accepted, drafts = accelerator.reduce(counts, reduction="sum").tolist()

        length = acceptance_length([accepted], [drafts])
        if length is None:
            raise ValueError(
                "The target answered all `prompts` with one token, so nothing was drafted; give different prompts, "
                "or a larger `max_new_tokens`."
            )

        return length
