"""EAGLE-3: one layer of Llama over taps of the target, with its own head."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch

from .. import mending, rules_folder, rules_sglang, rules_vllm, windows
from ..draft_folder import DraftFolder, Finding, TargetFacts
from ..served_math import ServedChain
from . import taps_mending, taps_sglang, taps_vllm
from .parameters import llama_attention
from .row import Served, ServedKind


ARCHITECTURES = ("LlamaForCausalLMEagle3",)
MODEL_TYPES = ("llama",)
CITATION = """@misc{li2025eagle3,
  title         = {EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test},
  author        = {Yuhui Li and Fangyun Wei and Chao Zhang and Hongyang Zhang},
  year          = {2025},
  eprint        = {2503.01840},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CL}
}"""


def tells(folder: DraftFolder) -> bool:
    """Whether queries read an embedding and a feature, side by side."""
    widths = [shape[-1] for name, shape in folder.shapes.items() if name.endswith(".q_proj.weight")]
    return bool(widths) and widths[0] == 2 * folder.config.get("hidden_size", 0)


def label(config: Mapping[str, object]) -> str:
    """EAGLE-3.1 feeds back the output of the last norm."""
    return "EAGLE-3.1" if config.get("norm_output") else "EAGLE-3"


def _norm_before_fc(config: dict) -> bool:
    """Whether the config asks for a norm that EAGLE-3 lacks; both servers look into `eagle_config` first."""
    return bool(taps_vllm.nested(config).get("norm_before_fc", config.get("norm_before_fc")))


# ---- vLLM ----


def _vllm_norm_before_fc(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    if _norm_before_fc(folder.config):
        yield taps_vllm.other_norm("norm_before_fc")


vllm_parameters = partial(taps_vllm.parameters, attention=llama_attention)

VLLM = Served(
    name="eagle3",
    rules=(
        partial(
            rules_vllm.architecture,
            resolve=taps_vllm.resolve,
            classes=(*ARCHITECTURES, "Eagle3LlamaForCausalLM"),
            model_types=MODEL_TYPES,
        ),
        rules_vllm.layers,
        rules_vllm.vocab_size,
        taps_vllm.draft_vocabulary,
        rules_vllm.hidden_size,
        taps_vllm.tap_width,
        taps_vllm.taps,
        rules_vllm.biases,
        taps_vllm.norm_before_residual,
        _vllm_norm_before_fc,
        rules_vllm.activation,
        windows.vllm_window,
        rules_vllm.rope_base,
        rules_vllm.rotated_part,
        rules_vllm.assumed_base,
        rules_vllm.context,
        rules_vllm.yarn_table,
        partial(taps_vllm.tensors, own=vllm_parameters),
    ),
)


# ---- SGLang ----


def _tap_width(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    if folder.config.get("target_hidden_size", folder.config.get("hidden_size")) is None:
        yield Finding(
            rules_sglang.READER,
            "`target_hidden_size` is null, and `fc` is sized by it.",
            "set it to the width of a tap",
        )


def _sglang_norm_before_fc(folder: DraftFolder, target: TargetFacts | None) -> Iterator[Finding]:
    if _norm_before_fc(folder.config):
        yield Finding(
            rules_sglang.READER, "`norm_before_fc` is true: a norm that EAGLE-3 lacks is run.", "set it to false"
        )


def _place(name: str) -> str:
    return name.replace("midlayer", "layers.0").removeprefix("model.")


sglang_parameters = partial(taps_sglang.parameters, attention=llama_attention, num_taps=taps_vllm.num_taps)

SGLANG = Served(
    name="EAGLE3",
    rules=(
        partial(rules_sglang.architecture, wanted=ARCHITECTURES[0]),
        rules_sglang.llama_type,
        rules_sglang.layers,
        rules_sglang.tied,
        taps_sglang.draft_vocabulary,
        _tap_width,
        rules_sglang.hidden_size,
        partial(taps_sglang.taps, num_taps=taps_vllm.num_taps),
        _sglang_norm_before_fc,
        partial(rules_sglang.bias, name="bias"),
        partial(rules_sglang.bias, name="attention_bias"),
        rules_sglang.rope_base,
        rules_sglang.context,
        windows.sglang_window,
        rules_sglang.dtype,
        partial(taps_sglang.tensors, own=sglang_parameters, place=_place),
    ),
)


# ---- what is computed ----


class ServedEagle3(ServedChain):
    """`fc` joins the taps; embedding and feature are normed separately and concatenated; its own head follows."""

    @property
    def feature_width(self) -> int:
        return self.tensors["fc.weight"].shape[1]

    def combine(self, features: torch.Tensor) -> torch.Tensor:
        if self.config.get("fc_norm"):
            chunks = features.chunk(sum(name.startswith("fc_norm.") for name in self.tensors), dim=-1)
            features = torch.cat([self._norm(chunk, f"fc_norm.{i}") for i, chunk in enumerate(chunks)], dim=-1)
        return features @ self.tensors["fc.weight"].T

    def _enter(self, embeds: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self._norm(embeds, "layers.0.input_layernorm"), self._norm(hidden, "layers.0.hidden_norm")
        return torch.cat(normed, dim=-1), hidden

    def _leave(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self._norm(out, "norm")
        return self._over_target(self._linear(normed, "lm_head")), normed if self.config.get("norm_output") else out

    def _over_target(self, logits: torch.Tensor) -> torch.Tensor:
        """Move logits from the draft's vocabulary to the target's."""
        if "d2t" not in self.tensors:
            return logits

        targets = torch.arange(logits.shape[-1]) + self.tensors["d2t"].long()
        everything = logits.new_full((len(logits), self.config["vocab_size"]), float("-inf"))
        everything[:, targets] = logits
        return everything


ROW = ServedKind(
    name="eagle3",
    kind="eagle3",
    tells=tells,
    vllm=VLLM,
    sglang=SGLANG,
    folder_rules=(rules_folder.spellings, rules_folder.dtypes, rules_folder.leftovers, rules_folder.vocabulary),
    value_rules=(rules_folder.numbers,),
    mathematics=ServedEagle3,
    mending=(*taps_mending.steps((vllm_parameters, sglang_parameters), ARCHITECTURES, MODEL_TYPES), mending.window),
    label=label,
    citation=CITATION,
    windowed=True,
)
