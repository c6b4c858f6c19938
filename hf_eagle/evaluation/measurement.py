"""How prompts are decoded, and what was decoded of them."""

from dataclasses import dataclass, field, replace

import torch

from ..decoding.checks import DraftShape, chain_length, check_sampling
from .acceptance_length import acceptance_length
from .prompts import Prompt


@dataclass(frozen=True)
class DecodingSettings:
    """How prompts are decoded. The first fields are arguments of `speculative_generate`; `None` means its default.

    Args:
        method, num_speculative_tokens, depth, top_k, total_tokens:
            Which tokens are drafted.
        temperature, top_p, sampling_top_k:
            How the target chooses.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Maximum number of tokens in an answer.
        batch_size (`int`, *optional*, defaults to `1`):
            Prompts that are decoded together.
        turns (`int`, *optional*, defaults to `1`):
            Number of turns that are decoded, if a prompt has several; later turns follow the target's answers.
        draft_window (`int`, *optional*):
            Keys that the draft's attention sees, see `speculative_generate`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of random draws.

    Raises:
        `ValueError`: if a value is out of range, or has no effect in combination with the others.
    """

    method: str = "chain"
    num_speculative_tokens: int | None = None
    depth: int | None = None
    top_k: int | None = None
    total_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    sampling_top_k: int | None = None
    max_new_tokens: int = 64
    batch_size: int = 1
    turns: int = 1
    seed: int = 0
    draft_window: int | None = None

    def __post_init__(self):
        self.shape  # noqa: B018 - refuse bad values here, not at first use
        check_sampling(self.temperature, self.top_p, self.sampling_top_k)
        for name in ("max_new_tokens", "batch_size", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")

    @property
    def shape(self) -> DraftShape:
        return DraftShape.of(*self.drafting().values())

    def for_draft(self, draft) -> "DecodingSettings":
        """The same settings, with the number of tokens that this draft proposes if none was asked for."""
        asked = self.num_speculative_tokens
        return replace(self, num_speculative_tokens=chain_length(draft, self.method, asked))

    def choosing(self, device, batch: int) -> dict:
        """Return the arguments that target and draft share, with a generator for this batch."""
        names = ("temperature", "top_p", "sampling_top_k", "max_new_tokens")
        generator = torch.Generator(device).manual_seed(self.seed + batch) if self.temperature else None
        return {name: getattr(self, name) for name in names} | {"generator": generator}

    def drafting(self) -> dict:
        names = ("method", "num_speculative_tokens", "depth", "top_k", "total_tokens", "draft_window")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PromptRun:
    """One turn of one prompt, decoded with the draft and, if requested, by the target alone."""

    prompt: Prompt
    turn: int
    prompt_token_ids: list[int]
    token_ids: list[int]  # the answer, with the token that ended it
    drafts: int
    accepted_per_position: list[int]
    accepted_by_round: list[int]
    target_token_ids: list[int] | None


@dataclass
class Measurement:
    """All prompts, decoded with one choice of settings, and the seconds this took, including the prompts' forward pass.

    Seconds are summed over batches, as measured in the run that decoded each batch. Replayed answers have none.
    """

    settings: DecodingSettings
    runs: list[PromptRun] = field(default_factory=list)
    seconds: float = 0.0
    rounds: int = 0  # forward passes of the target after those of the prompts, each for a whole batch
    draft_seconds: float = 0.0  # spent on drafting in these rounds
    target_seconds: float = 0.0  # spent in the target's forward passes
    target_only_seconds: float | None = None
    by_batch: list[tuple[float, float | None]] = field(default_factory=list)  # seconds with the draft, and without

    def add(self, decoded: dict, alone: dict | None, prompts: list[Prompt], turn: int, token_ids) -> None:
        """Add a batch's runs and seconds, as `_Decoder` returns them."""
        for name in ("seconds", "rounds", "draft_seconds", "target_seconds"):
            setattr(self, name, getattr(self, name) + decoded[name])

        self.by_batch.append((decoded["seconds"], alone and alone["seconds"]))
        if alone is not None:
            self.target_only_seconds = (self.target_only_seconds or 0.0) + alone["seconds"]

        for row, prompt in enumerate(prompts):
            names = ("answers", "drafts", "accepted_per_position", "accepted_by_round")
            found = [decoded[name][row] for name in names]
            self.runs.append(PromptRun(prompt, turn, token_ids[row], *found, alone and alone["answers"][row]))

    def acceptance_length(self) -> float | None:
        return acceptance_length([sum(r.accepted_per_position) for r in self.runs], [r.drafts for r in self.runs])
