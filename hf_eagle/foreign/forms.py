"""Recognise the form in which a project published a draft, and read its taps.

| form | project, and the files of it that this follows |
|---|---|
| `eagle1` | SafeAILab/EAGLE, EAGLE-1 and 2: `eagle/model/cnets1.py`, `eagle/train/*_config.json` |
| `eagle3` | SafeAILab/EAGLE, EAGLE-3: `eagle/model/cnets.py`, `eagle/traineagle3/config.json` |
| `specforge` | sgl-project/SpecForge: `specforge/modeling/draft/llama3_eagle.py`, `specforge/export/to_hf.py` |
| `modelopt` | NVIDIA/Model-Optimizer: `modelopt/torch/export/plugins/hf_spec_export.py`, `hf_spec_configs.py` there |
| `speculators` | vllm-project/speculators: `src/speculators/models/eagle3/{config,core,model_definitions}.py` |
| `nemo` | NVIDIA-NeMo/Automodel: `nemo_automodel/components/speculative/eagle/draft_{llama,deepseek}.py` |
| `torchspec` | lightseekorg/TorchSpec: `torchspec/models/draft/deepseek_eagle.py`, `tools/convert_to_hf.py` |
| `zlab` | z-lab/dflash: `dflash/model.py`; SpecForge writes its DFlash drafts in this form too |
| `transformers` | huggingface/transformers: `models/muse_glimmer_assistant/` |

EAGLE drafts have one layer and the mathematics of contract sections 2 to 4, DFlash drafts that of contract section 7.
Only names and fields differ from ours. `speculators` is a form of both.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ..door.config_readings import SECOND_DEFAULTS, SECOND_THETA, shown_dspark
from ..targets.latent import LATENT_SIZES


TAP_IDS = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class Form:
    """The form in which one project publishes drafts.

    Attributes:
        name: value of `--form`.
        project: name of the project.
        kinds: rows of `kinds.py` that its folders may have; the first one whose marks are in a config applies.
        prefix: prefix of its tensor names.
        names: beginnings of tensor names -> those of ours.
        defaults: values that its config class has for fields that a config.json leaves out.
        filled_if_null: fields whose default it takes for null too; as another field it refuses null.
        default_theta: the RoPE base that it takes where none is written, if not Llama's.
        own_copies: tensors that only its training needs.
        trains_on_default_base: whether it trains scaled RoPE with base 10000 and ignores `rope_theta` in the config.
    """

    name: str
    project: str
    kinds: tuple[str, ...] = ("latent", "eagle3")
    prefix: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    filled_if_null: tuple[str, ...] = ()
    default_theta: float | None = None
    own_copies: tuple[str, ...] = ()
    trains_on_default_base: bool = False

    def filled(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with what its class fills in."""
        return {**self.defaults, **{k: v for k, v in config.items() if v is not None or k not in self.filled_if_null}}


FORMS = {
    form.name: form
    for form in (
        Form("eagle1", "SafeAILab's EAGLE-1", kinds=("eagle1",), trains_on_default_base=True),
        Form("eagle3", "SafeAILab's EAGLE-3", trains_on_default_base=True),
        Form("specforge", "SpecForge", kinds=("dflash", "latent", "eagle3")),
        Form("modelopt", "NVIDIA ModelOpt"),
        Form(
            "speculators",
            "vLLM's speculators",
            kinds=("dflash", "eagle3"),
            own_copies=("verifier_lm_head.weight", "verifier_norm.weight"),
        ),
        Form("nemo", "NVIDIA NeMo Automodel", prefix="model."),
        Form("torchspec", "TorchSpec", trains_on_default_base=True),
        Form("zlab", "z-lab's DFlash", kinds=("dflash",)),
        Form(
            "transformers",
            "transformers' muse_glimmer_assistant",
            kinds=("dflash",),
            names={"encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm."},
            defaults=SECOND_DEFAULTS,
            filled_if_null=("layer_types", "target_layer_ids"),
            default_theta=SECOND_THETA,
        ),
    )
}


@dataclass(frozen=True)
class Sign:
    """The evidence that a draft has a form; all of it must be present.

    Attributes:
        fields: fields of `config.json`.
        in_eagle_config: fields of `eagle_config` there.
        architectures: entries of `architectures` there.
        tensors: patterns that must each match a tensor's name.
        no_tensors: patterns that must match no tensor's name.
    """

    fields: tuple[str, ...] = ()
    in_eagle_config: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    no_tensors: tuple[str, ...] = ()

    def is_in(self, config: dict[str, Any], names: list[str]) -> bool:
        """Whether a draft with this config and these tensor names shows all of this evidence."""
        said = (
            (self.fields, config),
            (self.in_eagle_config, config.get("eagle_config") or ()),
            (self.architectures, config.get("architectures") or ()),
        )
        return (
            all(word in place for words, place in said for word in words)
            and all(_some_match(names, pattern) for pattern in self.tensors)
            and not any(_some_match(names, pattern) for pattern in self.no_tensors)
        )


# the first sign found in a draft decides
_SIGNS = (
    ("speculators", Sign(fields=("speculators_model_type",))),
    ("speculators", Sign(fields=("transformer_layer_config",))),
    ("transformers", Sign(tensors=("encoder.fc.weight",))),
    ("zlab", Sign(fields=("dflash_config",))),
    ("nemo", Sign(tensors=("model.fc.weight",))),
    ("torchspec", Sign(fields=("_torchspec_version",))),
    ("torchspec", Sign(fields=LATENT_SIZES, tensors=("midlayer.*",))),
    ("specforge", Sign(architectures=("LlamaForCausalLMEagle3",), tensors=("midlayer.*",))),
    ("eagle3", Sign(tensors=("midlayer.*",))),
    # ModelOpt's exporter always writes these two, and no other project does
    ("modelopt", Sign(in_eagle_config=("next_layer_regular",))),
    ("modelopt", Sign(in_eagle_config=("parallel_draft_heads_num_layers",))),
    (
        "eagle1",
        Sign(
            tensors=("fc.weight", "layers.0.mlp.up_proj.weight"),
            no_tensors=("layers.0.hidden_norm.weight",),
        ),
    ),
)


def _some_match(names: list[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def form_of(name: str, config: dict[str, Any], tensors: Iterable[str]) -> Form:
    """Return the form called `name`; `"auto"` recognises it.

    Args:
        name: one of `FORMS`, or `"auto"`.
        config: the content of `config.json`.
        tensors: names of the tensors.

    Raises:
        ValueError: if the name, or the draft's form, is unknown.
    """
    names = list(tensors)
    _refuse_dspark(config, names)
    if name != "auto":
        if name not in FORMS:
            raise ValueError(f"`form` must be auto or one of {', '.join(FORMS)}, got {name!r}.")
        return FORMS[name]

    found = next((form for form, sign in _SIGNS if sign.is_in(config, names)), None)
    if found is None:
        raise ValueError(
            f"The form of this draft is not known: `architectures` is {config.get('architectures')}, and it holds "
            f"{', '.join(sorted(names)[:4])}, ... Name its `form` if it is one of {', '.join(FORMS)}."
        )
    return FORMS[found]


def _refuse_dspark(config: dict[str, Any], names: list[str]) -> None:
    """Raise a `ValueError` for a draft whose slots predict one token further than those of DFlash."""
    if (why := shown_dspark(config, names)) is not None:
        raise ValueError(f"{why}: it cannot be imported.")


def stored_tap_ids(
    form: Form, config: dict[str, Any], tensors: Iterable[str], num_target_layers: int
) -> list[int] | None:
    """Return the entry ids of the taps that a config names; `None` if it names none: the servers use their default.

    The top-level field, used by vLLM and speculators, counts layer ENTRIES. The one in `eagle_config`, used by SGLang,
    SpecForge and ModelOpt, counts layer OUTPUTS, each of which is the next layer's entry. Two signs show that it counts
    entries after all: the id `num_target_layers`, which no output has, and TorchSpec's export of a `kimi_k2` draft for
    vLLM.
    """
    if config.get(TAP_IDS):
        return list(config[TAP_IDS])

    nested = (config.get("eagle_config") or {}).get(TAP_IDS)
    if not nested:
        return None

    for_vllm = form.name == "torchspec" and config.get("model_type") == "kimi_k2" and "layers.0" in _layers(tensors)
    entries = for_vllm or max(nested) == num_target_layers
    return [i if entries else i + 1 for i in nested]


def _layers(tensors: Iterable[str]) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in tensors}
