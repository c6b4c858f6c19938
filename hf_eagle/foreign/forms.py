"""The forms in which projects publish drafts, how each is recognised, and what each calls its taps.

| form | project, and the files of it that this follows |
|---|---|
| `eagle1` | SafeAILab/EAGLE, EAGLE-1 and 2: `eagle/model/cnets1.py`, `eagle/train/*_config.json` |
| `eagle3` | SafeAILab/EAGLE, EAGLE-3: `eagle/model/cnets.py`, `eagle/traineagle3/config.json` |
| `specforge` | sgl-project/SpecForge: `specforge/modeling/draft/llama3_eagle.py`, `specforge/export/to_hf.py` |
| `modelopt` | NVIDIA/Model-Optimizer: `modelopt/torch/export/plugins/hf_spec_export.py`, `hf_spec_configs.py` there |
| `speculators` | vllm-project/speculators: `src/speculators/models/eagle3/{config,core,model_definitions}.py` |
| `nemo` | NVIDIA-NeMo/Automodel: `nemo_automodel/components/speculative/eagle/draft_{llama,deepseek}.py` |
| `torchspec` | lightseekorg/TorchSpec: `torchspec/models/draft/deepseek_eagle.py`, `tools/convert_to_hf.py` |

All of them are one layer with the mathematics of contract sections 2 to 4, under other names.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..targets.latent import LATENT_SIZES


TAP_IDS = "eagle_aux_hidden_state_layer_ids"
# fields of `eagle_config` that ModelOpt's exporter always writes, and no other
_OF_MODELOPT = ("next_layer_regular", "parallel_draft_heads_num_layers")


@dataclass(frozen=True)
class Form:
    """How one project writes a draft.

    Attributes:
        name: of `--form`.
        project: who writes it.
        eagle1: whether it is a draft of features, without taps and head.
        own_copies: tensors that only its training needs.
    """

    name: str
    project: str
    eagle1: bool = False
    own_copies: tuple[str, ...] = ()


FORMS = {
    form.name: form
    for form in (
        Form("eagle1", "SafeAILab's EAGLE-1", eagle1=True),
        Form("eagle3", "SafeAILab's EAGLE-3"),
        Form("specforge", "SpecForge"),
        Form("modelopt", "NVIDIA ModelOpt"),
        Form("speculators", "vLLM's speculators", own_copies=("verifier_lm_head.weight", "verifier_norm.weight")),
        Form("nemo", "NVIDIA NeMo Automodel"),
        Form("torchspec", "TorchSpec"),
    )
}


def form_of(name: str, config: dict[str, Any], tensors: Iterable[str]) -> Form:
    """The form called `name`; `"auto"` recognises it.

    Args:
        name: one of `FORMS`, or `"auto"`.
        config: what `config.json` holds.
        tensors: names of the tensors.

    Raises:
        ValueError: for an unknown name, or a draft of no form that is known.
    """
    if name != "auto":
        if name not in FORMS:
            raise ValueError(f"`form` must be auto or one of {', '.join(FORMS)}, got {name!r}.")
        return FORMS[name]
    names = list(tensors)
    found = _recognise(config, names)
    if found is None:
        raise ValueError(
            f"The form of this draft is not known: `architectures` is {config.get('architectures')}, and it holds "
            f"{', '.join(sorted(names)[:4])}, ... Name the `form` ({', '.join(FORMS)}) if it is one of these."
        )
    return FORMS[found]


def _recognise(config: dict[str, Any], names: list[str]) -> str | None:
    if "speculators_model_type" in config or "transformer_layer_config" in config:
        return "speculators"
    if "model.fc.weight" in names:
        return "nemo"
    own_layer = any(name.startswith("midlayer.") for name in names)
    if "_torchspec_version" in config or (own_layer and has_latent_sizes(config)):
        return "torchspec"
    if own_layer:
        return "specforge" if "LlamaForCausalLMEagle3" in (config.get("architectures") or ()) else "eagle3"
    if any(field in (config.get("eagle_config") or {}) for field in _OF_MODELOPT):
        return "modelopt"
    if "fc.weight" in names and "layers.0.mlp.up_proj.weight" in names and "layers.0.hidden_norm.weight" not in names:
        return "eagle1"
    return None


def has_latent_sizes(config: dict[str, Any]) -> bool:
    """Whether a config is one of multi-head latent attention."""
    return all(name in config for name in LATENT_SIZES)


def stored_tap_ids(
    form: Form, config: dict[str, Any], tensors: Iterable[str], num_target_layers: int
) -> list[int] | None:
    """Entry ids of the taps that a config names, `None` where it names none: then they are the servers' default.

    The top-level field is vLLM's and speculators', of layer ENTRIES. The one in `eagle_config` is SGLang's, SpecForge's
    and ModelOpt's, of layer OUTPUTS, which are the next layer's entry; `num_target_layers`, which no layer's output is,
    shows that entries are meant after all, as does TorchSpec's export for vLLM of a `kimi_k2` draft.
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
