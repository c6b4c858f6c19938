"""The head of drafts that propose with their target's: lent, frozen, and never saved."""

import torch
from torch import nn

from ..targets.architectures import logit_transform
from ..targets.few_rows import few_rows_linear


class LentHead(nn.Linear):
    """The target's head without its bias, if any, since the servers run drafts without one.

    Attributes:
        transform: what follows the projection (scale, soft cap), `None` for nothing.
    """

    def __init__(self, config):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        plain = config.logit_scale is None and config.final_logit_softcapping is None
        self.transform = None if plain else logit_transform(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = few_rows_linear(hidden, self.weight)  # only decoding comes here, without gradients
        return logits if self.transform is None else self.transform(logits)


class WithLentHead:
    """For a draft whose `lm_head` is a [`LentHead`]; name it before the draft's base class."""

    _keys_to_ignore_on_save = ["embed_tokens.weight", "lm_head.weight"]
    _keys_to_ignore_on_load_missing = [r"^embed_tokens\.weight$", r"^lm_head\.weight$"]

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def attach(self, target) -> None:
        """Use what a [`FrozenTarget`] lends its draft and is never saved: its embeddings and its head.

        Raises:
            ValueError: if the draft was made for another target.
        """
        super().attach(target)
        embedding, head = target.embedding_weight(), target.head_weight()
        self.set_target_head(self.embed_tokens.weight if head is embedding else head)

    def set_target_head(self, weight: torch.Tensor) -> None:
        """Use the target's head; storage is shared if dtype and device are the draft's.

        Args:
            weight: `(vocab_size, hidden)`.

        Raises:
            ValueError: if it belongs to another model.
        """
        wanted = (self.config.vocab_size, self.config.hidden_size)
        if tuple(weight.shape) != wanted:
            raise ValueError(
                f"The target's head is {tuple(weight.shape)} but this draft was made for {wanted}: it belongs to "
                "another target."
            )
        self.lm_head.weight = self._lent(weight)

    take_target_head = set_target_head  # a new draft has no head of its own to initialise

    def freeze(self) -> None:
        super().freeze()
        self.lm_head.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, LentHead):
            # zeros until one is lent, so that `_check_loaded` notices a folder that holds one
            nn.init.zeros_(module.weight)
        else:
            super()._init_weights(module)

    def _check_loaded(self) -> None:
        super()._check_loaded()
        if self.lm_head.weight.any():
            raise ValueError(
                f"This folder holds `lm_head.weight`, but a {type(self).__name__} uses the target's head, and servers "
                "refuse, ignore or use one of its own: remove it if it is a copy of the target's, since a draft with a "
                "head of its own cannot be served alike."
            )
