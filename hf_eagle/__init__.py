"""Train EAGLE speculative-decoding drafts with the Hugging Face Trainer."""

from importlib import import_module


__version__ = "0.1.0"

# public name -> module; imported on first use, so that `--help` and the argument parser need no torch
_PUBLIC = {
    "AcceptanceLength": "evaluation.metrics",
    "AcceptanceLengthCallback": "training.acceptance",
    "AdaptedDraft": "drafts.adapters",
    "DraftObjective": "losses.objectives",
    "Eagle1Config": "drafts.eagle1.configuration",
    "Eagle3DeepseekV2ForCausalLM": "drafts.eagle3.modeling_latent",
    "EagleArgumentParser": "arguments.parser",
    "EagleConfig": "drafts.eagle3.configuration",
    "EagleDataCollator": "data.collators",
    "EagleMLAConfig": "drafts.eagle3.configuration_latent",
    "EagleTrainer": "training.trainer",
    "EagleTrainingArguments": "arguments.training",
    "FrozenTarget": "targets.target",
    "Kind": "drafts.kinds",
    "LlamaForCausalLMEagle": "drafts.eagle1.modeling",
    "LlamaForCausalLMEagle3": "drafts.eagle3.modeling",
    "StepAccuracy": "evaluation.metrics",
    "VocabularyMapping": "drafts.vocabulary",
    "build_dataset": "data.conversations",
    "from_foreign": "foreign.convert",
    "load_draft": "drafts.build",
    "load_prompts": "evaluation.prompts",
    "load_records": "data.conversations",
    "measure_acceptance": "evaluation.acceptance",
    "new_draft": "drafts.build",
    "pack_dataset": "data.packing",
    "register_kind": "drafts.kinds",
    "speculative_generate": "decoding.generate",
    "target_generate": "decoding.generate",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
