"""Arguments of training, as dataclasses for `HfArgumentParser`. They import instantly: no torch.

EAGLE's own arguments of training are in `objective.py`. Those shared by all verbs that load a target or render chats
are in `sources.py`. `training/recipe.py` joins all of them.
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from ..data.reading import parse_json
from ..door.names import check_hub_id
from ..drafts.kinds import Kind, kind_of_method
from ..drafts.rope import check_rope_scaling
from ..targets.latent import LATENT_SIZES
from .bounds import Bounds, Count, Mass, Positive, Share, Whole, Width, Workers, check_numbers
from .parser import argument as _arg
from .sources import MediaArguments, TargetSourceArguments, TemplateArguments


@dataclass
class TargetArguments(TargetSourceArguments):
    """The frozen target model."""

    _argument_group_name = "target"

    target: str = field(
        metadata={
            "help": "Target model: a folder or a Hub id, also of a PEFT adapter, which is merged into its base. None "
            "of its files are changed."
        }
    )
    base_model: str | None = _arg(None, "Hub id of the target for the draft's card. Unset: `target`, if it is one.")
    target_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _arg(
        "auto", "Data type the target runs in; `auto` keeps its checkpoint's."
    )
    tap_ids: list[Whole] | None = _arg(
        None,
        "Tapped layers as ascending entry ids (id k is the input of layer k, id N the final norm's). Unset: 2, N//2, "
        "N-3, as both servers assume.",
    )
    tap_method: Literal["hooks", "output_hidden_states"] = _arg(
        "hooks", "How taps are recorded; `output_hidden_states` is for models whose layers cannot be hooked."
    )
    attn_implementation: str | None = _arg(None, "Attention implementation of the target, as in transformers.")
    compile_target: bool = _arg(
        False, "`torch.compile` the target: takes a minute or two at the start, then each forward is a little faster."
    )
    target_sharding: Literal["none", "fsdp2", "tensor", "expert"] = _arg(
        "none",
        "Spread the target over the ranks, each of which loads only its share: `fsdp2` gathers a layer while it runs, "
        "`tensor` splits each layer's work, `expert` spreads a mixture's experts and treats the rest as `fsdp2`.",
    )
    target_shard_size: Count | None = _arg(
        None,
        "Ranks that together hold one whole target, for instance those of a machine; others hold further copies. "
        "Unset: all.",
    )
    target_cpu_offload: bool = _arg(False, "`fsdp2`: keep the shards in main memory, and gather layers from there.")

    def __post_init__(self):
        check_numbers(self)
        if self.base_model is not None:
            check_hub_id("base_model", self.base_model)
        if self.compile_target and self.target_sharding != "none":
            raise ValueError(
                f"`compile_target` cannot be combined with `target_sharding` {self.target_sharding}: leave one out."
            )

    @property
    def sharding(self) -> dict[str, str | int | bool | None]:
        """How the target is spread, as `FrozenTarget.from_pretrained` takes it."""
        sizes = {"shard_size": self.target_shard_size, "cpu_offload": self.target_cpu_offload}
        return {"sharding": self.target_sharding, **sizes}


@dataclass
class DraftArguments:
    """The draft that is trained."""

    _argument_group_name = "draft"

    method: str = _arg(
        "eagle3",
        "`eagle3`; or `eagle1`, which predicts the target's last hidden states and has neither taps nor its own "
        "vocabulary; `eagle2` trains the same draft as `eagle1`, to be decoded with a dynamic tree; or your own kind, "
        "registered before.",
    )
    draft_vocab_size: Count | None = _arg(
        None,
        "Number of tokens the draft can propose, the most frequent of the supervised ones. Unset, or `none`: the whole "
        "vocabulary.",
    )
    fill_vocabulary: bool = _arg(
        False,
        "If `draft_vocab_size` exceeds the number of different tokens in the data, fill it up with the tokenizer's "
        "most frequent ones: those with the lowest ids, as tokenizers number their merges. Unset: refuse such a size.",
    )
    draft_attention: Literal["auto", "llama", "mla"] = _arg(
        "auto",
        "Attention of the draft: grouped-query as in Llama, or DeepSeek's multi-head latent attention. `auto` is `mla` "
        "for a target that has it (DeepSeek, Kimi), `llama` for any other.",
    )
    q_lora_rank: Annotated[int, Bounds(least=0, most=2**17)] | None = _arg(
        None,
        "`mla`: rank of the queries' bottleneck, 0 for none (no server loads such a draft yet). Unset, as the next "
        "four: the target's, or DeepSeek-V3's for a target without latent attention.",
    )
    kv_lora_rank: Width | None = _arg(None, "`mla`: width of the latent that keys and values are made from.")
    qk_nope_head_dim: Width | None = _arg(None, "`mla`: part of a head's key that is not rotated.")
    qk_rope_head_dim: Width | None = _arg(None, "`mla`: part of a key that is rotated, shared by all heads.")
    v_head_dim: Width | None = _arg(None, "`mla`: width of a head's value.")
    draft_rope: Literal["1d", "mrope"] = _arg(
        "1d",
        "Positions of the draft if the target has m-RoPE (Qwen-VL): one per token, counted over all tokens, or the "
        "target's three.",
    )
    draft_rope_scaling: str | None = _arg(
        None,
        'RoPE scaling of the draft instead of the target\'s, as JSON: `{"rope_type": "yarn", "factor": 4.0, '
        '"original_max_position_embeddings": 8192}`. Types are default, linear, llama3 and yarn, with the fields that '
        "both servers read; `rope_theta` is the target's unless given.",
    )
    image_embeddings: Literal["token", "vision"] = _arg(
        "token",
        "What the draft embeds at an image or a video: its token, as vLLM does, or the output of the target's vision "
        "tower, as SGLang does.",
    )
    fc_norm: bool = _arg(False, "EAGLE-3.1: one RMSNorm per tap in front of `fc`.")
    norm_output: bool = _arg(False, "EAGLE-3.1: feed the normed output back instead of the residual stream.")
    draft_init: Literal["target", "random"] = _arg(
        "target", "Start with the target's rows in the head and its last tap passed through `fc`, or at random."
    )
    init_from: str | None = _arg(
        None,
        "Draft to start from, a folder or a Hub id: of the same shapes and taps, with any draft vocabulary. Rows of "
        "its head are carried over by token; rows of new tokens start as `draft_init` says. Has no effect on resuming, "
        "except with `use_peft`: the adapter is added to it.",
    )
    license: str | None = _arg(
        None, "Licence of the draft for its card, as the Hub spells it. Unset: the target's, if its card names one."
    )
    draft_attn_implementation: Literal["sdpa", "eager", "flex_attention"] = _arg(
        "sdpa",
        "Attention of the training-time test: `sdpa` uses the fused kernel of the device, `eager` is the slow "
        "reference.",
    )
    compile_draft: Literal["auto", "on", "off"] = _arg(
        "auto",
        "Compile what lies between the draft's matrix products (norms, rotation, SwiGLU, loss) into few kernels. "
        "`auto` does on a GPU; the first step then takes longer.",
    )

    def __post_init__(self):
        check_numbers(self)
        kind_of_method(self.method)  # refuses an unknown one here, not when it is first used

        if self.fill_vocabulary and self.draft_vocab_size is None:
            raise ValueError(
                "`fill_vocabulary` is set, but `draft_vocab_size` is not: say how many tokens to fill up to."
            )

        given = self.draft_rope_scaling
        self._rope_scaling = None if given is None else check_rope_scaling(parse_json(given, "`draft_rope_scaling`"))

        if given is not None and self.draft_rope != "1d":
            raise ValueError(
                f"`draft_rope_scaling` cannot be combined with `draft_rope` {self.draft_rope}, which no server scales: "
                "leave one out."
            )

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """The RoPE scaling that was asked for, as a draft's config takes it."""
        return self._rope_scaling

    @property
    def kind(self) -> Kind:
        """The kind of draft that is trained."""
        return kind_of_method(self.method)

    @property
    def latent_sizes(self) -> dict[str, int | None]:
        """The sizes of latent attention that were set, as a draft's config takes them."""
        sizes = {name: getattr(self, name) for name in LATENT_SIZES if getattr(self, name) is not None}
        return {**sizes, "q_lora_rank": None} if self.q_lora_rank == 0 else sizes


@dataclass
class AdapterArguments:
    """LoRA on the draft, by PEFT; names are those of TRL's `ModelConfig`."""

    _argument_group_name = "adapter"

    use_peft: bool = _arg(
        False,
        "Train a LoRA adapter on the draft that `init_from` names, instead of the draft itself. Saves the draft with "
        "the adapter merged in and, in `adapter/`, the adapter.",
    )
    lora_r: Width = _arg(16, "Rank of the adapter's matrices.")
    lora_alpha: Count = _arg(32, "The adapter is added with the factor `lora_alpha / lora_r`.")
    lora_dropout: Share = _arg(0.0, "Share of the adapter's inputs that is dropped in training.")
    lora_target_modules: list[str] | None = _arg(
        None,
        "Projections that get an adapter, by the last parts of their names. Unset: those of the draft's layer and "
        "`fc`; add `lm_head` for the head.",
    )
    lora_modules_to_save: list[str] | None = _arg(
        None, "Modules that are trained fully next to the adapter, such as `lm_head` or `norm` (every norm)."
    )

    def __post_init__(self):
        check_numbers(self)
        if not self.use_peft:
            for known in fields(self):
                if getattr(self, known.name) != known.default:
                    raise ValueError(
                        f"`{known.name}` is {getattr(self, known.name)}, but `use_peft` is not set: set it, or leave "
                        f"out `{known.name}`."
                    )

    def peft_config(self):
        """The [`~peft.LoraConfig`] that `EagleTrainer` takes; `None` without `use_peft`."""
        if not self.use_peft:
            return None

        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            modules_to_save=self.lora_modules_to_save,
        )


@dataclass
class DataArguments(TemplateArguments, MediaArguments):
    """Conversations to train on."""

    _argument_group_name = "data"

    train_data: list[str] = field(
        metadata={
            "help": "Chats to train on: JSON, JSONL, Parquet, CSV or Arrow files, folders, or Hub data sets, where "
            "`id:split` takes another split than train, `id:subset:split` a subset, and `id@revision` another commit."
        }
    )
    data_weights: list[Annotated[float, Bounds(above=0, most=1_000_000)]] | None = _arg(
        None,
        "One number for each of `train_data`: how often its records are taken. 0.5 is a random half, 2 is each twice; "
        "with `streaming`, shares of the mixture.",
    )
    data_licenses: list[str] | None = _arg(
        None, "Licence of each of `train_data`, for the card. Unset: those named by their own cards."
    )
    dataset_format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "text"] = _arg(
        "auto",
        "Form of the records; `auto` goes by their columns. `preference` takes the chosen answers; `text` is "
        "supervised as a whole or, if it is a rendered chat, after the headers of its answers.",
    )
    eval_data: list[str] | None = _arg(None, "Chats to evaluate on.")
    eval_share: Share = _arg(0.0, "Share of the training chats to hold out for evaluation when `eval_data` is unset.")
    max_length: Annotated[int, Bounds(least=4)] = _arg(
        2048, "Longest sequence in tokens, at most what the target reads; longer ones are cut and counted."
    )
    packing: bool = _arg(
        False,
        "Put whole conversations side by side in rows of `max_length` tokens instead of padding each. The loss stays "
        "that of the conversations; `per_device_train_batch_size` and `per_device_eval_batch_size` then count rows.",
    )
    streaming: bool = _arg(
        False,
        "Read and tokenise conversations during training, shuffled within 1,000, for data too large to prepare "
        "first. Needs `max_steps`; nothing can be packed, grouped by length, held out, stored as features or counted "
        "for a draft vocabulary. A batch counts records: one without an answer takes its place and adds nothing.",
    )
    skip_bad_media: bool = _arg(
        False, "Leave out, and count, conversations with media that cannot be loaded, instead of stopping."
    )
    skip_bad_records: bool = _arg(
        False, "Leave out, and count, records that cannot be read or rendered, instead of stopping."
    )
    last_turn_only: bool = _arg(False, "Train only on what follows the last user's message, not on every answer.")
    train_on_thoughts: bool = _arg(True, "Also train on the thoughts of answers, if the template writes them.")
    train_on_tool_calls: bool = _arg(True, "Also train on the tool calls of answers.")
    preprocessing_workers: Workers | None = _arg(None, "Number of processes that tokenise.")
    feature_store: str | None = _arg(
        None,
        "Folder of the target's features, made by scripts/cache_features.py: training reads them instead of running "
        "the target.",
    )
    cache_mode: Literal["read", "first_epoch"] = _arg(
        "read", "`feature_store` must hold everything; or is filled during the first epoch, and read after it."
    )
    store_dtype: Literal["bfloat16", "float32", "float8"] = _arg(
        "bfloat16", "Number format of `feature_store`; `float8` is e4m3 with a scale for each token and tap."
    )
    acceptance_prompts: str | None = _arg(
        None,
        "Prompts (.jsonl, .json, .txt) to decode during training, and at evaluations, to measure acceptance.",
    )
    acceptance_steps: Count | None = _arg(
        None, "Optimizer steps between measurements of acceptance; unset: only at evaluations."
    )
    acceptance_num_prompts: Count = _arg(16, "Number of `acceptance_prompts` to take, from the first on.")

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self)

        for name in ("data_weights", "data_licenses"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.train_data):
                raise ValueError(
                    f"`{name}` has {len(values)} values for the {len(self.train_data)} sources of `train_data`: give "
                    "one for each."
                )

        if not self.streaming and max(self.data_weights or [0]) > 1000:
            raise ValueError(
                f"`data_weights` holds {max(self.data_weights):g}, so each record would be taken so often: give at "
                "most 1000; only with `streaming` are they shares."
            )

        wrong = next((name for name in ("packing", "eval_share", "feature_store") if getattr(self, name)), None)
        if self.streaming and wrong:
            raise ValueError(f"`{wrong}` needs the whole data, which `streaming` never has: leave one of them out.")

        for name, default in (("cache_mode", "read"), ("store_dtype", "bfloat16")):
            if self.feature_store is None and getattr(self, name) != default:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but `feature_store` names no folder.")

        if self.acceptance_steps is not None and self.acceptance_prompts is None:
            raise ValueError(f"`acceptance_steps` is {self.acceptance_steps}, but `acceptance_prompts` names no file.")


@dataclass
class DryRunArguments:
    """Report what a run would hold, instead of running it."""

    _argument_group_name = "dry run"

    dry_run: bool = _arg(
        False,
        "Print what every rank would hold, from the configs alone, and stop. `target` may then be a folder with "
        "only its `config.json`.",
    )
    world_size: Annotated[int, Bounds(least=1, most=2**20)] = _arg(1, "`dry_run`: number of ranks.")
    device_memory_gb: Positive | None = _arg(None, "`dry_run`: warn if a rank needs more GiB than this.")
    supervised_share: Mass = _arg(
        1.0, "`dry_run`: share of a batch's tokens that belong to an answer; 1 is the most there can be."
    )

    def __post_init__(self):
        check_numbers(self)
        for other in fields(self):
            value = getattr(self, other.name)
            if not self.dry_run and value != other.default:
                raise ValueError(f"`{other.name}` is {value}, but only `dry_run` reads it: leave it out, or set that.")
