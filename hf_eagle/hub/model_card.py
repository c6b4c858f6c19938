"""The model card of a draft: facts of one run, put into the Jinja template `model_cards/eagle_draft_card.md`."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..files import write_atomically
from ..serving.commands import serve_commands
from ..serving.draft_folder import DraftFolder
from ..serving.kinds import kind_of, rows_of
from ..serving.speed import table, verdict
from ..shipped import shipped


# what a card was made from, beside it
FACTS = "card_facts.json"
# what files of each kind, `KIND*.json`, hold
_MEASURED = {"acceptance": "acceptance_length", "serving": "entries"}
TAGS = ["speculative-decoding", "draft-model"]
SERVERS = ["vllm", "sglang"]


@dataclass
class CardFacts:
    """
    What a card tells. Everything but the first two may be missing, and is then left out of the card.

    Args:
        name (`str`):
            The draft's name, the card's title.
        target (`str`):
            The target as a server is given it: a hub id or a folder.
        base_model (`str`, *optional*):
            The target's hub id, by which a published card serves it. By default `target`, when that is no folder.
        draft (`str`, *optional*):
            The draft as a server is given it. By default the folder that the card is written to.
        kind (`str`, *optional*):
            hf_eagle's name of the draft's kind. By default it is told from the checkpoint, among those that servers
            know.
        tap_ids (`list[int]`, *optional*):
            Entry ids of the tapped layers, where config.json does not spell them as the servers read them.
        title (`str`, *optional*):
            What people call a kind that no server is known to run. By default its name.
        license (`str`, *optional*):
            The draft's licence, as the Hub spells it; usually the target's.
        license_name, license_link (`str`, *optional*):
            Of a licence that the Hub calls `other`.
        datasets (`list[str]`, *optional*):
            Hub ids of the training data.
        data (`list[str]`, *optional*):
            A sentence for each source of training data: what, how much, which licence.
        data_statistics (`dict`, *optional*):
            What the data hold, as scripts/preview_data.py writes it with `--output_json`, or a part of it.
        acceptance (`dict[str, dict]`, *optional*):
            From the name of a prompt set to what `measure_acceptance` returned for it; `plot`, where that is given,
            names a picture of it.
        serving (`dict[str, dict]`, *optional*):
            From the name of a prompt set to what scripts/benchmark_serving.py wrote for it; `plot` as above.
        training (`dict[str, object]`, *optional*):
            Rows of the training table: optimizer steps, time, machine.
        hyperparameters (`dict[str, object]`, *optional*):
            Arguments that differ from their defaults.
        versions (`dict[str, str]`, *optional*):
            From package to version.
        training_plot, history_plot, sweep_plot (`str`, *optional*):
            File names of pictures in the card's folder: loss and accuracy, acceptance length measured during training,
            speed by number of drafted tokens.
    """

    name: str
    target: str
    base_model: str | None = None
    draft: str | None = None
    kind: str | None = None
    title: str | None = None
    tap_ids: list[int] | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    datasets: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    data_statistics: dict[str, object] = field(default_factory=dict)
    acceptance: dict[str, dict] = field(default_factory=dict)
    serving: dict[str, dict] = field(default_factory=dict)
    training: dict[str, object] = field(default_factory=dict)
    hyperparameters: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    training_plot: str | None = None
    history_plot: str | None = None
    sweep_plot: str | None = None


def render_model_card(output_dir: str | os.PathLike, facts: CardFacts | dict) -> Path:
    """
    Write the card of the draft in `output_dir` to its `README.md`, and the facts beside it.

    The draft's size, taps and vocabulary are read from the checkpoint there. Only measured numbers appear: an
    acceptance without a single draft, or a fact that is not given, is left out.

    Args:
        output_dir (`str` or `os.PathLike`):
            The draft's folder.
        facts (`CardFacts` or `dict`):
            What to tell; a `dict` holds the fields of `CardFacts`.

    Returns:
        `Path`: the README.md, replaced as a whole.

    Raises:
        ValueError: for an unknown fact, or a plot that is not in the folder.
    """
    output_dir = Path(output_dir)
    if isinstance(facts, dict):
        unknown = sorted(set(facts) - set(CardFacts.__dataclass_fields__))
        if unknown:
            known = ", ".join(CardFacts.__dataclass_fields__)
            raise ValueError(f"`facts` holds {', '.join(unknown)}, which no card shows; it takes: {known}.")
        facts = CardFacts(**facts)
    plots = {name: getattr(facts, name) for name in CardFacts.__dataclass_fields__ if name.endswith("_plot")}
    for kind in _MEASURED:
        measured = getattr(facts, kind)
        plots |= {f"{kind}[{name!r}]['plot']": found.get("plot") for name, found in measured.items()}
    for name, plot in plots.items():
        if plot and not (output_dir / plot).is_file():
            raise ValueError(f"`{name}` is {plot!r}, but {output_dir} has no such file; draw it before the card.")
    if facts.base_model is None and not os.path.isdir(facts.target):  # told once: elsewhere there is no such folder
        facts = replace(facts, base_model=facts.target)
    text = card_text(output_dir, facts)
    write_atomically(output_dir / FACTS, [json.dumps(asdict(facts), indent=2)])
    write_atomically(output_dir / "README.md", [text.removesuffix("\n")])
    return output_dir / "README.md"


def facts_of_card(folder: Path) -> CardFacts | None:
    """The facts that the card of a folder was rendered from, `None` where somebody edited it since."""
    if not (folder / FACTS).is_file():
        return None
    facts = CardFacts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
    return facts if card_text(folder, facts) == (folder / "README.md").read_text(encoding="utf-8") else None


def measured_in(folder: Path) -> dict[str, dict]:
    """Every `acceptance*.json` and `serving*.json` in a draft's folder, with pictures, as fields of `CardFacts`."""
    return {kind: _measured_in(folder, kind, key) for kind, key in _MEASURED.items()}


def _measured_in(folder: Path, kind: str, key: str) -> dict[str, dict]:
    found = {}
    for path in sorted(folder.glob(f"{kind}*.json")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(measured, dict) or key not in measured:
            continue
        picture = path.with_suffix(".png")
        name = Path(measured.get("prompts") or path.name).name.partition(".")[0]
        # the same prompts may be decoded in several ways
        found[f"{name}, {path.stem}" if name in found else name] = (
            {**measured, "plot": picture.name} if picture.is_file() else measured
        )
    return found


def card_text(output_dir: Path, facts: CardFacts) -> str:
    """The card of the draft in `output_dir`, from these facts and its checkpoint."""
    from huggingface_hub import ModelCard

    known, checkpoint = _known_of_its_kind(output_dir, facts), read_checkpoint(output_dir)
    measurements = [
        {"name": name, "way": _way(found), **found}
        for name, found in facts.acceptance.items()
        if found["acceptance_length"]
    ]
    speculative_tokens = measurements[0]["num_speculative_tokens"] if measurements else 3

    base_model, published = facts.base_model, facts.draft is not None and not os.path.isdir(facts.draft)
    target = base_model if published and base_model else facts.target
    card = ModelCard.from_template(
        _card_data(facts, measurements, known["tags"]),
        template_path=shipped("model_cards") / "eagle_draft_card.md",
        facts=facts,
        target=target,
        checkpoint=checkpoint | {"tap_ids": checkpoint["tap_ids"] or facts.tap_ids},
        titled=f"{'An' if known['label'][0] in 'AEIOU' else 'A'} {known['label']}",
        citation=known["citation"],
        target_link=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{facts.target}`",
        measurements=measurements,
        served=[
            {"name": name, "table": table(found["entries"]), "verdict": verdict(found["entries"]), **found}
            for name, found in facts.serving.items()
        ],
        published=published,
        commands=serve_commands(target, facts.draft or str(output_dir), speculative_tokens, known["kind"]),
    )
    return card.content.rstrip() + "\n"


def _config(folder: Path) -> dict:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _known_of_its_kind(folder: Path, facts: CardFacts) -> dict:
    """What a card tells of the draft's kind: by the servers' table, or else no more than the facts say."""
    config = _config(folder)
    rows = [kind_of(DraftFolder(folder, config))] if facts.kind is None else rows_of(facts.kind)
    if not rows:
        return {
            "kind": facts.kind,
            "label": facts.title or facts.kind,
            "citation": None,
            "tags": [facts.kind, *TAGS],
        }
    row = rows[0]
    return {
        "kind": row.kind,
        "label": row.label(config),
        "citation": row.citation,
        "tags": [row.vllm.name, *TAGS, *SERVERS],
    }


def read_checkpoint(folder: Path) -> dict:
    """Size, taps and vocabularies of the draft in `folder`, as far as its files tell."""
    config = _config(folder)
    found = {key: config.get(key) for key in ("draft_vocab_size", "vocab_size")}
    found["tap_ids"] = config.get("eagle_aux_hidden_state_layer_ids")
    if (folder / "model.safetensors").is_file():
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", framework="np") as tensors:
            # the vocabulary mapping is stored beside the weights, but is none
            weights = [name for name in tensors.keys() if name not in ("d2t", "t2d")]
            found["num_parameters"] = sum(math.prod(tensors.get_slice(name).get_shape()) for name in weights)
    return found


def _way(measured: dict) -> str:
    """How a measurement decoded, in a few words: `greedy, K=3`."""
    draws = f"temperature {measured['temperature']:g}" if measured.get("temperature") else "greedy"
    if measured.get("method") == "tree":
        return f"{draws}, tree of {measured['total_tokens']} tokens, depth {measured['depth']}"
    return f"{draws}, K={measured['num_speculative_tokens']}"


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
    return ModelCardData(
        base_model=facts.base_model,
        # of the relations that the Hub knows, the nearest
        base_model_relation="finetune" if facts.base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=facts.license and facts.license.lower(),  # as the Hub spells them all
        license_name=facts.license_name,
        license_link=facts.license_link,
        datasets=facts.datasets or None,
        tags=tags,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
