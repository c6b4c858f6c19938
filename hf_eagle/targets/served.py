"""A target that a server runs: its features come from there, and only its ends are loaded here.

A stock vLLM with the connector of `serving/connector` is such a server; page `served_targets` says how it is started.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.collators import mark_padding
from .asked_ahead import AskedAhead
from .decoder_parts import DecoderParts
from .ends import load_ends
from .feature_client import HOW_TO_START, FeatureClient, FeaturesRefused, Server
from .feature_files import Document, Told
from .features import TargetFeatures, at_indices
from .packed_attention import Segments
from .target import FrozenTarget


logger = logging.getLogger(__name__)

_PROBES, _LONGEST_PROBE = 16, 12
# rounding lets near-ties fall otherwise, one in nine of random tokens in bfloat16
_DISAGREE = 0.25
_PATIENCE = 10.0  # seconds that the end of a training waits for requests that nobody needs any more


class ServedTarget(FrozenTarget):
    """A [`FrozenTarget`] whose layers run in a server. Its embedding, final norm and head are here, as drafts use them.

    Every document of a batch is a request of its own; padding is not sent. The servers compute what they serve: of a
    quantised model, a draft learns the states of the quantised weights.

    The first call compares each server with the target, see `check`.

    Args:
        model (`PreTrainedModel`): of [`load_ends`].
        client ([`FeatureClient`], *optional*): of the servers; without one, all features must come from a store.
        tap_ids (`list[int]`, *optional*): as for [`FrozenTarget`].
        revision (`str`, defaults to `"main"`): of the model on the Hub.

    Example:
        >>> target = ServedTarget.from_server("Qwen/Qwen3-32B", ["http://node7:8000"], "/shared/features")
        >>> trainer = EagleTrainer(draft, args, target, train_dataset=chats)
    """

    runs_here = False

    def __init__(
        self,
        model: PreTrainedModel,
        client: FeatureClient | None = None,
        tap_ids: list[int] | None = None,
        revision: str = "main",
    ):
        super().__init__(model, tap_ids)
        self.client, self._revision, self._checked = client, revision, False
        self._told: Told | None = None
        self._ahead = AskedAhead(self._ask)

    @classmethod
    def from_server(
        cls,
        name_or_path: str,
        urls: Sequence[str] = (),
        features_folder: str | Path | None = None,
        tap_ids: list[int] | None = None,
        dtype: str | torch.dtype = "auto",
        server_model: str | None = None,
        api_key: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
        revision: str = "main",
    ) -> "ServedTarget":
        """Find the target on its servers, and load its ends.

        Args:
            name_or_path, tap_ids, dtype, trust_remote_code, revision: as for [`FrozenTarget.from_pretrained`]; `dtype`
                must be the server's.
            urls, features_folder, server_model, api_key, token: as for [`FeatureClient`]. Without `urls`, all features
                must come from a store.

        Raises:
            OSError, ValueError: if a server does not answer, or serves another model.
        """
        client = None
        if urls:
            client = FeatureClient(urls, features_folder, str(name_or_path), server_model, api_key, token)
        ends = load_ends(name_or_path, dtype, revision, trust_remote_code)
        size = sum(x.numel() * x.element_size() for x in ends.parameters())
        logger.info("Of the target, only embedding, final norm and head are loaded: %.2f GiB.", size / 2**30)
        return cls(ends, client, tap_ids, revision)

    @staticmethod
    def _parts_of(model: PreTrainedModel) -> DecoderParts:
        return model.ends

    def check(self) -> None:
        """Ask each server for a few short documents, once, and compare what it says of itself and what it predicts.

        Raises:
            FeaturesRefused: for other layers, sizes or numbers than this target's, or if the server's own next tokens
                are not those of this target's head.
        """
        if not self._checked and self.client is not None:
            for server in self.client.servers:
                self._check_server(server)
            self._checked = True

    def _ask(self, ids: list[int]) -> "Future[Document]":
        if self.client is None:
            raise ValueError("This target has no server to ask for features: give `target_url`.")
        return self.client.ask(ids)

    @torch.no_grad()
    def features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        segments: Segments | None = None,
        **inputs: Any,
    ) -> TargetFeatures:
        """As [`FrozenTarget.features`], of plain text, and without a cache.

        Raises:
            ServerGone: if the servers do not answer any more.
            ValueError: for media, a cache, a mask that is not of padding, or positions that do not count tokens.
        """
        given = [name for name, x in inputs.items() if x is not None and x is not False]
        is_of_padding = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
        if given or not (attention_mask is None or is_of_padding):
            seen = given[0] if given else "a 4-D `attention_mask`"
            raise ValueError(
                f"`target_url` serves features of token ids alone, but {seen} came with them: train beside the whole "
                "target, without `target_url`."
            )
        self.check()

        if segments is None:
            segments = Segments.of(mark_padding(documents, attention_mask, like=input_ids))
        if position_ids is not None:
            positions = position_ids.expand_as(input_ids).take(segments.tokens)
            if not torch.equal(positions.long(), segments.position_ids):
                raise ValueError(
                    "`position_ids` do not count each document's tokens from 0, as the server does: leave them out."
                )

        found = [future.result() for future in self._ahead.take(_documents_in(input_ids, segments))]
        for document in found:
            self._check_told(document)
        return at_indices(self._features_of(found), segments.tokens, input_ids.shape)

    def ask_ahead(self, input_ids: torch.Tensor, documents: torch.Tensor) -> None:
        """Begin to ask for a batch that a later call will need; `documents` are negative on padding."""
        self._ahead.add(_documents_in(input_ids, Segments.of(documents)))

    def forget_asked(self) -> None:
        """Drop what was asked ahead, so that no file is left behind."""
        self._ahead.forget(_PATIENCE)

    def told_to_card(self) -> list[str]:
        """What the draft has learned from, as the server said it; nothing if no server was asked."""
        if self._told is None:
            return []
        kind = f"quantised as {self._told.quantization}" if self._told.quantization else "not quantised"
        return [f"The target's hidden states are those of a vLLM that served it in {self._told.dtype}, {kind}"]

    def _features_of(self, found: list[Document]) -> TargetFeatures:
        """Features `(1, tokens, ...)` of documents end to end; servers may give different layers beside these."""
        wanted = [*(self.tap_ids or ()), self.num_layers]
        states = torch.cat([_columns(document, wanted) for document in found]).to(self.device)
        # state N is what enters the final norm
        taps, last = states[:, :-1].flatten(1)[None], self.parts.final_norm(states[:, -1])[None]
        return TargetFeatures(taps=taps if self.tap_ids else None, last_hidden=last)

    # ---- is it this target? ----

    def _check_server(self, server: Server) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, _LONGEST_PROBE + 1, (_PROBES,), generator=generator).tolist()
        probes = [torch.randint(self.vocab_size, (length,), generator=generator).tolist() for length in lengths]
        found = [future.result() for future in [self.client.ask(ids, server) for ids in probes]]
        for document in found:
            self._check_told(document, server)

        last = self._features_of(found).last_hidden[0, torch.tensor(lengths).cumsum(0).to(self.device) - 1]
        ours = self.logits(last).argmax(-1).tolist()
        other = sum(mine != document.next_token for mine, document in zip(ours, found, strict=True))
        if other > _DISAGREE * _PROBES:
            raise FeaturesRefused(
                f"`target_url` {server.address.shown} is not this target: of {_PROBES} documents, the token that it "
                f"predicts next is another than the one that this target's head makes of its states in {other}. Serve "
                f"the model that `target` names, {self.model.name_or_path}."
            )
        self._told = found[0].told
        quantized = f", quantised as {self._told.quantization}" if self._told.quantization else ""
        logger.info("The target's features come from %s%s.", server.address.shown, quantized)

    def _check_told(self, document: Document, server: Server | None = None) -> None:
        """Compare what a file says of its server with this target; a server may be started anew as another."""
        told, shown = document.told, "" if server is None else f" {server.address.shown}"
        wanted = sorted({*(self.tap_ids or ()), self.num_layers})
        missing = [k for k in wanted if k not in told.layer_ids]
        dtype, hidden = str(self.dtype).removeprefix("torch."), document.states.shape[-1]

        if hidden != self.hidden_size:
            problem = f"states of {hidden} numbers, and `target` has {self.hidden_size}: serve the same model"
        elif told.revision not in ("", self._revision):  # a folder has none
            problem = f"revision {told.revision}, and `target_revision` is {self._revision}: name the same"
        elif missing:
            problem = f"the layers {list(told.layer_ids)}, and this run needs {wanted}: {HOW_TO_START}"
        elif told.dtype != dtype:
            problem = (
                f"{told.dtype}, and `target` is {dtype} here: start it with `--dtype {dtype}`, or set `target_dtype` "
                f"to {told.dtype}"
            )
        else:
            return
        raise FeaturesRefused(f"`target_url`{shown} gives {problem}.")


def _columns(document: Document, wanted: list[int]) -> torch.Tensor:
    """The states at these layers; of most servers all, which need not be copied."""
    ids = list(document.told.layer_ids)
    return document.states if ids == wanted else document.states[:, [ids.index(k) for k in wanted]]


def _documents_in(input_ids: torch.Tensor, segments: Segments) -> list[list[int]]:
    """The tokens of each document."""
    ids = input_ids.take(segments.tokens).tolist()
    return [ids[start:end] for start, end in pairwise(segments.bounds)]
