"""What a training run knows about itself, for the draft's card."""

import json
import os
import platform
from dataclasses import fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path

from .model_card import CardFacts


PACKAGES = ("torch", "transformers", "accelerate", "datasets")
# what training and measuring leave beside the draft, where they were asked for it
PICTURES = {"training": "training.png", "history": "acceptance_history.png", "sweep": "acceptance_sweep.png"}
# where things lie and who is told is nobody's hyperparameter
_PRIVATE = ("output_dir", "overwrite", "resume_from_checkpoint", "report_to", "run_name", "use_cpu", "push_to_hub")


def machine() -> str:
    """The system, its processor and accelerators."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    named = [f"{devices.count(name)} x {name}" for name in sorted(set(devices))]
    return ", ".join([f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} cores", *named])


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes."""
    return {package: version(package) for package in PACKAGES} | {"Python": platform.python_version()}


def changed_arguments(args) -> dict[str, object]:
    """Training arguments that differ from their defaults, paths and reporting left out."""
    found = {}
    for known in (f for f in fields(args) if not f.name.startswith("hub_") and f.name not in _PRIVATE):
        value = getattr(args, known.name)
        if value != known.default and isinstance(value, str | int | float | bool):
            found[known.name] = value.value if isinstance(value, Enum) else value
    return found


def run_facts(trainer) -> CardFacts:
    """Facts of a run: what it did, with what, on which machine, and what lies measured in its folder."""
    args, state, folder = trainer.args, trainer.state, Path(trainer.args.output_dir)
    measured = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("acceptance*.json"))}
    return CardFacts(
        name=(args.hub_model_id or folder.resolve().name).split("/")[-1],
        target=trainer.target.model.name_or_path,
        acceptance={name: found for name, found in measured.items() if "acceptance_length" in found},
        training={
            "optimizer steps": state.global_step,
            "epochs": round(state.epoch or 0, 2),
            "processes": args.world_size,
            "machine": machine(),
        },
        hyperparameters=changed_arguments(args),
        versions=versions(),
        **{f"{kind}_plot": name for kind, name in PICTURES.items() if (folder / name).exists()},
    )
