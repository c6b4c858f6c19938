"""`from_foreign`: turn a draft that another project published into one of ours that computes the same."""

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
from .files import has_tokenizer, read_config, read_target_embedding, read_tensors
from .forms import Form, form_of, stored_tap_ids
from .kinds import ForeignKind, kind_of
from .tensors import check_embedding, check_names, check_taps, renamed, weights_dtype


logger = logging.getLogger(__name__)


def from_foreign(
    path: str | Path,
    target: str | Path,
    form: str = "auto",
    tap_ids: list[int] | None = None,
    rope_theta: float | None = None,
    drop_fc_bias: bool = False,
    trust_remote_code: bool = False,
) -> EaglePreTrainedModel:
    """Read a draft that another project published; `save_pretrained` of the result writes our folder.

    The forms are those of `forms.py`. None of the draft's code runs, and a pickle with more than tensors is refused. Of
    the target it reads config, tokenizer and, if they are on this machine, embeddings.

    Args:
        path: the draft, a folder or a Hub id.
        target: its target, a folder or a Hub id.
        form: one of `FORMS`; `"auto"` recognises it by config and tensor names.
        tap_ids: entry ids of the taps, if the draft's files name none and it was not trained on the default; refused if
            they name others.
        rope_theta: the RoPE base that the draft was trained with, if its config names another.
        drop_fc_bias: leave out the trained `fc.bias` of an EAGLE-1 draft, as vLLM does.
        trust_remote_code: run code that comes with the target's config or tokenizer.

    Returns:
        The draft, in the dtype of its tensors; `attach` a target before using it.

    Raises:
        ValueError: names the flag or tensor that our drafts cannot have, or that does not fit the target.
        OSError: if files are missing.

    Example:
        >>> from_foreign("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", "my/llama").save_pretrained("draft")
    """
    config = read_config(path)
    tensors = read_tensors(path)
    target_config = load_config(str(target), trust_remote_code=trust_remote_code)
    text = target_config.get_text_config()
    with reading("draft", path, "config.json"):  # its fields may have any type
        written = form_of(form, config, tensors)
        kind = kind_of(written, config)
        logger.info("%s: a draft in the form `%s` (%s)", path, written.name, written.project)
        _check_options(written, kind, tap_ids, rope_theta, drop_fc_bias)

        stored = stored_tap_ids(written, config, tensors, text.num_hidden_layers)
        config = flat_config(written, config)
        check_config_numbers("draft", path, config)
        check_flags(written, kind, config)

        tensors = renamed(written, kind.layer, tensors)
        kind.take_biases(tensors, drop_fc_bias)
        _check_target(config, tensors, target_config, target)
        size = kind.take_vocabulary(tensors, text.vocab_size)

        _check_taps_agree(tap_ids, stored)
        ours = draft_config(kind, config, target_config, size, tap_ids or stored, rope_theta)
        check_taps(tensors.get("fc.weight"), text.hidden_size, ours.tap_ids)
        ours.tokenizer_fingerprint = _common_fingerprint(path, config, target, trust_remote_code)
        _say(written, config, ours, stored, tap_ids)
        return _build(ours, tensors, path)


def _check_options(
    form: Form, kind: ForeignKind, tap_ids: list[int] | None, rope_theta: float | None, drop_fc_bias: bool
) -> None:
    for name, value in (("tap_ids", tap_ids), ("drop_fc_bias", drop_fc_bias)):
        if value and name in kind.meaningless:
            raise ValueError(kind.meaningless[name].format(value=value, form=form.name))

    if rope_theta is not None and rope_theta <= 0:
        raise ValueError(f"`rope_theta` must be above 0, got {rope_theta}.")


def _check_taps_agree(given: list[int] | None, stored: list[int] | None) -> None:
    if given and stored and sorted(given) != sorted(stored):
        raise ValueError(
            f"`tap_ids` is {given}, but the draft's own files say {stored}, which it was trained on: leave `tap_ids` "
            "out, or correct its config.json."
        )


def _build(config: Any, tensors: dict[str, torch.Tensor], path: str | Path) -> EaglePreTrainedModel:
    draft_class = class_of(config.architectures)
    with torch.device("meta"):  # names and shapes without memory
        empty = draft_class(config)

    wanted = {name: x.shape for name, x in empty.state_dict().items() if name not in empty.lent_tensors}
    check_names(tensors, wanted)
    check_tensors("draft", path, tensors)

    dtype = weights_dtype(tensors)
    return draft_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype).eval()


def _check_target(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], target_config: PreTrainedConfig, target: str | Path
) -> None:
    """Check sizes of draft and target, and the embeddings, which it removes from `tensors`."""
    text = target_config.get_text_config()
    t2d, embedding = tensors.get("t2d"), tensors.pop("embed_tokens.weight", None)
    sizes = {
        "vocab_size": (config.get("vocab_size") or text.vocab_size, text.vocab_size),
        "hidden_size": (config.get("hidden_size") or text.hidden_size, text.hidden_size),
        "target_hidden_size": (config.get("target_hidden_size") or text.hidden_size, text.hidden_size),
        "t2d": (text.vocab_size if t2d is None else t2d.numel(), text.vocab_size),
    }

    for name, (seen, wanted) in sizes.items():
        if seen != wanted:
            reason = (
                "a draft of another width than its target needs its own embeddings, which servers do not use"
                if name == "hidden_size"
                else "it is a draft of another target"
            )
            raise ValueError(f"`{name}` of this draft is {seen}, but `target` {target} has {wanted}: {reason}.")

    if embedding is None:
        return
    theirs = read_target_embedding(target)
    if theirs is None:
        logger.warning(
            "The draft holds embeddings, and those of %s are not on this machine: they were not compared, and the "
            "draft will be served with the target's.",
            target,
        )
    else:
        check_embedding(embedding, theirs)


def _common_fingerprint(
    path: str | Path, config: dict[str, Any], target: str | Path, trust_remote_code: bool
) -> str | None:
    """Fingerprint of the target's tokenizer, `None` without one; `ValueError` if the draft comes with another one."""
    wanted = _fingerprint(target, trust_remote_code, "target")
    given = config.get("tokenizer_fingerprint") or _fingerprint(path, False, "draft")

    if None not in (wanted, given) and wanted != given:
        raise ValueError(
            f"`draft` {path} comes with another tokenizer than `target` {target} (fingerprints {given} and {wanted}): "
            "its head predicts other tokens."
        )

    if wanted is None:
        logger.warning("%s has no tokenizer that can be read: a draft for another tokenizer goes unnoticed.", target)
    return wanted


def _fingerprint(path: str | Path, trust_remote_code: bool, argument: str) -> str | None:
    if not has_tokenizer(path, argument):
        return None
    return tokenizer_fingerprint(load_tokenizer(str(path), argument=argument, trust_remote_code=trust_remote_code))


def _say(form: Form, config: dict[str, Any], ours: Any, stored: list[int] | None, given: list[int] | None) -> None:
    """Log what was decided, and what the files leave open."""
    if ours.tap_ids:
        source = "given" if given else "its config's" if stored else "the default, since its files name none"
        logger.info("taps: the inputs of layers %s (%s)", ", ".join(map(str, ours.tap_ids)), source)

    rope = ours.rope_parameters
    logger.info("RoPE: %s, base %g", rope.get("rope_type", "default"), rope["rope_theta"])
    scaled = rope.get("rope_type") in ("yarn", "linear") and rope["rope_theta"] != 10000
    if scaled and form.trains_on_default_base:
        logger.warning(
            "%s trains with RoPE base 10000 if RoPE is scaled, whatever the config says; both servers take the "
            "config's. If this draft was trained so, give `rope_theta` 10000.",
            form.project,
        )

    if form.name == "specforge" and "norm_output" in config:
        logger.warning(
            "`norm_output` is %s, which is kept as the servers read it; SpecForge before September 2026 fed back the "
            "un-normed output anyway.",
            config["norm_output"],
        )
