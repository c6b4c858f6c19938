"""The numeric part of the check: compare the logits of hf_eagle's draft and of the restated server."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from ..door.reading import read_part, reading
from ..drafts.build import load_draft
from .draft_folder import DraftFolder, Finding
from .kinds import kind_of
from .served_math import RESTATED_ROPES, ServedDraft


READER = "Logits"
ROWS, STEPS = 12, 3
# relative to the largest logit; both run in float32, so more than rounding is a fault
TOLERANCE = 1e-4


def probe(path: str | Path, target: str | Path, target_config: PreTrainedConfig) -> list[Finding]:
    """Run the draft on random features with the target's embeddings, in hf_eagle's code and as vLLM would.

    Args:
        path: the draft's folder, free of other faults.
        target: folder or Hub id of the target; reads only its embeddings and head.
        target_config: its config.

    Returns:
        A finding if the logits differ; a note if they cannot be compared.

    Raises:
        ValueError: if the target's embeddings cannot be found.
    """
    folder = DraftFolder.read(path)
    rope = folder.config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") not in RESTATED_ROPES:
        text = f"RoPE of type {rope['rope_type']!r} is not covered by this check, so logits were not compared."
        return [Finding(READER, text, "compare acceptance in the server with `hf-eagle evaluate`", level="note")]

    embedding, head = lent_weights(target, target_config)
    served = _served(folder, embedding, head)
    ids, features = _inputs(served.feature_width, len(embedding))

    try:
        ours = _ours(path, _Lender(embedding, head), ids, features)
    except ValueError as problem:
        text = f"hf_eagle cannot load this draft, though the servers can, so logits were not compared ({problem})."
        return [Finding(READER, text, "write a copy with `--fix`, which takes hf_eagle's names", level="note")]

    theirs = _theirs(served, ids, features)
    finite = theirs.isfinite()  # minus infinity marks tokens that cannot be drafted
    if not torch.equal(finite, ours.isfinite()):
        return [Finding(READER, "the server can draft different tokens from hf_eagle.", "restore `d2t`")]
    worst = float((ours - theirs)[finite].abs().max() / theirs[finite].abs().max().clamp_min(1e-9))
    if worst < TOLERANCE:
        return []
    return [
        Finding(
            READER,
            f"hf_eagle and the restated server differ by {worst:.2g} of the largest logit: the draft that was trained "
            "is not the one that is served.",
            "report it, with config.json: the two should agree whatever the weights",
        )
    ]


@dataclass(frozen=True)
class _Lender:
    """What a target lends its draft, `(vocab, hidden)` each."""

    embedding: torch.Tensor
    head: torch.Tensor

    def embedding_weight(self) -> torch.Tensor:
        return self.embedding

    def head_weight(self) -> torch.Tensor:
        return self.head


def _inputs(width: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of all rows and steps, and random features of the rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (ROWS + STEPS,), generator=generator)
    return ids, torch.randn(ROWS, width, generator=generator)


@torch.no_grad()
def _ours(path: str | Path, target: _Lender, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Over the target's vocabulary, from the code that training and evaluation run."""
    draft = load_draft(path, dtype=torch.float32)
    draft.attach(target)
    logits = draft.drafted_logits(ids, features)
    if draft.draft_ids is None:
        return logits

    everything = logits.new_full((len(logits), len(target.embedding)), float("-inf"))
    return everything.index_copy(1, draft.draft_ids, logits)


def _served(folder: DraftFolder, embedding: torch.Tensor, head: torch.Tensor) -> ServedDraft:
    tensors = {name: folder.tensor(name) for name in folder.shapes}
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    return kind_of(folder).mathematics(folder.config, tensors, embedding, head)


@torch.no_grad()
def _theirs(served: ServedDraft, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Over the target's vocabulary, as the server computes them."""
    return served.as_trained(served.drafted_logits(ids, features))


def lent_weights(target: str | Path, config: PreTrainedConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and head `(vocab, hidden)` of a target in float32; reads no other weights.

    Raises:
        ValueError: if they are not found under a known name.
    """
    text = config.get_text_config()
    wanted = (text.vocab_size, text.hidden_size)

    found = {}
    for name, file in _tensor_files(target).items():
        if name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")):
            with reading("target", target), safe_open(file() if callable(file) else file, "pt") as tensors:
                if tuple(tensors.get_slice(name).get_shape()) == wanted:
                    found["head" if name.endswith("lm_head.weight") else "embedding"] = tensors.get_tensor(name).float()

    if "embedding" not in found:
        raise ValueError(
            f"The embeddings {wanted} of `target` {target} were not found in its safetensors files: leave the target's "
            "weights out of the check with `--no_probe`."
        )
    return found["embedding"], found.get("head", found["embedding"])


def _tensor_files(target: str | Path) -> dict:
    """Tensor name -> file, or a function that fetches it."""
    with reading("target", target):
        index = cached_file(str(target), "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        if index is not None:
            names = read_part("target", target, index, {"weight_map": dict[str, str]})["weight_map"]
            return {name: (lambda shard=shard: cached_file(str(target), shard)) for name, shard in names.items()}

        file = cached_file(str(target), "model.safetensors", _raise_exceptions_for_missing_entries=False)
        if file is None:
            raise ValueError(f"`target` {target} holds no safetensors files to read embeddings from.")
        with safe_open(file, "pt") as tensors:
            return dict.fromkeys(tensors.keys(), file)
