"""The facts that a model card shows, about a run and its measurements, as stored in the draft's folder."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path

from ..arguments.sources import MEDIA_LIMITS
from ..door.json_files import check_fields, read_json


logger = logging.getLogger(__name__)

# the facts that a card was made from, stored next to it
FACTS = "card_facts.json"
# fields of an entry of `acceptance_by_context`
_BUCKET = {
    "above": int,
    "up_to": int | None,
    "acceptance_length": float | None,
    "acceptance_length_interval": list[float] | None,
    "drafts": int,
    "num_prompts": int,
    "accepted_per_position": [int],
}
# fields that a card shows of a measurement with our own decoding; `_TREE`: further ones if it used a draft tree
_ACCEPTANCE = {
    "acceptance_length": float | None,
    "accepted_per_position": [int],
    "drafts": int,
    "num_prompts": int,
    "num_speculative_tokens": int,
    "prompts?": str | None,
    "method?": str | None,
    "temperature?": float | None,
    "tokens_per_second?": float | None,
    "target_only_tokens_per_second?": float | None,
    "sweep?": [dict],
    "acceptance_by_context?": [_BUCKET],
    "windows?": [{"window": int | None, "acceptance_by_context": [_BUCKET]}],
    "plot?": str | None,
    "context_plot?": str | None,
}
_TREE = {"total_tokens": int, "depth": int}
# fields that a card shows of a measurement in a server
_ENTRY = {
    "num_speculative_tokens": int,
    "batch_size": int,
    "tokens_per_second": float,
    "speedup": float,
    "acceptance_length": float | None,
}
_SERVING = {
    "entries": [_ENTRY],
    "arguments": {"num_prompts": int, "max_new_tokens": int, "dtype": str, "rounds": int},
    "machine": str,
    "takes_schedule?": bool,
    "prompts?": str | None,
    "plot?": str | None,
}
# headline of a diagnosis
_DIAGNOSIS = {
    "acceptance_length": float,
    "num_prompts": int,
    "prompts?": str | None,
    "acceptance_by_context?": [_BUCKET],
    "vocabulary?": {"missing": float, "missing_by_category": {str: float}, "acceptance_length": float | None},
    "plot?": str | None,
}
_STATISTICS = {
    "conversations": int,
    "tokens": int,
    "supervised_share": float,
    "length?": {str: float},
    "duplicates?": int,
    "coverage?": {str: float},
    "overlap?": {str: {"prompts": int, "prompts_found": int}},
}
# kind of file, `KIND*.json` -> a key that identifies it, and the script that writes it
_MEASURED = {
    "acceptance": ("acceptance_length", "scripts/evaluate_draft.py"),
    "serving": ("entries", "scripts/benchmark_serving.py"),
    "diagnosis": ("headline", "scripts/diagnose_draft.py"),
}


@dataclass
class CardFacts:
    """
    The facts that a card shows. All but the first two may be missing; the card then leaves them out.

    Args:
        name (`str`):
            The draft's name, the card's title.
        target (`str`):
            The target as passed to a server: a Hub id or a folder.
        base_model (`str`, *optional*):
            The target's Hub id, used in a published card's commands. By default `target`, unless that is a folder.
        draft (`str`, *optional*):
            The draft as passed to a server. By default the folder that the card is written to.
        kind (`str`, *optional*):
            hf_eagle's name of the draft's kind. By default read from the checkpoint, among the kinds that servers know.
        tap_ids (`list[int]`, *optional*):
            Entry ids of the tapped layers, if config.json does not hold them in the form that servers read.
        chain_length (`int`, *optional*):
            Tokens that the draft proposes in a round by default, for the commands of a card without measurements.
        title (`str`, *optional*):
            A readable name for a kind that no server is known to run. By default `kind`.
        license (`str`, *optional*):
            The draft's licence, as the Hub spells it; usually the target's.
        license_name, license_link (`str`, *optional*):
            Name and link of a licence that the Hub calls `other`.
        datasets (`list[str]`, *optional*):
            Hub ids of the training data.
        data (`list[str]`, *optional*):
            A sentence for each source of training data: its name, size and licence. Also, if the draft vocabulary was
            filled up with other tokens, a sentence about these.
        data_statistics (`dict`, *optional*):
            All or some of the statistics of the data that scripts/preview_data.py writes with `--output_json`.
        acceptance (`dict[str, dict]`, *optional*):
            From the name of a prompt set to the result of `measure_acceptance` for it, or the output of
            scripts/evaluate_draft.py. `plot` and `context_plot`, if given, name image files of it.
        serving (`dict[str, dict]`, *optional*):
            From the name of a prompt set to the output of scripts/benchmark_serving.py for it; `plot` as above.
        diagnosis (`dict[str, dict]`, *optional*):
            From the name of a prompt set to the `headline` in the output of scripts/diagnose_draft.py for it; `plot` as
            above.
        training (`dict[str, object]`, *optional*):
            Rows of the training table: optimizer steps, time, machine.
        hyperparameters (`dict[str, object]`, *optional*):
            Arguments that differ from their defaults.
        versions (`dict[str, str]`, *optional*):
            From package to version.
        training_plot, history_plot, sweep_plot (`str`, *optional*):
            File names of images in the card's folder: loss and accuracy, acceptance length measured during training,
            speed against the number of drafted tokens.
        card_sha256 (`str`, *optional*):
            Digest of the card rendered from these facts; rendering sets it.
    """

    name: str
    target: str
    base_model: str | None = None
    draft: str | None = None
    kind: str | None = None
    title: str | None = None
    tap_ids: list[int] | None = None
    chain_length: int | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    datasets: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    data_statistics: dict[str, object] = field(default_factory=dict)
    acceptance: dict[str, dict] = field(default_factory=dict)
    serving: dict[str, dict] = field(default_factory=dict)
    diagnosis: dict[str, dict] = field(default_factory=dict)
    training: dict[str, object] = field(default_factory=dict)
    hyperparameters: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    training_plot: str | None = None
    history_plot: str | None = None
    sweep_plot: str | None = None
    card_sha256: str | None = None

    @property
    def media_limits(self) -> dict[str, object]:
        """With which limits images and videos were shown in training, `min_pixels` and its like."""
        return {name: self.hyperparameters[name] for name in MEDIA_LIMITS if name in self.hyperparameters}


def facts_from(given: CardFacts | Mapping, where: str = "`facts`", mend: str = "correct the facts") -> CardFacts:
    """Check facts, so that a card can be rendered from them.

    Args:
        given: the facts, or a mapping of their names.
        where: name of the facts in errors.
        mend: advice in errors, an imperative.

    Raises:
        ValueError: if a fact is unknown, missing or of the wrong type.
    """
    given = asdict(given) if isinstance(given, CardFacts) else given
    try:
        told = json.loads(json.dumps(given))  # in the form in which they are read back
    except (TypeError, ValueError) as problem:
        raise ValueError(f"{where} cannot be written as JSON ({problem}): {mend}.") from problem

    needed = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(CardFacts)}
    forms = {f.name if needed[f.name] else f"{f.name}?": f.type for f in fields(CardFacts)}
    check_fields(told, {}, where, mend)
    if unknown := sorted(set(told) - set(needed)):
        raise ValueError(f"{where} holds {', '.join(unknown)}, which no card shows; it takes: {', '.join(needed)}.")
    check_fields(told, forms, where, mend)

    for kind in _MEASURED:
        for name, found in told.get(kind, {}).items():
            _check_measured(kind, found, f"{where}, `{kind}[{name!r}]`,", mend)
    if told.get("data_statistics"):
        check_fields(told["data_statistics"], _STATISTICS, f"{where}, `data_statistics`,", mend)
    return CardFacts(**told)


def read_facts(folder: str | os.PathLike) -> CardFacts:
    """Return the facts next to a folder's card; raise a `ValueError` with the path if they cannot be read."""
    path, mend = Path(folder) / FACTS, "correct it, or remove it, which leaves the card as it is"
    return facts_from(read_json(path, {}, mend), str(path), mend)


def tell_other_limits(draft: str | os.PathLike, asked: Mapping[str, object]) -> None:
    """Warn if media are shown with other limits than in the draft's training, as far as the facts in its folder say."""
    if not (Path(draft) / FACTS).is_file():
        return
    try:
        facts = read_facts(draft)
    except ValueError:
        return  # whoever renders the card is told
    trained = facts.media_limits
    other = [name for name in {**trained, **asked} if trained.get(name) != asked.get(name)]

    for name in other if facts.hyperparameters else ():
        now, then = (f"{held[name]:g}" if name in held else "unset" for held in (asked, trained))
        logger.warning(
            "`%s` is %s here and was %s in the draft's training, so media are shown otherwise: give the same.",
            *(name, now, then),
        )


def measured_in(folder: str | os.PathLike, leave_out_broken: bool = False) -> dict[str, dict]:
    """Return every `acceptance*.json`, `serving*.json` and `diagnosis*.json` of a folder as fields of `CardFacts`.

    Plots next to them belong to them. JSON that holds no measurement is skipped. A measurement that lacks fields of the
    card is a `ValueError` with its path. With `leave_out_broken` it is a warning, logged once: rendering a card must
    not end a training run.
    """
    return {kind: _measured_in(Path(folder), kind, leave_out_broken) for kind in _MEASURED}


def with_measured(facts: CardFacts, folder: str | os.PathLike, leave_out_broken: bool = False) -> CardFacts:
    """The facts, and each measurement in the folder that they do not show yet; see `measured_in`."""
    for kind, measured in measured_in(folder, leave_out_broken).items():
        told = [_without_plots(one) for one in getattr(facts, kind).values()]
        new = {name: one for name, one in measured.items() if _without_plots(one) not in told}
        facts = replace(facts, **{kind: getattr(facts, kind) | new})
    return facts


def _without_plots(measured: dict) -> dict:
    return {name: value for name, value in measured.items() if name not in ("plot", "context_plot")}


def _measured_in(folder: Path, kind: str, leave_out_broken: bool) -> dict[str, dict]:
    found = {}
    for path in sorted(folder.glob(f"{kind}*.json")):
        try:
            measured = _read_measured(path, kind)
        except ValueError as problem:
            if not leave_out_broken:
                raise
            _warn_once(f"The card leaves a table out: {problem}")
            continue

        if measured is None:
            continue

        pictures = {"plot": path.with_suffix(".png"), "context_plot": path.with_name(f"{path.stem}_context.png")}
        name = Path(measured.get("prompts") or path.name).name.partition(".")[0]
        # the same prompts may be decoded in several ways
        found[f"{name}, {path.stem}" if name in found else name] = measured | {
            plot: picture.name for plot, picture in pictures.items() if picture.is_file()
        }

    return found


def _read_measured(path: Path, kind: str) -> dict | None:
    """Return a file's measurement, `None` if it holds something else; raise a `ValueError` if a card cannot show it."""
    key, script = _MEASURED[kind]
    mend = f"measure again with {script}, or move the file away"
    measured = read_json(path, mend=mend)
    if not isinstance(measured, dict) or not {key, "sweep"} & measured.keys():
        return None

    if kind == "diagnosis":
        check_fields(measured, {"headline": dict, "prompts?": str | None}, str(path), mend)
        measured = measured["headline"] | {"prompts": measured.get("prompts")}
    _check_measured(kind, measured, str(path), mend)
    return measured


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _check_measured(kind: str, found: dict, where: str, mend: str) -> None:
    if kind == "acceptance":
        tree = _TREE if found.get("method") == "tree" else {}
        return check_fields(found, _ACCEPTANCE | tree, where, mend)

    if kind == "diagnosis":
        return check_fields(found, _DIAGNOSIS, where, mend)

    check_fields(found, _SERVING, where, mend)
    pairs = [(entry["num_speculative_tokens"], entry["batch_size"]) for entry in found["entries"]]
    if not pairs or len(set(pairs)) < len({count for count, _ in pairs}) * len({size for _, size in pairs}):
        raise ValueError(
            f"{where} lacks pairs of `num_speculative_tokens` and `batch_size` among its `entries`: {mend}."
        )
