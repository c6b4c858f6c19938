"""EAGLE-1 and EAGLE-2: one layer of Llama over the last hidden state, with the head that the target lends."""

from collections.abc import Iterator
from functools import partial

import torch

from .. import mending, rules_folder, rules_sglang, rules_vllm, windows
from ..draft_folder import DraftFolder, Finding, Shape, TargetFacts
from ..served_math import ServedChain
from .parameters import layer, llama_attention
from .row import Served, ServedKind


ARCHITECTURES = ("LlamaForCausalLMEagle", "EagleLlamaForCausalLM")  # SGLang's name and vLLM's
MODEL_TYPES = ("llama",)
CITATION = """@misc{li2024eagle,
  title         = {EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty},
  author        = {Yuhui Li and Fangyun Wei and Chao Zhang and Hongyang Zhang},
  year          = {2024},
  eprint        = {2401.15077},
  archivePrefix = {arXiv},
  primaryClass  = {cs.LG}
}"""


def tells(folder: DraftFolder) -> bool:
    """Whether queries read a row of width `hidden_size`; if there are none, whether the config names such a class."""
    widths = [shape[-1] for name, shape in folder.shapes.items() if name.endswith(".q_proj.weight")]
    if widths:
        return widths[0] != 2 * folder.config.get("hidden_size", 0)

    names = folder.config.get("architectures") or []
    return any(str(name).endswith("LlamaForCausalLMEagle") for name in names)


# ---- vLLM ----


def _resolve(name: str) -> str:
    """The name that vLLM with method `eagle` looks up for one in `architectures`."""
    return name if name.startswith("Eagle") else f"Eagle{name}"


def _logit_scale(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    if "logit_scale" in folder.config and folder.config["logit_scale"] is None:
        yield Finding(
            rules_vllm.READER, "`logit_scale` is null, and logits are multiplied by it.", "leave the field out"
        )


def vllm_parameters(config: dict, num_layers: int) -> dict[str, Shape]:
    """vLLM's parameters by their names in a checkpoint, without what the target lends."""
    hidden = config["hidden_size"]
    found = {"fc.weight": (hidden, 2 * hidden)}

    for index in range(num_layers):
        # the first layer has an identity instead of its input norm
        norms = ("post_attention_layernorm", "input_layernorm") if index else ("post_attention_layernorm",)
        found |= layer(config, llama_attention(config, hidden), norms, f"layers.{index}")
    return found


def _vllm_tensors(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    wanted = vllm_parameters(folder.config, folder.num_layers)
    # the bias exists for SGLang, and is zero
    yield from rules_vllm.tensors(folder, wanted, {name: name for name in folder.shapes}, elsewhere=("fc.bias",))


VLLM = Served(
    name="eagle",
    rules=(
        partial(rules_vllm.architecture, resolve=_resolve, classes=ARCHITECTURES[1:], model_types=MODEL_TYPES),
        rules_vllm.layers,
        rules_vllm.vocab_size,
        rules_vllm.hidden_size,
        _logit_scale,
        rules_vllm.biases,
        rules_vllm.activation,
        partial(windows.vllm_window, reads_layer_types=False),
        rules_vllm.rope_base,
        rules_vllm.rotated_part,
        rules_vllm.assumed_base,
        rules_vllm.context,
        rules_vllm.yarn_table,
        _vllm_tensors,
    ),
)


# ---- SGLang ----


def sglang_parameters(config: dict, num_layers: int) -> dict[str, Shape]:
    """SGLang's parameters by their names in a checkpoint, without what the target lends: its `fc` has a bias."""
    return vllm_parameters(config, num_layers) | {"fc.bias": (config["hidden_size"],)}


def _sglang_tensors(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    wanted = sglang_parameters(folder.config, folder.num_layers)
    yield from rules_sglang.tensors(folder, wanted, {name: name for name in folder.shapes})


SGLANG = Served(
    name="EAGLE",
    rules=(
        partial(rules_sglang.architecture, wanted=ARCHITECTURES[0]),
        rules_sglang.llama_type,
        rules_sglang.layers,
        rules_sglang.tied,
        rules_sglang.hidden_size,
        partial(rules_sglang.bias, name="attention_bias"),
        rules_sglang.rope_base,
        rules_sglang.context,
        rules_sglang.dtype,
        _sglang_tensors,
    ),
)


# ---- every reader ----


def _zero_bias(folder: DraftFolder) -> Iterator[Finding]:
    """`fc.bias` exists only for SGLang, and must be zero."""
    if folder.dtypes.get("fc.bias") in rules_folder.DTYPES and folder.tensor("fc.bias").any():
        yield Finding(
            rules_folder.READER,
            "`fc.bias` is not zero: vLLM drops it and SGLang adds it, so the two run different drafts.",
            "train the draft without a bias",
        )


# ---- what is computed ----


class ServedEagle1(ServedChain):
    """`fc` joins features and embeddings; the layer's output is fed back, and goes to the target's head."""

    @property
    def feature_width(self) -> int:
        return self.embedding.shape[1]

    def combine(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def _enter(self, embeds: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([embeds, hidden], dim=-1) @ self.tensors["fc.weight"].T
        return x, x

    def _leave(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (out @ self.head.T) * (self.config.get("logit_scale") or 1.0), out

    def as_trained(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the target's soft cap, which vLLM leaves out."""
        cap = self.config.get("final_logit_softcapping")
        return logits if cap is None else cap * torch.tanh(logits / cap)


# ---- mending ----


def _surplus(draft: mending.Draft) -> None:
    """Keep what either server has a parameter for: SGLang has all of vLLM's."""
    mending.drop_surplus(draft, sglang_parameters(draft.config, draft.num_layers))


def _bias(draft: mending.Draft) -> None:
    """Add a bias of zeros; without it SGLang's stays random."""
    if "fc.bias" not in draft.tensors and "fc.weight" in draft.tensors:
        draft.tensors["fc.bias"] = torch.zeros_like(draft.tensors["fc.weight"][:, 0])
        draft.done.append("`fc.bias` holds zeros")


MENDING = (
    mending.names,
    _surplus,
    _bias,
    partial(mending.classes, architectures=ARCHITECTURES, model_types=MODEL_TYPES),
    mending.layers_and_context,
    mending.rope,
    mending.dtypes,
    mending.fields,
)


ROW = ServedKind(
    name="eagle1",
    kind="eagle1",
    tells=tells,
    vllm=VLLM,
    sglang=SGLANG,
    folder_rules=(rules_folder.spellings, rules_folder.dtypes, rules_folder.leftovers),
    value_rules=(rules_folder.numbers, _zero_bias),
    mathematics=ServedEagle1,
    mending=MENDING,
    label=lambda config: "EAGLE-1/2",
    citation=CITATION,
)
