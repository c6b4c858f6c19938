"""Render the model card of a draft: facts of one run in the Jinja template `model_cards/eagle_draft_card.md`."""

import hashlib
import json
import logging
import math
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

from ..data.overlap import RULE
from ..door.json_files import read_json
from ..door.names import as_named, at_home, is_hub_id
from ..door.writing import write_atomically
from ..evaluation.contexts import contexts_table
from ..evaluation.windows import windows_table
from ..serving.commands import serve_commands, tokens_of_a_round
from ..serving.draft_folder import DraftFolder
from ..serving.kinds import kind_of, rows_of
from ..serving.schedule import Schedule, loads, schedule_of, told_schedule
from ..serving.speed import table, verdict
from ..shipped import shipped
from .card_facts import FACTS, CardFacts, facts_from, read_facts


logger = logging.getLogger(__name__)

CARD = "README.md"
TAGS = ["speculative-decoding", "draft-model"]
SERVERS = ["vllm", "sglang"]
_ANYWHERE = "ANY-FOLDER"


def render_model_card(output_dir: str | os.PathLike, facts: CardFacts | dict) -> Path:
    """
    Write the card of the draft in `output_dir` to its `README.md`, and the facts next to it.

    The draft's size, taps and vocabulary are read from the checkpoint there. Only measured numbers appear: acceptance
    without a single draft is left out, and so is a fact that is not given.

    Args:
        output_dir (`str` or `os.PathLike`):
            The draft's folder.
        facts (`CardFacts` or `dict`):
            Facts to show; a `dict` holds the fields of `CardFacts`.

    Returns:
        `Path`: the README.md, replaced as a whole.

    Raises:
        ValueError: if a fact is unknown, or a plot is not in the folder.
    """
    output_dir, facts = at_home(output_dir), facts_from(facts)
    plots = {name: getattr(facts, name) for name in CardFacts.__dataclass_fields__ if name.endswith("_plot")}
    for kind in ("acceptance", "serving", "diagnosis"):
        measured = getattr(facts, kind)
        for plot in ("plot", "context_plot"):
            plots |= {f"{kind}[{name!r}][{plot!r}]": found.get(plot) for name, found in measured.items()}

    for name, plot in plots.items():
        if plot and not (output_dir / plot).is_file():
            raise ValueError(f"`{name}` is {plot!r}, but {output_dir} has no such file; draw it before the card.")

    facts = _named_once(facts)
    text = card_text(output_dir, facts)
    facts = replace(facts, card_sha256=_digest(text.encode()))

    # an interruption should leave no card, not one that differs from its facts and looks edited
    (output_dir / CARD).unlink(missing_ok=True)
    write_atomically(output_dir / FACTS, [json.dumps(asdict(facts), indent=2)])
    write_atomically(output_dir / CARD, [text.removesuffix("\n")])
    return output_dir / CARD


def facts_of_card(folder: str | os.PathLike) -> CardFacts | None:
    """Return the facts that a folder's card was rendered from, `None` if a person wrote it or edited it since.

    A missing card can be rendered again from the facts next to it. Moving or renaming the folder does not matter.

    Raises:
        ValueError: if `card_facts.json` cannot be read.
    """
    folder = at_home(folder)
    if not (folder / FACTS).is_file():
        return None

    facts, card = read_facts(folder), folder / CARD
    if not card.is_file():
        return facts

    written = card.read_bytes().replace(b"\r\n", b"\n")
    if facts.card_sha256 is not None:
        return facts if _digest(written) == facts.card_sha256 else None

    # earlier versions wrote no digest, and their card may spell the folder's name differently
    parts = card_text(folder, facts, named=_ANYWHERE).encode().split(_ANYWHERE.encode())
    return facts if re.fullmatch(b"(.+)".join(map(re.escape, parts)), written) else None


def is_edited(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a card that a person wrote, or may have written, since its facts cannot be read."""
    try:
        return (at_home(folder) / CARD).is_file() and facts_of_card(folder) is None
    except ValueError as problem:
        logger.warning("The card in %s is left as it is: %s", folder, problem)
        return True


def _digest(card: bytes) -> str:
    return hashlib.sha256(card).hexdigest()


def _named_once(facts: CardFacts) -> CardFacts:
    """Return facts with absolute paths, so that their meaning does not depend on the working directory."""
    target, draft, base_model = as_named(facts.target), facts.draft, facts.base_model
    if draft is not None and not is_hub_id(draft := as_named(draft)):
        draft = str(Path(draft).resolve())

    if base_model is None:
        base_model = target if is_hub_id(target) else None
    elif not is_hub_id(as_named(base_model)):
        logger.warning("The card links no target: `base_model` %s is a folder; give the target's Hub id.", base_model)
        base_model = None

    return replace(facts, target=target, draft=draft, base_model=base_model)


def card_text(output_dir: Path, facts: CardFacts, named: str | None = None) -> str:
    """Return the card of the draft in `output_dir`, called `named`, from these facts and its checkpoint."""
    from huggingface_hub import ModelCard

    known, checkpoint = _known_of_its_kind(output_dir, facts), read_checkpoint(output_dir)
    measurements = [
        {"name": name, "way": _way(found), **_context_tables(found), **found}
        for name, found in facts.acceptance.items()
        if found["acceptance_length"]
    ]
    proposed = facts.chain_length or known["tokens"]
    speculative_tokens = measurements[0]["num_speculative_tokens"] if measurements else proposed

    draft = facts.draft or named or str(output_dir.resolve())
    published = facts.draft is not None and is_hub_id(facts.draft)
    target, target_link, is_copy = _target(facts, published)

    card = ModelCard.from_template(
        _card_data(facts, measurements, known["tags"]),
        template_path=shipped("model_cards") / "eagle_draft_card.md",
        facts=facts,
        target=target,
        checkpoint=checkpoint | {"tap_ids": checkpoint["tap_ids"] or facts.tap_ids},
        titled=f"{'An' if known['label'][0] in 'AEIOU' else 'A'} {known['label']}",
        citation=known["citation"],
        target_link=target_link,
        is_copy=is_copy,
        measurements=measurements,
        served=[
            {
                **found,
                **{"name": name, "table": table(found["entries"]), "verdict": verdict(found["entries"])},
                "schedule": told_schedule(_schedule(found) or []),
            }
            for name, found in facts.serving.items()
        ],
        diagnosed=[{"name": name, **_context_tables(found), **found} for name, found in facts.diagnosis.items()],
        published=published,
        overlap_rule=RULE,
        commands=serve_commands(
            target,
            draft,
            speculative_tokens,
            known["kind"],
            facts.media_limits,
            _config(output_dir),
            _served_schedule(facts),
        ),
        media_limits=facts.media_limits,
    )
    return card.content.rstrip() + "\n"


def _schedule(found: dict) -> Schedule | None:
    """Return the number of tokens to draft by load that a measurement shows; `None` if it is of one load."""
    return schedule_of(found["entries"]) if len(loads(found["entries"])) > 1 else None


def _served_schedule(facts: CardFacts) -> Schedule | None:
    """Return that of the measurement of most loads, if its server takes one."""
    found = max(facts.serving.values(), key=lambda found: len(loads(found["entries"])), default={})
    return _schedule(found) if found.get("takes_schedule") else None


def _target(facts: CardFacts, published: bool) -> tuple[str, str, bool]:
    """Return the target as passed to a server, its name in the text, and whether the reader must fill in its path.

    A folder of this machine means nothing to the readers of a published card, so they see only its name.
    """
    base_model = facts.base_model if facts.base_model and is_hub_id(facts.base_model) else None
    link = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else None

    if not published:
        return facts.target, link or f"`{facts.target}`", False
    if base_model:
        return base_model, link, False

    name = Path(facts.target).name
    return f"path/to/{name}", f"`{name}`", True


def _config(folder: Path) -> dict:
    file = folder / "config.json"
    if not file.is_file():
        return {}
    known = {"vocab_size?": int | None, "draft_vocab_size?": int | None, "num_hidden_layers?": int | None}
    return read_json(file, {**known, "eagle_aux_hidden_state_layer_ids?": list[int] | None})


def _known_of_its_kind(folder: Path, facts: CardFacts) -> dict:
    """Return the card's fields about the draft's kind, from the servers' table, or else only from the facts."""
    config = _config(folder)
    rows = [kind_of(DraftFolder(folder, config))] if facts.kind is None else rows_of(facts.kind)

    if not rows:
        return {
            "kind": facts.kind,
            "label": facts.title or facts.kind,
            "citation": None,
            "tags": [facts.kind, *TAGS],
            "tokens": None,
        }

    row = rows[0]
    return {
        "kind": row.kind,
        "label": row.label(config),
        "citation": row.citation,
        "tags": [row.vllm.name, *TAGS, *SERVERS],
        "tokens": tokens_of_a_round(row.kind, config),
    }


def read_checkpoint(folder: Path) -> dict:
    """Return size, depth, taps and vocabularies of the draft in `folder`, as far as its files show them."""
    config = _config(folder)
    found = {key: config.get(key) for key in ("draft_vocab_size", "vocab_size")}
    found["one_layer"] = config.get("num_hidden_layers") in (None, 1)
    found["tap_ids"] = config.get("eagle_aux_hidden_state_layer_ids")

    if (folder / "model.safetensors").is_file():
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", framework="np") as tensors:
            # the vocabulary mapping is stored with the weights, but does not count as one
            weights = [name for name in tensors.keys() if name not in ("d2t", "t2d")]
            found["num_parameters"] = sum(math.prod(tensors.get_slice(name).get_shape()) for name in weights)

    return found


def _way(measured: dict) -> str:
    """Say how a measurement decoded, in a few words: `greedy, K=3`."""
    draws = f"temperature {measured['temperature']:g}" if measured.get("temperature") else "greedy"
    if measured.get("method") == "tree":
        return f"{draws}, tree of {measured['total_tokens']} tokens, depth {measured['depth']}"
    return f"{draws}, K={measured['num_speculative_tokens']}"


def _context_tables(measured: dict) -> dict[str, str]:
    """Return tables of acceptance by context length, and with windows, as far as they were measured."""
    tables = {}
    if measured.get("acceptance_by_context"):
        tables["context_table"] = contexts_table(measured["acceptance_by_context"])
    if measured.get("windows"):
        tables["windows_table"] = windows_table(measured["windows"])
    return tables


def _card_data(facts: CardFacts, measurements: list[dict], tags: list[str]):
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=measured["name"].split(",")[0].lower().replace(" ", "-"),
            dataset_name=measured["name"],
            metric_type="acceptance_length",
            metric_name=f"Acceptance length ({_way(measured)})",
            metric_value=round(measured["acceptance_length"], 4),
        )
        for measured in measurements
    ]

    base_model = facts.base_model if facts.base_model and is_hub_id(facts.base_model) else None
    return ModelCardData(
        base_model=base_model,
        # the closest of the relations that the Hub defines
        base_model_relation="finetune" if base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=facts.license and facts.license.lower(),  # the Hub spells all in lower case
        license_name=facts.license_name,
        license_link=facts.license_link,
        datasets=facts.datasets or None,
        tags=tags,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
