"""Warn, while a draft is trained, of what would make its acceptance low and can be known already.

Nothing here changes or waits for a step. The data are looked at once, before the first one.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import TrainerCallback


logger = logging.getLogger(__name__)

ROWS = 512  # that are looked at, spread over the data
READ_ROWS, READ_TOKENS = 16, 512  # rows that the target reads, and tokens of each
TOKENS = 1000  # supervised tokens from which shares say something
SUPERVISED, MISSING, OWN, GAP = 0.05, 0.05, 0.5, 0.15


@dataclass(frozen=True)
class Look:
    """What a sample of the training data holds.

    Attributes:
        tokens: in the sample.
        supervised: ids of its supervised tokens.
        rows: token ids and mask of the rows that the target may read, each of one conversation.
    """

    tokens: int
    supervised: torch.Tensor
    rows: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def at(cls, data) -> "Look | None":
        """Look at a `datasets.Dataset`; of a stream, or of other data, nothing is known before they are read."""
        if not isinstance(data, Dataset) or not {"input_ids", "loss_mask"} <= set(data.column_names):
            return None
        if "media" in data.column_names or not len(data):
            return None

        count, tokens, supervised, rows = min(ROWS, len(data)), 0, [], []
        for row in data.select([place * len(data) // count for place in range(count)]).with_format(None):
            if (held := _held_in(row)) is None:
                return None
            ids, mask = held
            tokens += len(ids)
            supervised.append(ids[mask])
            first = (row.get("document_lengths") or [len(ids)])[0]  # a packed row holds several conversations
            rows.append((ids[: min(first, READ_TOKENS)], mask[: min(first, READ_TOKENS)]))
        step = max(1, len(rows) // READ_ROWS)
        return cls(tokens, torch.cat(supervised), rows[::step][:READ_ROWS])


def _held_in(row: dict) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Token ids of a row, and which are supervised; `None` for a row that is refused by name once a step reads it."""
    try:
        ids, mask = (torch.as_tensor(row[name]) for name in ("input_ids", "loss_mask"))
    except (OverflowError, RuntimeError, TypeError, ValueError):
        return None
    fits = ids.dim() == 1 and ids.shape == mask.shape and ids.dtype == torch.long
    return (ids, mask > 0) if fits else None  # -100 is not supervised


def warnings_about(look: Look, draft_ids: torch.Tensor | None) -> Iterator[str]:
    """Sentences about the mask and the draft vocabulary, if too little of the data is supervised, or can be proposed.

    Args:
        look: at the data.
        draft_ids: target ids of the draft vocabulary; `None` for the whole vocabulary.
    """
    if len(look.supervised) < SUPERVISED * look.tokens and look.tokens >= TOKENS:
        yield (
            f"Only {len(look.supervised) / look.tokens:.1%} of the tokens are supervised, so most of the work teaches "
            "nothing: look at the masks with `hf-eagle preview --html masks.html`."
        )
    if draft_ids is None or len(look.supervised) < TOKENS:
        return
    missing = 1 - torch.isin(look.supervised, draft_ids.cpu()).float().mean().item()
    if missing > MISSING:
        yield (
            f"The draft vocabulary lacks {missing:.1%} of the supervised tokens, which the draft can never propose: "
            "raise `draft_vocab_size`; `hf-eagle preview` shows what each size holds."
        )


@torch.no_grad()
def warning_about_answers(look: Look, target) -> str | None:
    """A sentence about answers that the target would mostly not give, from reading a few of them."""
    total, same = sum(int(mask[1:].sum()) for _, mask in look.rows), 0
    known = all(((0 <= ids) & (ids < target.vocab_size)).all() for ids, _ in look.rows)
    if total < TOKENS or not known:  # a step refuses other tokens, and says which
        return None

    for ids, mask in look.rows:
        supervised = mask[1:].to(target.device)
        if supervised.any():
            ids = ids.to(target.device)
            said = target.head_summary(target(ids[None]).last_hidden[0, :-1][supervised]).top
            same += int((said == ids[1:][supervised]).sum())

    if same >= OWN * total:
        return None
    return (
        f"The target finds only {same / total:.1%} of the supervised tokens the most probable ones, so the answers are "
        "mostly not its own, and the draft learns what a server never verifies: let the target answer "
        "(`hf-eagle regenerate`)."
    )


def warning_about_gap(trained: float, held_out: float) -> str | None:
    """A sentence about a draft that is much better on its training data, by the accuracies of its first step."""
    if trained - held_out <= GAP:
        return None
    return (
        f"The first step is right at {trained:.1%} of the rows that are trained on, and at {held_out:.1%} of held-out "
        "ones: the draft learns its data by heart. Use more data, or fewer epochs."
    )


class DataAdvice(TrainerCallback):
    """Warns once of each of these; add it to an [`EagleTrainer`], which adds it itself.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._accuracy: float | None = None
        self._said_gap = False

    def on_train_begin(self, args, state, control, **kwargs):
        look = Look.at(self.trainer.train_dataset) if state.is_world_process_zero else None
        if look is None:
            return

        draft = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for told in warnings_about(look, draft.draft_ids):
            logger.warning("%s", told)
        # a sharded target runs on all ranks or none, and with a store it may have no layers
        if self.trainer.target.sharding is None and self.trainer.feature_cache is None:
            if (told := warning_about_answers(look, self.trainer.target)) is not None:
                logger.warning("%s", told)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        self._accuracy = logs.get("accuracy_step_0", self._accuracy)
        held_out = logs.get("eval_accuracy_step_0")
        if held_out is None or self._accuracy is None or self._said_gap or not state.is_world_process_zero:
            return
        if (told := warning_about_gap(self._accuracy, held_out)) is not None:
            self._said_gap = True
            logger.warning("%s", told)
