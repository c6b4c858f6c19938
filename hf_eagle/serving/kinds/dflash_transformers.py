"""What transformers 5.24 requires of a DFlash draft: `generate(assistant_model=..., speculation_type="dflash")`.

Sources: `models/muse_glimmer_assistant/`, `DFlashTokenCandidateGenerator` in `generation/candidate_generator.py`.
It has one class for such drafts, which reads the second form of a folder and no other.
"""

from collections.abc import Iterator, Mapping

from ...door.config_readings import FULL, SECOND_DEFAULTS, SECOND_THETA, SECOND_TYPE
from ..draft_folder import DraftFolder, Finding, TargetFacts, named
from . import dflash_fields as fields


READER = "transformers"
_TAKEN = ("mask_token_id", "target_layer_ids", "block_size")
_NAMES = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}


def _reads(config: Mapping[str, object]) -> bool:
    return config.get("model_type") == SECOND_TYPE


def forms(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """Say which readers take a folder of this form."""
    if _reads(folder.config):
        yield Finding(
            READER,
            f"a folder of type '{SECOND_TYPE}' is read by vLLM, SGLang and transformers, where the installed "
            "transformers has that class (5.19 or newer). z-lab's own code does not read it.",
            "do nothing, or train with `--served_form servers` for z-lab's code",
            level="note",
        )
    elif folder.config.get("model_type") in fields.MODEL_TYPES:  # the servers refuse others, in findings of their own
        yield Finding(
            READER,
            f"a folder of type {folder.config['model_type']!r} is read by vLLM, SGLang and z-lab's code. "
            "`AutoModel` makes a plain language model of it, with little more than a warning.",
            "do nothing, or train with `--served_form transformers` to generate with transformers alone",
            level="note",
        )


def rules(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    """What keeps the second form from being read as it was trained."""
    if _reads(folder.config):
        yield from _config(folder.config)
        yield from _tensors(folder)


def _config(config: dict) -> Iterator[Finding]:
    for name in _TAKEN:
        if config.get(name) is None:
            yield Finding(
                READER,
                f"the top-level `{name}` is missing: {SECOND_DEFAULTS[name]} is taken, silently.",
                "write that of `dflash_config` at top level too",
            )

    if config.get("target_layer_ids") not in (None, fields.layer_ids(config)):
        yield Finding(
            READER,
            f"`target_layer_ids` is {config['target_layer_ids']} at top level and {fields.layer_ids(config)} in "
            "`dflash_config`, where the servers read it.",
            "write those of training in both",
        )
    if config.get("layer_types") is None:
        yield Finding(
            READER,
            "`layer_types` is missing: sliding attention is taken for all layers, which hides keys that training "
            "showed.",
            f'write "{FULL}" for each layer',
        )
    if not isinstance(config.get("sliding_window", 1), int):
        yield Finding(READER, "`sliding_window` is null, and the config is refused.", "write any whole number, as 2048")
    if not (config.get("rope_parameters") or {}).get("rope_theta"):
        yield Finding(
            READER,
            f"`rope_parameters` holds no `rope_theta`: {SECOND_THETA:g} is taken, silently.",
            "write the base of training there too",
        )


def _tensors(folder: DraftFolder) -> Iterator[Finding]:
    others = [name for name in _NAMES if name in folder.shapes]
    if others:
        yield Finding(
            READER,
            f"{named(others)} has another name here, {named(_NAMES[name] for name in others)}: with little more than a "
            "warning it stays random.",
            "rename it",
        )
    biases = [name for name in folder.shapes if name.endswith(".bias")]
    if biases:
        yield Finding(READER, f"{named(biases)} has no parameter and is dropped.", "train without biases")
    if folder.config.get("draft_vocab_size") not in (None, folder.config["vocab_size"]):
        yield Finding(
            READER,
            "a vocabulary and a head of its own are not supported.",
            "train a draft with the whole vocabulary",
            level="limit",
        )


def in_python(config: Mapping[str, object], target: str, draft: str) -> str | None:
    """The lines that generate with a folder of the second form; `None` for the main form."""
    if not _reads(config):
        return None
    return (
        "from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({target!r})\n"
        f'model = AutoModelForCausalLM.from_pretrained({target!r}, dtype="auto", device_map="auto")\n'
        f"assistant = AutoModel.from_pretrained({draft!r}, dtype=model.dtype).to(model.device)\n"
        'question = [{"role": "user", "content": "Who are you?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    question, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ").to(model.device)\n"
        'output = model.generate(**inputs, assistant_model=assistant, speculation_type="dflash", max_new_tokens=128)\n'
        "print(tokenizer.decode(output[0], skip_special_tokens=True))"
    )
