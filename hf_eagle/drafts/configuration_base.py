"""What the configs of all drafts share: the `config.json` that vLLM and SGLang read (contract section 5)."""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from ..decoding.checks import DEFAULTS
from ..targets.architectures import family_of
from ..targets.config_fields import fields_of_most_layers, read_field
from .rope import check_mscales, draft_rope, positions_for
from .vocabulary import check_draft_vocab_size, told_filled


# older readers expect everything but the base in rope_scaling
_ROPE_BASE = "rope_theta"
# how configs of mixtures spell the number of experts that a token goes through, an expert's width, and that of the
# experts which all tokens go through
_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk", "moe_k")
_EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size")
_SHARED_WIDTH = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")


class DraftConfig(LlamaConfig):
    """The config of a draft with Llama layers, whatever its kind.

    Each kind derives from it, checks its own fields in `_check`, and lists in `as_arguments` the command-line arguments
    that make it.

    Args:
        draft_vocab_size (`int`, *optional*, defaults to `vocab_size`):
            Rows of the draft's head. `vocab_size` is the target's.
        target_hidden_size (`int`, *optional*, defaults to `hidden_size`):
            Width of one tap.
        eagle_aux_hidden_state_layer_ids (`list[int]`, *optional*):
            Tap ids as layer ENTRY ids, ascending and unique (vLLM's convention).
        image_embeddings (`str`, defaults to `"token"`):
            What the draft embeds at a medium: its `"token"`, as vLLM does, or the output of the target's `"vision"`
            tower, as SGLang does. Neither server reads this field; decoding and checks do.
        draft_sliding_window (`int`, *optional*):
            Keys that the draft's attention sees, its own included, in training and in decoding; all of them if unset.
            Servers do not read this field, see [`EagleConfig`]. It says what the weights were trained with.
        tokenizer_fingerprint (`str`, *optional*): identity of the tokenizer of the vocabulary mapping.
        filled_tokens (`int`, *optional*): tokens of its vocabulary that its data do not supervise; only cards read it.

    Raises:
        ValueError: for a draft vocabulary that does not fit.
    """

    # an unknown model_type fails in vLLM; Llama-style drafts are "llama" for both servers
    model_type = "llama"
    ignore_keys_at_rope_validation = {"mrope_section", "mrope_interleaved"}
    # whether servers read YaRN's `mscale` and `mscale_all_dim` in such a draft
    reads_mscale = False
    chain_length = DEFAULTS["chain"]["num_speculative_tokens"]  # tokens drafted in a round, unless asked for others
    # arguments that `start_from` lets differ
    free_in_warm_start = ("draft_vocab_size", "draft_rope", "draft_sliding_window")
    reads_window = False  # whether vLLM gives such a draft its target's window, unless `sliding_window` is written

    num_hidden_layers: int = 1
    rms_norm_eps: float = 1e-5
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | tuple[int, ...] | None = None
    image_embeddings: str = "token"
    draft_sliding_window: int | None = None
    tokenizer_fingerprint: str | None = None
    filled_tokens: int | None = None

    def __post_init__(self, **kwargs):
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.eagle_aux_hidden_state_layer_ids is not None:
            self.eagle_aux_hidden_state_layer_ids = [int(i) for i in self.eagle_aux_hidden_state_layer_ids]

        super().__post_init__(**kwargs)
        self._check()

    def _validate_yarn_rope_parameters(self, *args, **kwargs) -> None:
        """Do not warn where the context is not `factor` times the original one: it is the target's, see `rope.py`."""

    def _check(self) -> None:
        """`ValueError` for what a draft of this kind cannot be."""
        check_draft_vocab_size(self.draft_vocab_size, self.vocab_size)

    def _require(self, kind: str, **wanted: Any) -> None:
        """Raise `ValueError` for the first of these fields that has a value other than the one given here."""
        for name, value in wanted.items():
            if getattr(self, name, value) != value:
                raise ValueError(f"`{name}` of {kind} draft must be {value}, got {getattr(self, name)}.")

    @property
    def tap_ids(self) -> list[int] | None:
        """Entry ids of the taps, ascending; `[]` for a draft that reads only the last hidden state."""
        return self.eagle_aux_hidden_state_layer_ids

    @property
    def mrope_section(self) -> list[int] | None:
        """Pairs of a head rotated by each of a token's three positions, `None` with one position (1-D RoPE)."""
        return (self.rope_parameters or {}).get("mrope_section")

    @property
    def num_taps(self) -> int:
        return 3 if self.tap_ids is None else len(self.tap_ids)

    def fit_to_data(self, tokenizer, data, embeddings, held: "DraftConfig | None" = None) -> None:
        """Complete a new draft's config with what depends on the tokenizer, the data and the target's table.

        Args:
            tokenizer: the target's.
            data: to train on, a `Dataset` or a stream.
            embeddings: `(vocab_size, hidden)`, the target's.
            held: config of the draft that training continues or starts from.

        Raises:
            ValueError: if it cannot be trained on these data.
        """

    def told_to_card(self) -> list[str]:
        """Sentences about the data for the model card, without their full stops."""
        filled = told_filled(self.filled_tokens)
        return [] if filled is None else [filled.removesuffix(".")]

    def as_arguments(self) -> dict[str, Any]:
        """The arguments that make this draft; they are equal for two drafts of one shape."""
        return {
            "draft_rope": "1d" if self.mrope_section is None else "mrope",
            "tap_ids": self.tap_ids,
            "draft_vocab_size": self.draft_vocab_size,
            "image_embeddings": self.image_embeddings,
        }


def mlp_width(config) -> int:
    """Width of the MLP of a draft for this target: what a token goes through in one of the target's layers.

    That is the width of the target's dense MLP. A mixture of experts may name none, or name an expert's instead, which
    is taken for one if it is below the hidden size. The draft's MLP is then as wide as all experts together that a
    token goes through, shared ones included. Where a mixture names a dense width too, that is often the same number
    (Qwen3-30B-A3B: 8 experts of 768, 6144; Qwen3-Next: 10 of 512 and one shared, 5632). A [`Family`] may know better.

    Raises:
        ValueError: if the config names neither, or layers differ in it.
    """
    text, family = config.get_text_config(), family_of(config)
    hidden = read_field(text, "hidden_size")
    if family is not None and family.mlp_factor is not None:
        return family.mlp_factor * hidden

    # Llama 4 has one width for its experts, another for its dense layers
    own = "set `draft_intermediate_size`, the width of the draft's MLP"
    dense = read_field(text, "intermediate_size_mlp", 0) or read_field(text, "intermediate_size", 0, instead=own)
    if dense >= hidden or not (experts := width_of_experts(text, dense)):
        return dense or read_field(text, "intermediate_size", instead=own)
    return experts


def width_of_experts(text, dense: int) -> int:
    """Width of all experts together that a token goes through; 0 if that is not known, or the target is no mixture."""

    def first(names: tuple[str, ...]) -> int:
        return next((value for name in names if (value := fields_of_most_layers(text, name)[0])), 0)

    named = first(_EXPERT_WIDTH)
    shared = first(_SHARED_WIDTH) or named * (fields_of_most_layers(text, "n_shared_experts")[0] or 0)
    return first(_EXPERTS_OF_A_TOKEN) * (named or dense) + shared


def fields_of_target(
    target_config: PreTrainedConfig,
    rope: dict[str, Any] | None = None,
    reads_mscale: bool = False,
    intermediate_size: int | None = None,
) -> dict[str, Any]:
    """What every draft copies from its target: widths, heads, RoPE, context length and special ids.

    Args:
        target_config: the target's (text) config.
        rope: `rope_parameters` of the draft, those of `draft_rope` if `None`.
        reads_mscale: see [`DraftConfig`].
        intermediate_size: width of the draft's MLP, that of [`mlp_width`] if `None`.

    Where layers differ in their heads (Gemma 4), the draft has the heads of most of them: it learns its own attention.

    Raises:
        ValueError: for RoPE that servers would not run so, and if the target's layers differ in one of these, or its
            config lacks it; the message names it.
    """
    text = target_config.get_text_config()
    hidden = read_field(text, "hidden_size")
    heads, key_value_heads, head_dim = fields_of_most_layers(
        text, "num_attention_heads", "num_key_value_heads", "head_dim"
    )
    heads = heads or read_field(text, "num_attention_heads")
    rope = draft_rope(text, reads_mscale=reads_mscale) if rope is None else rope
    if not reads_mscale:
        check_mscales(rope)

    return {
        "vocab_size": read_field(text, "vocab_size"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads or heads,
        "head_dim": head_dim or hidden // heads,
        "intermediate_size": mlp_width(target_config) if intermediate_size is None else intermediate_size,
        "rms_norm_eps": read_field(text, "rms_norm_eps", default=1e-5),
        "max_position_embeddings": positions_for(rope, text, read_field(text, "max_position_embeddings")),
        "rope_parameters": rope,
        "initializer_range": read_field(text, "initializer_range", default=0.02),
        **{name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def fields_of_head(target_config: PreTrainedConfig) -> dict[str, Any]:
    """What a target does to its logits, for drafts that use its head.

    Both servers read these names: they call the head without the target's own forward, so the draft's config must tell
    them what that does.
    """
    text = target_config.get_text_config()
    # Cohere multiplies its logits by `logit_scale`, Granite divides them by `logits_scaling`
    scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
    return {
        "logit_scale": None if scale == 1.0 else scale,
        "final_logit_softcapping": getattr(text, "final_logit_softcapping", None),
    }


def written_for_servers(config: DraftConfig, written: dict[str, Any]) -> dict[str, Any]:
    """Add to `written` every field that both servers read, with RoPE and dtype in the old and the new spelling."""
    for name in ("use_cache", "pretraining_tp", "attention_dropout", "_name_or_path"):
        written.pop(name, None)  # the trainer switches `use_cache` off; a server must not inherit that

    rope = dict(config.rope_parameters)
    scaling = {k: v for k, v in rope.items() if k != _ROPE_BASE}
    written["rope_parameters"] = rope
    written["rope_theta"] = rope[_ROPE_BASE]
    written["rope_scaling"] = None if scaling in ({}, {"rope_type": "default"}) else scaling

    dtype = written.get("dtype") or "float32"
    written.update(
        dtype=dtype, torch_dtype=dtype, tie_word_embeddings=False, num_hidden_layers=config.num_hidden_layers
    )
    for name in ("attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id"):
        written[name] = getattr(config, name)

    for name in ("tokenizer_fingerprint", "filled_tokens", "draft_sliding_window"):
        if written.get(name) is None:
            written.pop(name, None)
    return written
