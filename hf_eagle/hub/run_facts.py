"""Collect what a training run knows about itself, for the draft's card."""

import os
import platform
from dataclasses import fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path

from ..door.names import as_named, at_home, is_hub_id
from .card_facts import CardFacts, measured_in
from .licenses import inherited_license, license_of


PACKAGES = ("torch", "transformers", "accelerate", "datasets")
# plots that training and measuring write next to the draft, if requested
PICTURES = {"training": "training.png", "history": "acceptance_history.png", "sweep": "acceptance_sweep.png"}
# paths and reporting are not hyperparameters
_PRIVATE = ("output_dir", "overwrite", "resume_from_checkpoint", "report_to", "run_name", "use_cpu", "push_to_hub")
# a card shows these elsewhere
_PRIVATE += ("target", "base_model", "license", "init_from", "feature_store", "acceptance_prompts", "gguf_file")
_PRIVATE += ("tools", "media_root", "features_folder", "server_model")


def machine() -> str:
    """Describe this machine: system, processor and accelerators."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    named = [f"{devices.count(name)} x {name}" for name in sorted(set(devices))]
    return ", ".join([f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} cores", *named])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine a run's results."""
    return {package: version(package) for package in PACKAGES} | {"Python": platform.python_version()}


def changed_arguments(args) -> dict[str, object]:
    """Return the arguments that differ from their defaults, without paths and reporting."""
    found = {}
    for known in (f for f in fields(args) if not f.name.startswith("hub_") and f.name not in _PRIVATE):
        value = getattr(args, known.name)
        if value != known.default and isinstance(value, str | int | float | bool):
            found[known.name] = value.value if isinstance(value, Enum) else value
    return found


def argument_facts(run, train) -> dict[str, object]:
    """Return fields of [`CardFacts`] from a run's arguments and data, which its trainer does not know.

    Args:
        run ([`RunArguments`]): the arguments.
        train (`Dataset` or `IterableDataset`): the training data; the rows of a stream are not counted.
    """
    data, groups = run.data, (run.draft, run.target, run.data, run.adapter)
    known = {"license": run.draft.license, "base_model": run.target.base_model}

    return {
        **{name: value for name, value in known.items() if value is not None},
        "datasets": [_id_of(source) for source in data.train_data if not _is_local(source)],
        "data": [
            _described(source, weight, license, counted=not data.streaming)
            for source, weight, license in zip(
                data.train_data,
                data.data_weights or [1] * len(data.train_data),
                data.data_licenses or [None] * len(data.train_data),
                strict=True,
            )
        ],
        "data_statistics": {} if data.streaming else _counted(train),
        "hyperparameters": {name: value for group in groups for name, value in changed_arguments(group).items()},
    }


def _described(source: str, weight: float, license: str | None, counted: bool) -> str:
    """Describe a source of training data: its name, its number of records, and their licence if it is known."""
    from ..data.records import count_records

    name, local = _id_of(source), _is_local(source)
    told = [f"`{Path(source).name}`" if local else f"[{source}](https://huggingface.co/datasets/{name})"]

    if counted:
        told.append(f"{count_records(source):,} records" + (f", each taken {weight:g} times" if weight != 1 else ""))
    license = license or license_of(source if local else name, kind="dataset").get("license")
    return ", ".join(told + ([f"licence {license}"] if license else []))


def _is_local(source: str) -> bool:
    """Whether training data lie on this machine; on the Hub, a subset may be named after their repository."""
    return at_home(source).exists() or not is_hub_id(as_named(_id_of(source)))


def _id_of(source: str) -> str:
    """Return the id in `id@revision:subset:split`."""
    return source.partition(":")[0].partition("@")[0]


def _counted(rows) -> dict[str, object]:
    """Return the `token_statistics`, with each conversation in a packed row counted."""
    import pyarrow.compute as pc

    from ..data.statistics import token_statistics

    found = token_statistics(rows)
    if "document_lengths" in rows.column_names:
        batches = rows.select_columns("document_lengths").with_format("arrow").iter(batch_size=4096)
        found["conversations"] = sum(len(pc.list_flatten(batch["document_lengths"])) for batch in batches)
        del found["length"], found["supervised"]
    return found


def run_facts(trainer) -> CardFacts:
    """Return the facts of a run: its steps, settings and machine, and the measurements in its folder."""
    args, state, folder = trainer.args, trainer.state, Path(trainer.args.output_dir)
    target, known = trainer.target.model.name_or_path, dict(trainer.card_facts)
    draft = trainer.accelerator.unwrap_model(trainer.model)
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]

    return CardFacts(
        name=(args.hub_model_id or folder.resolve().name).split("/")[-1],
        target=target,
        kind=draft.kind.name,
        title=draft.kind.title,
        tap_ids=draft.config.tap_ids or None,
        chain_length=draft.config.chain_length,
        **measured_in(folder, leave_out_broken=True),
        training={
            "optimizer steps": state.global_step,
            "epochs": round(state.epoch or 0, 2),
            # the whole time of a resumed run is not known
            **({"minutes": round(seconds[0] / 60, 1)} if len(seconds) == 1 and not trainer.resumed else {}),
            "processes": args.world_size,
            "machine": machine(),
        },
        data=known.pop("data", []) + draft.config.told_to_card() + trainer.target.told_to_card(),
        hyperparameters=known.pop("hyperparameters", {}) | changed_arguments(args),
        versions=versions(),
        **{f"{kind}_plot": name for kind, name in PICTURES.items() if (folder / name).exists()},
        **({} if "license" in known else inherited_license(target, known.get("base_model"))),
        **known,
    )
