"""`from_foreign`: turn a draft of another project into a draft of ours with the same outputs."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..door.config_numbers import check_config_numbers
from ..door.reading import reading
from ..drafts.build import class_of
from ..drafts.modeling_base import EaglePreTrainedModel
from ..drafts.vocabulary import tokenizer_fingerprint
from ..targets.loading import load_config, load_tokenizer
from ..targets.weights import check_tensors
from .fields import check_flags, draft_config, flat_config
from .files import has_tokenizer, read_config, read_target_embedding, read_target_head, read_tensors
from .forms import Form, form_of
from .kinds import ForeignKind, kind_of
from .tensors import check_embedding, check_head, check_names, check_taps, renamed, weights_dtype


logger = logging.getLogger(__name__)

_LENT = {"embeddings": check_embedding, "head": check_head}


def from_foreign(
    path: str | Path,
    target: str | Path,
    form: str = "auto",
    tap_ids: list[int] | None = None,
    rope_theta: float | None = None,
    drop_fc_bias: bool = False,
    trust_remote_code: bool = False,
) -> EaglePreTrainedModel:
    """Read a draft that another project published; call `save_pretrained` on the result to write our folder.

    A form is how one project writes drafts (`forms.py`), a kind is the architecture of one (`kinds.py`). The draft's
    own code never runs, and a pickle that holds anything but tensors is refused. The target's config and tokenizer are
    read. So are its embeddings and its head, if they are on this machine and the draft's files hold copies of them.

    Args:
        path: the draft, a folder or a Hub id.
        target: its target, a folder or a Hub id.
        form: one of `FORMS`; `"auto"` recognises it from the config and the names of tensors.
        tap_ids: entry ids of the taps, if the draft's files do not tell them and it was not trained on the default
            ones. Ids that differ from those in the files, or in their order, are refused.
        rope_theta: the RoPE base that the draft was trained with, if its config gives a different one.
        drop_fc_bias: leave out the trained `fc.bias` of an EAGLE-1 draft, as vLLM does.
        trust_remote_code: run code that comes with the target's config or tokenizer.

    Returns:
        The draft, in the dtype of its tensors. Call its `attach` with a target before using it.

    Raises:
        ValueError: if our drafts cannot have a flag or tensor, or it does not fit the target; the message names it.
        OSError: if files are missing.

    Example:
        >>> from_foreign("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", "my/llama").save_pretrained("draft")
    """
    config = read_config(path)
    tensors = read_tensors(path)
    target_config = load_config(str(target), trust_remote_code=trust_remote_code)
    text = target_config.get_text_config()
    # a field of the config may have any type: whatever fails over one is an error of config.json
    with reading("draft", path, "config.json"):
        found_form = form_of(form, config, tensors)
        kind = kind_of(found_form, config)
        logger.info("%s: a draft in the form `%s` (%s)", path, found_form.name, found_form.project)
        _check_options(found_form, kind, tap_ids, rope_theta, drop_fc_bias)

        # before the tensors are renamed, since their names help to tell what the tap ids count
        stored_taps = kind.stored_taps(found_form, found_form.filled(config), tensors, text.num_hidden_layers)
        config = flat_config(found_form, kind, config)
        check_config_numbers("draft", path, config)
        check_flags(found_form, kind, config)
        kind.check(config)

        # from here on `tensors` changes in place: it ends with what our draft stores
        tensors = renamed(found_form, kind.layer, tensors, kind.several_layers)
        kind.take_biases(tensors, drop_fc_bias)
        _check_target(config, tensors, target_config, target)
        if kind.lent_head and "lm_head.weight" in tensors:
            _check_lent("head", tensors.pop("lm_head.weight"), read_target_head(target), target)
        draft_vocab_size = kind.take_vocabulary(tensors, text.vocab_size)

        _check_taps_agree(tap_ids, stored_taps)
        own_config = draft_config(kind, config, target_config, draft_vocab_size, tap_ids or stored_taps, rope_theta)
        check_taps(tensors.get("fc.weight"), text.hidden_size, own_config.tap_ids)
        own_config.tokenizer_fingerprint = _common_fingerprint(path, config, target, trust_remote_code)
        _log_choices(found_form, config, own_config, stored_taps, tap_ids)
        return _build(own_config, tensors, path)


def _check_options(
    form: Form, kind: ForeignKind, tap_ids: list[int] | None, rope_theta: float | None, drop_fc_bias: bool
) -> None:
    for name, value in (("tap_ids", tap_ids), ("drop_fc_bias", drop_fc_bias)):
        if value and name in kind.meaningless:
            raise ValueError(kind.meaningless[name].format(value=value, form=form.name))

    if rope_theta is not None and rope_theta <= 0:
        raise ValueError(f"`rope_theta` must be above 0, got {rope_theta}.")


def _check_taps_agree(given: list[int] | None, stored: list[int] | None) -> None:
    # in another order they would give the columns of `fc` other layers
    if given and stored and list(given) != list(stored):
        raise ValueError(
            f"`tap_ids` is {given}, but the draft's own files say that it was trained on {stored}, in this order: "
            "leave `tap_ids` out, or correct its config.json."
        )


def _build(config: Any, tensors: dict[str, torch.Tensor], path: str | Path) -> EaglePreTrainedModel:
    draft_class = class_of(config.architectures)
    with torch.device("meta"):  # gives names and shapes, and takes no memory
        empty = draft_class(config)

    expected = {name: x.shape for name, x in empty.state_dict().items() if name not in empty.lent_tensors}
    check_names(tensors, expected)
    check_tensors("draft", path, tensors)

    dtype = weights_dtype(tensors)
    return draft_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype).eval()


def _check_target(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], target_config: PreTrainedConfig, target: str | Path
) -> None:
    """Check that the draft's sizes and embeddings are the target's; remove the embeddings from `tensors`."""
    text = target_config.get_text_config()
    t2d, embedding = tensors.get("t2d"), tensors.pop("embed_tokens.weight", None)
    sizes = {
        "vocab_size": (config.get("vocab_size") or text.vocab_size, text.vocab_size),
        "hidden_size": (config.get("hidden_size") or text.hidden_size, text.hidden_size),
        "target_hidden_size": (config.get("target_hidden_size") or text.hidden_size, text.hidden_size),
        "t2d": (text.vocab_size if t2d is None else t2d.numel(), text.vocab_size),
    }

    reasons = {"hidden_size": "a draft of a different width needs its own embeddings, which servers do not load"}
    for name, (actual, expected) in sizes.items():
        if actual != expected:
            reason = reasons.get(name, "it was made for a different target")
            raise ValueError(f"`{name}` of this draft is {actual}, but `target` {target} has {expected}: {reason}.")

    if embedding is not None:
        _check_lent("embeddings", embedding, read_target_embedding(target), target)


def _check_lent(name: str, given: torch.Tensor, lent: torch.Tensor | None, target: str | Path) -> None:
    """Check that a table in the draft's file is the one that its target lends."""
    if lent is None:
        logger.warning(
            "The draft's %s were not compared with those of %s, which are not on this machine. Servers will use the "
            "target's.",
            name,
            target,
        )
    else:
        _LENT[name](given, lent)


def _common_fingerprint(
    path: str | Path, config: dict[str, Any], target: str | Path, trust_remote_code: bool
) -> str | None:
    """Return the fingerprint of the target's tokenizer, `None` if it has none.

    Raise `ValueError` if the draft was made with a different tokenizer.
    """
    expected = _fingerprint(target, trust_remote_code, "target")
    actual = config.get("tokenizer_fingerprint") or _fingerprint(path, False, "draft")

    if None not in (expected, actual) and expected != actual:
        raise ValueError(
            f"`draft` {path} has a different tokenizer from `target` {target} (fingerprints {actual} and {expected}): "
            "its head predicts other tokens."
        )

    if expected is None:
        logger.warning("%s has no tokenizer, so it is not known whether the draft was made with the same one.", target)
    return expected


def _fingerprint(path: str | Path, trust_remote_code: bool, argument: str) -> str | None:
    if not has_tokenizer(path, argument):
        return None
    return tokenizer_fingerprint(load_tokenizer(str(path), argument=argument, trust_remote_code=trust_remote_code))


def _log_choices(
    form: Form, config: dict[str, Any], own_config: Any, stored: list[int] | None, given: list[int] | None
) -> None:
    """Log the taps and the RoPE that were chosen, and where training may have differed from the draft's files."""
    if own_config.tap_ids:
        source = "from `tap_ids`" if given else "from its config" if stored else "the default: its files tell none"
        logger.info("taps: the inputs of layers %s (%s)", ", ".join(map(str, own_config.tap_ids)), source)

    rope = own_config.rope_parameters
    logger.info("RoPE: %s, base %g", rope.get("rope_type", "default"), rope["rope_theta"])
    scaled = rope.get("rope_type") in ("yarn", "linear") and rope["rope_theta"] != 10000
    if scaled and form.trains_on_default_base:
        logger.warning(
            "%s trains with RoPE base 10000 if RoPE is scaled, whatever the config says, but both servers use the "
            "config's base. If this draft was trained that way, set `rope_theta` to 10000.",
            form.project,
        )

    if form.name == "specforge" and config.get("norm_output"):
        logger.warning(
            "`norm_output` is true, and stays so, since both servers read it. But SpecForge before September 2026 "
            "ignored it and fed back the un-normed output, so this draft may have been trained that way."
        )
