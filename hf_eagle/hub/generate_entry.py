"""The source of `custom_generate/generate.py` of a published draft, which extends `generate` of plain transformers.

    model.generate(**inputs, custom_generate="you/your-draft", trust_remote_code=True, max_new_tokens=256)

`custom_generate.bundle` makes files of this function and all that it needs, next to a draft, so that users do not need
hf_eagle.
"""

from contextlib import contextmanager
from copy import deepcopy
from weakref import WeakKeyDictionary

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..decoding.generate import speculative_generate
from ..drafts.kinds import architecture_names, class_of
from ..targets.tapped import TappedModel


# the repository of this draft, written when it is published
DRAFT = None
# unsupported options that change the tokens of `generate`, with the values that change nothing
_NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (None, 1)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p"), (None, 1.0)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), (None, 0)),
    **dict.fromkeys(("min_new_tokens", "min_p", "penalty_alpha", "guidance_scale", "watermarking_config"), (None,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), (None, [])),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), (None,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), (None, 0.0)),
    **dict.fromkeys(("stop_strings", "max_time", "token_healing", "return_dict_in_generate"), (None, False)),
}
_loaded: WeakKeyDictionary = WeakKeyDictionary()  # model -> (folder or repository, draft)


def generate(
    model: PreTrainedModel,
    inputs=None,
    generation_config: GenerationConfig | None = None,
    streamer=None,
    input_ids=None,
    attention_mask=None,
    draft: str | None = None,
    method: str = "chain",
    num_speculative_tokens: int | None = None,
    depth: int | None = None,
    tree_top_k: int | None = None,
    total_tokens: int | None = None,
    **kwargs,
):
    """
    Generate as `model.generate` does, with the same tokens when greedy and the same distribution when sampling, but in
    fewer forward passes of the model.

    Args:
        model (`PreTrainedModel`):
            The target that the draft was trained for.
        inputs, input_ids, attention_mask, generation_config, streamer, kwargs:
            As for `generate`: prompts padded on the left, and options such as `max_new_tokens`, `do_sample`,
            `temperature`, `top_p`, `top_k` and `eos_token_id`.
        draft (`str`, *optional*):
            Folder or Hub id of a draft of the same kind. By default the repository that this file was published in.
        method (`str`, *optional*, defaults to `"chain"`):
            `"chain"`, with `num_speculative_tokens` (3) drafted per round, or `"tree"`, with `depth` (5), `tree_top_k`
            (8) and `total_tokens` (40).

    Returns:
        `torch.LongTensor`: `(batch, prompt + longest answer)`, as `generate` returns it.

    Raises:
        ValueError: if an unsupported argument of `generate` would change the tokens, or the draft was made for a
            different model.
    """
    ids = inputs if input_ids is None else input_ids
    if ids is None:
        raise ValueError("`input_ids` is missing: pass a tokenized prompt.")

    config = deepcopy(model.generation_config if generation_config is None else generation_config)
    left = config.update(**kwargs)
    _refuse(config, left)

    with _left_as_it_was(model):
        target = TappedModel(model)
        speaker = _draft_of(model, target, draft or DRAFT)
        target.tap_ids = speaker.config.tap_ids
        return speculative_generate(
            target,
            speaker,
            ids.to(target.device),
            attention_mask,
            max_new_tokens=_new_tokens(config, ids.shape[1]),
            method=method,
            num_speculative_tokens=num_speculative_tokens,
            depth=depth,
            top_k=tree_top_k,
            total_tokens=total_tokens,
            eos_token_ids=_as_list(config.eos_token_id),
            streamer=streamer,
            **_sampling(config),
        ).sequences


def _refuse(config: GenerationConfig, left: dict) -> None:
    """Raise a `ValueError` if an unsupported option would change the tokens."""
    changing = {name: value for name, value in left.items() if value is not None and value != [] and value is not False}
    for name, neutral in _NEUTRAL.items():
        if getattr(config, name, None) not in neutral:
            changing[name] = getattr(config, name)
    if changing:
        raise ValueError(
            f"`{next(iter(changing))}` is not supported with a draft: leave it out, or call `generate` without "
            "`custom_generate`."
        )


def _new_tokens(config: GenerationConfig, prompt: int) -> int:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None:
        return 20  # as in `generate`
    if config.max_length <= prompt:
        raise ValueError(f"`max_length` is {config.max_length}, but the prompt has {prompt} tokens: raise it.")
    return config.max_length - prompt


def _sampling(config: GenerationConfig) -> dict:
    if not config.do_sample:
        return {"temperature": 0.0}
    return {
        "temperature": 1.0 if config.temperature is None else config.temperature,
        "top_p": 1.0 if config.top_p is None else config.top_p,
        "sampling_top_k": config.top_k or None,
    }


def _as_list(ids) -> list[int]:
    if ids is None:
        return []
    return [int(i) for i in ids] if hasattr(ids, "__iter__") else [int(ids)]


def _draft_of(model: PreTrainedModel, target: TappedModel, name: str | None):
    if name is None:
        raise ValueError("`draft` is missing: pass the folder or the Hub id of the draft to use.")
    known, draft = _loaded.get(model, (None, None))
    if known != name or draft.device != target.device or draft.dtype != target.dtype:
        draft = _loaded_draft(name, target)
        _loaded[model] = (name, draft)
    return draft


def _loaded_draft(name: str, target: TappedModel):
    """Load a draft as the class that its config names; loading refuses missing and unexpected tensors."""
    names = PreTrainedConfig.get_config_dict(name)[0].get("architectures") or []
    draft_class = class_of(names)
    if draft_class is None:
        raise ValueError(
            f"`draft` {name} is not a draft that can be used here: `architectures` in its config.json is {names}, "
            f"known are {architecture_names()}."
        )
    draft = draft_class.from_pretrained(name, dtype=target.dtype).to(target.device)
    draft.attach(target)
    return draft.eval()


@contextmanager
def _left_as_it_was(model: PreTrainedModel):
    """Restore the model's mode and `requires_grad` on exit: decoding freezes it, but the caller may be training it."""
    training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)
