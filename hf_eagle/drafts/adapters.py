"""LoRA on a draft (arXiv 2106.09685): train an adapter, and save a whole draft with it merged in."""

import copy
import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

from .modeling_base import EaglePreTrainedModel


# holds what resuming needs; no server looks into this folder of the merged draft
ADAPTER_FOLDER = "adapter"
_WEIGHTS = "adapter_model.safetensors"
# argument of training -> field of `LoraConfig`: a change gives an adapter's weights another meaning
_FIXED = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}


class AdaptedDraft(PeftModel):
    """A draft with a LoRA adapter. Only the adapter is trained; all else of the draft is reached through it.

    `save_pretrained` writes a draft's folder with the adapter merged in, which servers load like any other, and the
    adapter by itself in `adapter/` inside it.

    Args:
        draft ([`EaglePreTrainedModel`]): the draft to start from; its modules are wrapped in place.
        config ([`~peft.LoraConfig`]): the adapter. Without `target_modules`, or with `"all-linear"`, it sits on all
            projections of the draft's layer and on `fc`, not on the head. `modules_to_save` are trained whole.

    Raises:
        ValueError: for another kind of adapter, a module that the draft lacks or that is the target's, or an adapter
            that cannot be merged.

    Example:
        >>> draft = AdaptedDraft(load_draft("outputs/my-draft", target), LoraConfig(r=16, lora_alpha=32))
    """

    def __init__(self, draft: EaglePreTrainedModel, config: PeftConfig):
        config, base_fingerprint = _checked(draft, config), fingerprint(draft)
        config.base_model_name_or_path = draft.name_or_path or None
        super().__init__(draft, config)
        self.base_fingerprint = base_fingerprint
        draft.freeze()  # a module trained whole may hold what no draft trains

    @torch.no_grad()
    def merged_state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors of the draft, by its own names, with the adapter merged into them; the model does not change."""
        (adapter,) = self.active_adapters
        draft, merged = self.get_base_model(), {}
        own, kept = f".modules_to_save.{adapter}.", ".original_module."

        for name, tensor in draft.state_dict().items():
            module, _, parameter = name.rpartition(".base_layer.")
            if module and parameter == "weight":
                delta = draft.get_submodule(module).get_delta_weight(adapter)
                # in the adapter's precision, rounded once
                merged[f"{module}.weight"] = (tensor.to(delta.dtype) + delta).to(tensor.dtype)
            elif module:
                merged[f"{module}.{parameter}"] = tensor
            elif own in name:
                merged[name.replace(own, ".")] = tensor
            elif kept not in name and ".lora_" not in name:
                merged[name] = tensor

        return merged

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs) -> None:
        """Write the merged draft, and the adapter in `adapter/`.

        Args:
            save_directory: the draft's folder.
            is_main_process: only this one writes.
            kwargs: as for a draft; `state_dict` is ignored, and made here.
        """
        if not is_main_process:
            return

        kwargs["state_dict"] = self.merged_state_dict()
        self.get_base_model().save_pretrained(save_directory, **kwargs)

        folder = Path(save_directory) / ADAPTER_FOLDER
        folder.mkdir(exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self._adapter_weights().items()}
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt", "base_fingerprint": self.base_fingerprint})
        self.active_peft_config.save_pretrained(folder)

        # safetensors writes through a private temporary file
        shutil.copymode(Path(save_directory) / "config.json", folder / _WEIGHTS)

    def load_adapter_from(self, folder: str | Path) -> None:
        """Load the adapter from a folder that `save_pretrained` wrote.

        Raises:
            ValueError: if there is none, or it was trained on another draft or with other settings.
        """
        folder = Path(folder) / ADAPTER_FOLDER
        if not (folder / _WEIGHTS).is_file():
            raise ValueError(
                f"The checkpoint {folder.parent} holds no adapter, so it was trained without `use_peft`: leave it out, "
                "or start a new run with `init_from` that checkpoint."
            )

        with safe_open(folder / _WEIGHTS, "pt") as file:
            made_on = (file.metadata() or {}).get("base_fingerprint")
        if made_on != self.base_fingerprint:
            raise ValueError(
                f"The adapter in {folder.parent} was trained on another draft (fingerprint {made_on}, this one has "
                f"{self.base_fingerprint}): name with `init_from` the draft that the run began with."
            )

        # the shapes may fit and yet mean something else, for instance with another `lora_alpha`
        saved, mine = LoraConfig.from_pretrained(folder), self.active_peft_config
        for argument, field in _FIXED.items():
            found, asked = (_plain(getattr(config, field)) for config in (saved, mine))
            if found != asked:
                raise ValueError(
                    f"`{argument}` is {asked} but the adapter in {folder.parent} was trained with {found}: keep it, or "
                    "start a new run in another `output_dir`."
                )

        weights = load_file(folder / _WEIGHTS)
        wrong = set(weights) ^ set(self._adapter_weights())
        if wrong:
            raise ValueError(
                f"The adapter in {folder.parent} does not fit this draft: one has {', '.join(sorted(wrong)[:4])}, the "
                "other does not. Was it trained with other code?"
            )

        set_peft_model_state_dict(self, weights)

    def head_operands(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A draft's operands, with what an adapter adds to its head."""
        return head_operands(self.get_base_model().lm_head, hidden)

    def _adapter_weights(self) -> dict[str, torch.Tensor]:
        # otherwise PEFT adds the whole head to an adapter on it
        return get_peft_model_state_dict(self, save_embedding_layers=False)


def head_operands(head: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(x, weight)` whose product `x @ weight.T` is what a head with or without an adapter makes from `hidden`.

    A head with LoRA is the product of `cat(hidden, A dropout(hidden))` and `cat(W, scale * B)`. So head and loss stay
    fused, also with dropout.

    Args:
        head: a linear module without bias.
        hidden: `(rows, hidden)`.

    Returns:
        `(rows, hidden + ranks)` and `(vocabulary, hidden + ranks)`, in the dtypes of `hidden` and of the head.
    """
    if not isinstance(head, LoraLinear) or head.disable_adapters or head.merged:
        return hidden, head.weight

    inputs, weights = [hidden], [head.weight]
    for name in head.active_adapters:
        if name in head.lora_A:
            down, up = head.lora_A[name].weight, head.lora_B[name].weight
            inputs.append(linear(head.lora_dropout[name](hidden.to(down.dtype)), down).to(hidden.dtype))
            weights.append((head.scaling[name] * up).to(head.weight.dtype))

    return torch.cat(inputs, dim=-1), torch.cat(weights, dim=-1)


def fingerprint(draft: EaglePreTrainedModel) -> str:
    """16 hex digits that change with any of the draft's own tensors; those lent by the target do not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_own(draft).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def adaptable(draft: EaglePreTrainedModel) -> list[str]:
    """Names of the projections that an adapter may sit on: those of the draft's layer, `fc`, and the head if it is the
    draft's own."""
    own = _own(draft)
    return [name for name, module in draft.named_modules() if isinstance(module, nn.Linear) and f"{name}.weight" in own]


def _own(draft: EaglePreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in draft.state_dict().items() if name not in draft.lent_tensors}


def _checked(draft: EaglePreTrainedModel, config: PeftConfig) -> LoraConfig:
    """A copy of the config that names existing modules of this draft, or all projections if it named none."""
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"`peft_config` must be a `LoraConfig`, which can be merged into a draft, got {kind}.")

    for name, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none"), ("target_parameters", None)):
        if getattr(config, name) != plain:
            raise ValueError(
                f"`{name}` of `peft_config` is {getattr(config, name)}, but a draft's weights cannot take that up when "
                "they are merged: leave it out."
            )

    config, linears = copy.deepcopy(config), adaptable(draft)
    whole = config.modules_to_save or []
    own = {name.rpartition(".")[0] for name in _own(draft)} - {""}
    # PEFT takes every module whose name ends so, even within a word
    trained_whole = {full for name in whole for full in _known(name, own, str.endswith, "lora_modules_to_save", draft)}

    wanted = config.target_modules
    if wanted in (None, "all-linear") or wanted == {"all-linear"}:
        config.target_modules = set(linears) - {"lm_head"} - trained_whole
    else:
        names = [wanted] if isinstance(wanted, str) else sorted(wanted)
        config.target_modules = {
            full for name in names for full in _known(name, linears, _is_last_part, "lora_target_modules", draft)
        }

    twice = sorted(trained_whole & config.target_modules)
    if twice:
        raise ValueError(
            f"`lora_modules_to_save` and `lora_target_modules` both hold {', '.join(twice)}: a module is trained whole "
            "or by an adapter, so leave it out of one of them."
        )
    return config


def _is_last_part(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _known(name: str, known: Iterable[str], fits, argument: str, draft: EaglePreTrainedModel) -> list[str]:
    """The modules that `name` stands for; `ValueError` if there are none."""
    found = [full for full in known if fits(full, name)]
    if not found:
        lent = {key.removesuffix(".weight") for key in draft.lent_tensors}
        why = "which is the target's and frozen" if name in lent else "which this draft does not have"
        raise ValueError(f"`{argument}` holds {name!r}, {why}: choose among {', '.join(sorted(known))}.")
    return found


def _plain(value):
    """A field of a saved config without the type and order that JSON gave it."""
    return sorted(value) if isinstance(value, (set, list, tuple)) and value else value or None
