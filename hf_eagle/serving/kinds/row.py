"""The form of a row in the table of kinds: what the servers make of one kind of draft."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..draft_folder import DraftFolder, Finding, TargetFacts
from ..mending import Draft
from ..served_math import ServedDraft


FolderRule = Callable[[DraftFolder], Iterable[Finding]]
ServerRule = Callable[[DraftFolder, TargetFacts | None], Iterable[Finding]]


@dataclass(frozen=True)
class Served:
    """How one server runs a kind of draft.

    Attributes:
        name: what the server calls it: `method` of vLLM's speculative config, SGLang's `--speculative-algorithm`.
        rules: find what keeps it from running a folder as it was trained, in the order of the report.
        options: SGLang's other options, from the number of tokens that are drafted in a round.
    """

    name: str
    rules: tuple[ServerRule, ...]
    options: Callable[[int], str] = lambda count: (
        f"--speculative-num-steps {count} --speculative-eagle-topk 1 --speculative-num-draft-tokens {count + 1}"
    )


@dataclass(frozen=True)
class ServedKind:
    """A kind of draft as servers know it.

    Attributes:
        name: of the row.
        kind: hf_eagle's name of the kind, which may have several rows.
        tells: whether a folder holds such a draft.
        vllm, sglang: the servers.
        folder_rules: what every reader relies on.
        value_rules: the same, for what only reading all tensors shows.
        mathematics: what vLLM computes with it.
        mending: steps that mend a draft, in their order.
        label: what a card calls it, from `config.json`.
        citation: the paper, in BibTeX.
        drafted: how many tokens it was trained to draft in a round, from `config.json`; `None` if any number will do.
        others: rules of readers that are no servers; their findings follow those of the servers.
        converted: what vLLM makes of a folder in the form of its speculators, which no other reader takes.
        in_python: the lines of Python that generate with a folder in transformers alone, from target and draft; `None`
            if transformers does not take it.
        windowed: whether the servers run it with a sliding window: vLLM by two keys of config.json, SGLang by a flag.
    """

    name: str
    kind: str
    tells: Callable[[DraftFolder], bool]
    vllm: Served
    sglang: Served
    folder_rules: tuple[FolderRule, ...]
    value_rules: tuple[FolderRule, ...]
    mathematics: type[ServedDraft]
    mending: tuple[Callable[[Draft], None], ...]
    label: Callable[[Mapping[str, object]], str]
    citation: str
    drafted: Callable[[Mapping[str, object]], int | None] = lambda config: None
    others: tuple[ServerRule, ...] = ()
    converted: tuple[FolderRule, ...] = ()
    in_python: Callable[[Mapping[str, object], str, str], str | None] = lambda config, target, draft: None
    windowed: bool = False
