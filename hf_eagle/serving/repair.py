"""Mend a draft folder where what was trained is still in it; a copy, never in place."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import rules_sglang, rules_vllm
from .draft_folder import DraftFolder, TargetFacts
from .rules_folder import SIZES, looks_absolute, rope_of


_ARCHITECTURES = {
    "eagle1": ["LlamaForCausalLMEagle", "EagleLlamaForCausalLM"],
    "eagle3": ["LlamaForCausalLMEagle3"],
    "mla": ["Eagle3DeepseekV2ForCausalLM"],
}
_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", "checkpoint_manifest.json")
_TOP, _NESTED = "eagle_aux_hidden_state_layer_ids", "eagle_config"


@dataclass
class Draft:
    """A draft in memory, being mended."""

    kind: str
    num_layers: int
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    target: TargetFacts | None
    done: list[str]

    def write(self, name: str, value: Any) -> None:
        """Set a field of the config and say so, if it is not so already."""
        if name not in self.config or self.config[name] != value:
            self.done.append(
                f"`{name}` is {json.dumps(value)} now, it was {json.dumps(self.config.get(name, 'missing'))}"
            )
            self.config[name] = value


def repair_draft(path: str | Path, output_dir: str | Path, target_config: Any = None) -> list[str]:
    """Write a mended copy of a draft folder.

    Args:
        path: the draft, which is left as it is.
        output_dir: a new or empty folder.
        target_config (`PreTrainedConfig`, *optional*): of its target; gives context length and default taps.

    Returns:
        What was mended, a line each. What could not be is still found by `check_draft`.

    Raises:
        FileExistsError: if `output_dir` is not empty.
        ValueError: if there is no draft in the folder.
    """
    output_dir, folder = Path(output_dir), DraftFolder.read(path)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"`fix` {output_dir} is not an empty folder: name a new one, nothing is overwritten.")
    if not any(name.endswith("fc.weight") for name in folder.shapes):
        raise ValueError(f"{path} holds no `fc.weight`, which every draft has: it is another kind of model.")
    missing = [name for name in SIZES if not isinstance(folder.config.get(name), int)]
    if missing:
        raise ValueError(f"`{missing[0]}` is missing in {path}/config.json, without which nothing can be mended.")
    target = None if target_config is None else TargetFacts.of(target_config)
    tensors = {name: folder.tensor(name) for name in folder.shapes}
    draft = Draft(folder.kind, folder.num_layers, json.loads(json.dumps(folder.config)), tensors, target, [])
    for step in (_names, _vocab_size, _vocabulary, _surplus, _bias, _kind, _sizes, _taps, _rope, _dtypes, _flags):
        step(draft)

    output_dir.mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(path).iterdir()):
        if file.is_file() and file.name != "config.json" and not file.name.endswith(_NOT_COPIED):
            shutil.copy(file, output_dir / file.name)
    (output_dir / "config.json").write_text(json.dumps(draft.config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in draft.tensors.items()}
    save_file(tensors, output_dir / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(output_dir / "config.json", output_dir / "model.safetensors")
    return draft.done


def _rename(draft: Draft, rename: Callable[[str], str], why: str) -> None:
    renamed = {rename(name): tensor for name, tensor in draft.tensors.items()}
    if renamed.keys() != draft.tensors.keys() and len(renamed) == len(draft.tensors):
        draft.done.append(why)
        draft.tensors = renamed


def _names(draft: Draft) -> None:
    _rename(draft, lambda name: name.removeprefix("model."), "`model.` is off the names of tensors")
    if draft.kind != "eagle1":
        _rename(draft, lambda name: name.replace("layers.0.", "midlayer."), "layer 0 is named `midlayer`")


def _vocab_size(draft: Draft) -> None:
    """By what the folder holds; the target's alone would make a draft of another one look like its own."""
    tensors = draft.tensors
    if draft.kind != "eagle1" and "t2d" in tensors:
        draft.write("vocab_size", len(tensors["t2d"]))
    elif draft.kind != "eagle1" and "d2t" not in tensors and "lm_head.weight" in tensors:
        draft.write("vocab_size", len(tensors["lm_head.weight"]))


def _vocabulary(draft: Draft) -> None:
    """Offsets in ascending order of the target's ids, and rows of the head with them."""
    if draft.kind == "eagle1" or "d2t" not in draft.tensors or "lm_head.weight" not in draft.tensors:
        return
    tensors, vocab = draft.tensors, draft.config["vocab_size"]
    d2t, numbers = tensors["d2t"].long(), torch.arange(len(tensors["d2t"]))
    if looks_absolute(d2t, tensors.get("t2d"), vocab):
        d2t = d2t - numbers
        draft.done.append("`d2t` holds offsets now, it held ids")
    ids = d2t + numbers
    head = tensors["lm_head.weight"]
    sound = (
        len(ids) == len(head) and ids.unique().numel() == len(ids) and 0 <= int(ids.min()) and int(ids.max()) < vocab
    )
    if not sound:
        return
    order = ids.argsort()
    if not torch.equal(order, numbers):
        draft.done.append("`d2t` and the rows of `lm_head.weight` are in the order of the target's ids")
        tensors["lm_head.weight"], ids = head[order], ids[order]
    t2d = torch.zeros(vocab, dtype=torch.bool)
    t2d[ids] = True
    if len(ids) == vocab:
        draft.done.append("`d2t` is gone: the draft has the whole vocabulary")
        del tensors["d2t"]
        return
    if not torch.equal(t2d, tensors.get("t2d", ~t2d).bool()):
        draft.done.append("`t2d` marks the tokens that `d2t` names")
    tensors["d2t"], tensors["t2d"] = ids - numbers, t2d


def _surplus(draft: Draft) -> None:
    wanted = rules_vllm.parameters(draft.config, draft.kind, draft.num_layers).keys()
    wanted |= rules_sglang.parameters(draft.config, draft.kind, draft.num_layers).keys()
    if draft.kind != "eagle1" and "d2t" in draft.tensors:
        wanted |= {"d2t", "t2d"}
    for name in [name for name in draft.tensors if name.replace("midlayer.", "layers.0.") not in wanted]:
        biased = name.endswith(".bias") and draft.tensors[name].any()
        inside = name.startswith(("layers.", "midlayer.")) and not name.endswith(".bias")
        if biased or inside or "norm" in name:
            continue  # training may have used it, and the draft without it is another
        del draft.tensors[name]
        draft.done.append(f"`{name}` is gone: no server has a place for it")


def _bias(draft: Draft) -> None:
    if draft.kind == "eagle1" and "fc.bias" not in draft.tensors and "fc.weight" in draft.tensors:
        draft.tensors["fc.bias"] = torch.zeros_like(draft.tensors["fc.weight"][:, 0])
        draft.done.append("`fc.bias` holds zeros")


def _kind(draft: Draft) -> None:
    wanted = _ARCHITECTURES[draft.kind]
    if not set(wanted) <= set(draft.config.get("architectures") or []):
        draft.write("architectures", wanted)
    known = ("kimi_k2", "deepseek_v2") if draft.kind == "mla" else ("llama",)
    if draft.config.get("model_type") not in known:
        draft.write("model_type", known[0])


def _sizes(draft: Draft) -> None:
    config, tensors = draft.config, draft.tensors
    draft.write("num_hidden_layers", draft.num_layers)
    if draft.target is not None:
        needed = max(draft.target.max_positions, rules_sglang.needed_positions(config, draft.target))
        if (config.get("max_position_embeddings") or 0) < needed:
            draft.write("max_position_embeddings", needed)
    if draft.kind == "eagle1":
        return
    if "lm_head.weight" in tensors:
        draft.write("draft_vocab_size", len(tensors["lm_head.weight"]))
    if any(name.startswith("fc_norm.") for name in tensors):
        draft.write("fc_norm", True)
    columns = tensors["fc.weight"].shape[-1]
    if config.get("target_hidden_size") is None and columns % config["hidden_size"] == 0:
        draft.write("target_hidden_size", config["hidden_size"])
    ids = config.get(_TOP) or (config.get(_NESTED) or {}).get(_TOP) or [2, 3, 4]
    if columns == len(ids) * (config.get("target_hidden_size") or 0):
        draft.write("num_aux_hidden_states", len(ids))


def _taps(draft: Draft) -> None:
    """Both spellings of the taps. How SGLang counts depends on the target; where the spellings disagree, only one that
    is the target's default shows which of them was trained."""
    config, target = draft.config, draft.target
    if draft.kind == "eagle1" or target is None:
        return
    default = [2, target.num_layers // 2, target.num_layers - 3]
    said = [list(ids) for ids in (config.get(_TOP), rules_sglang.captured_ids(config, target)) if ids]
    if not said:
        said = [default] if config.get("num_aux_hidden_states", 3) == 3 else []
    entries = default if default in said else said[0] if said else None
    if entries is None or (entries != default and said != [entries] * len(said)):
        return
    if entries != sorted(set(entries)):
        return  # which columns of `fc` belong to which tap is not known
    draft.write(_TOP, entries)
    for less in (1, 0):
        told = {**(config.get(_NESTED) or {}), "use_aux_hidden_state": True, _TOP: [i - less for i in entries]}
        if rules_sglang.captured_ids({_NESTED: told}, target) == entries:
            draft.write(_NESTED, told)
            return


def _rope(draft: Draft) -> None:
    config = draft.config
    new, old = rope_of(config, "new"), rope_of(config, "old")
    theta, scaling = new if config.get("rope_parameters") else old
    theta = old[0] if theta is None else theta
    if theta is None or (None not in (new[0], old[0]) and new != old):
        return  # lost, or nobody knows which
    draft.write("rope_parameters", {"rope_type": "default", **scaling, "rope_theta": theta})
    draft.write("rope_theta", theta)
    draft.write("rope_scaling", scaling or None)


def _dtypes(draft: Draft) -> None:
    """One dtype, that of most numbers."""
    held: dict[torch.dtype, int] = {}
    for tensor in draft.tensors.values():
        if tensor.is_floating_point():
            held[tensor.dtype] = held.get(tensor.dtype, 0) + tensor.numel()
    most = max(held, key=lambda dtype: held[dtype])
    for name, tensor in draft.tensors.items():
        if tensor.is_floating_point() and tensor.dtype != most:
            draft.tensors[name] = tensor.to(most)
            draft.done.append(f"`{name}` is of the others' dtype")
    for name in ("dtype", "torch_dtype"):
        draft.write(name, str(most).removeprefix("torch."))


def _flags(draft: Draft) -> None:
    config = draft.config
    draft.write("tie_word_embeddings", False)
    for name in ("attention_bias", "mlp_bias", "bias", "qkv_bias"):
        if config.get(name):  # tensors of biases are gone by now
            draft.write(name, False)
    for name in ("use_cache", "logit_scale"):
        if name in config and config[name] in (False, None):
            del config[name]
            draft.done.append(f"`{name}` is gone")
