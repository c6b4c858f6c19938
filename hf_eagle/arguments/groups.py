"""Arguments of training, as dataclasses for `HfArgumentParser`. They import instantly: no torch.

EAGLE's own arguments of training are in `objective.py`. Those shared by all verbs that load a target or render chats
are in `sources.py`. `training/run_arguments.py` joins all of them.
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from ..data.reading import parse_json
from ..door.names import check_hub_id
from ..drafts.kinds import Kind, kind_of_method
from ..drafts.rope import check_rope_scaling
from ..targets.latent import LATENT_SIZES
from .blocks import BlockDraftArguments
from .bounds import Bounds, Count, Mass, Positive, Share, Whole, Width, Workers, check_numbers
from .parser import argument as _arg
from .parser import is_none
from .served import ServedTargetArguments
from .sources import MediaArguments, TargetSourceArguments, TemplateArguments


@dataclass
class TargetArguments(TargetSourceArguments, ServedTargetArguments):
    """The frozen target model."""

    _argument_group_name = "target"

    target: str = field(
        metadata={
            "help": "Target model, or a PEFT adapter, which is merged into its base model: a folder or a Hub id. Its "
            "files are not changed."
        }
    )
    base_model: str | None = _arg(None, "Hub id of the target, for the model card. Unset: `target`, if it is one.")
    target_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _arg(
        "auto", "Data type that the target runs in; `auto` keeps that of its checkpoint."
    )
    tap_ids: list[Whole] | None = _arg(
        None,
        "Layers to tap, as ascending entry ids: id k is the input of layer k, id N that of the final norm. Unset: 2, "
        "N//2, N-3, as both servers assume; on Qwen3-VL 4, N//2, N-3, after the layers that add image features. "
        "DFlash: evenly spread from 2 to N-2, as many as the draft has layers, and at least 3.",
    )
    tap_method: Literal["hooks", "output_hidden_states"] = _arg(
        "hooks", "How taps are recorded; `output_hidden_states` is for models whose layers cannot be hooked."
    )
    attn_implementation: str | None = _arg(None, "Attention implementation of the target, as in transformers.")
    compile_target: bool = _arg(
        False, "Compile the target with `torch.compile`: a slow start (a minute or two), then a little faster steps."
    )
    target_sharding: Literal["none", "fsdp2", "tensor", "expert"] = _arg(
        "none",
        "Spread the target over the ranks, each of which loads only its share: `fsdp2` gathers each layer while it "
        "runs, `tensor` splits the work of each layer, `expert` spreads the experts of a mixture-of-experts model and "
        "treats the rest as `fsdp2` does.",
    )
    target_shard_size: Count | None = _arg(
        None,
        "Number of ranks that hold one whole target between them, for instance those of one machine; the other ranks "
        "hold further copies. Unset: all ranks.",
    )
    target_cpu_offload: bool = _arg(False, "`fsdp2`: keep the shards in main memory and gather layers from there.")

    def __post_init__(self):
        check_numbers(self)
        self.check_server()
        if self.base_model is not None:
            check_hub_id("base_model", self.base_model)
        if self.compile_target and self.target_sharding != "none":
            raise ValueError(
                f"`compile_target` cannot be combined with `target_sharding` {self.target_sharding}: leave one out."
            )

    @property
    def sharding(self) -> dict[str, str | int | bool | None]:
        """Return how the target is spread, as arguments of `FrozenTarget.from_pretrained`."""
        sizes = {"shard_size": self.target_shard_size, "cpu_offload": self.target_cpu_offload}
        return {"sharding": self.target_sharding, **sizes}


@dataclass
class DraftArguments(BlockDraftArguments):
    """The draft that is trained."""

    _argument_group_name = "draft"

    method: str = _arg(
        "eagle3",
        "Kind of draft: `eagle3`; `eagle1`, which predicts the target's last hidden states and has neither taps nor a "
        "vocabulary of its own; `eagle2`, which trains the same draft as `eagle1`, to be decoded with a dynamic tree; "
        "`dflash`, which proposes a block of tokens in one forward; or a kind that you have registered.",
    )
    draft_vocab_size: Count | None = _arg(
        None,
        "Number of tokens that the draft can propose: those supervised most often in the data. Unset, or `none`: the "
        "whole vocabulary.",
    )
    fill_vocabulary: bool = _arg(
        False,
        "If the data hold fewer different tokens than `draft_vocab_size`, add the tokenizer's most frequent ones: "
        "those with the lowest ids, since tokenizers number their merges by frequency. Unset: refuse such a size.",
    )
    draft_attention: Literal["auto", "llama", "mla"] = _arg(
        "auto",
        "Attention of the draft: grouped-query as in Llama, or DeepSeek's multi-head latent attention. `auto` is `mla` "
        "for a target that has it (DeepSeek, Kimi), `llama` for any other.",
    )
    draft_intermediate_size: Width | None = _arg(
        None,
        "Width of the draft's MLP. Unset: that of the target's dense MLP, or of all experts together that a token goes "
        "through.",
    )
    q_lora_rank: Annotated[int, Bounds(least=0, most=2**17)] | None = _arg(
        None,
        "`mla`: rank of the queries' bottleneck, 0 for none (no server loads such a draft yet). If this or one of the "
        "next four is unset: the target's value, or DeepSeek-V3's for a target without latent attention.",
    )
    kv_lora_rank: Width | None = _arg(None, "`mla`: width of the latent that keys and values are made from.")
    qk_nope_head_dim: Width | None = _arg(None, "`mla`: width of the part of a head's key that is not rotated.")
    qk_rope_head_dim: Width | None = _arg(None, "`mla`: width of the rotated part of a key, which all heads share.")
    v_head_dim: Width | None = _arg(None, "`mla`: width of a head's value.")
    draft_rope: Literal["1d", "mrope"] = _arg(
        "1d",
        "Positions of the draft if the target has m-RoPE (Qwen-VL): one per token, counting all tokens (`1d`), or the "
        "target's three per token (`mrope`).",
    )
    draft_rope_scaling: str | None = _arg(
        None,
        'RoPE scaling of the draft, if it differs from the target\'s, as JSON: `{"rope_type": "yarn", "factor": 4.0, '
        '"original_max_position_embeddings": 8192}`. Types are default, linear, llama3 and yarn, with the fields that '
        "both servers read. Unless given, `rope_theta` is the target's. Unset, or `none`: the target's.",
    )
    image_embeddings: Literal["token", "vision"] = _arg(
        "token",
        "The draft's input embedding at an image or a video: that of its token, as in vLLM, or the output of the "
        "target's vision tower, as in SGLang.",
    )
    draft_sliding_window: Annotated[int, Bounds(least=2, most=2**24)] | None = _arg(
        None,
        "EAGLE-3: let the draft's attention see only so many last tokens, its own included, in training and in "
        "servers. Its cost then grows with the length and not with its square, and what it learns in short "
        "conversations holds in a long context. Unset: all tokens.",
    )
    fc_norm: bool = _arg(False, "EAGLE-3.1: apply an RMSNorm to each tap before `fc`.")
    norm_output: bool = _arg(False, "EAGLE-3.1: feed the normed output back instead of the residual stream.")
    draft_init: Literal["target", "random"] = _arg(
        "target", "Start with the target's rows in the head and an `fc` that passes the last tap on, or at random."
    )
    init_from: str | None = _arg(
        None,
        "Draft to start from, a folder or a Hub id. Its shapes and taps must be the same; its draft vocabulary may "
        "differ: rows of its head are copied by token, rows of new tokens start as `draft_init` says. Ignored on "
        "resuming, except with `use_peft`, whose adapter is added to it.",
    )
    license: str | None = _arg(
        None, "Licence of the draft for its model card, as the Hub spells it. Unset: that in the target's card, if any."
    )
    draft_attn_implementation: Literal["sdpa", "eager", "flex_attention"] = _arg(
        "sdpa",
        "Attention implementation of the draft in training: `sdpa` uses the device's fused kernel, `eager` is the slow "
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

        if self.draft_rope_scaling is not None and is_none(self.draft_rope_scaling):
            self.draft_rope_scaling = None
        given = self.draft_rope_scaling
        self._rope_scaling = None if given is None else check_rope_scaling(parse_json(given, "`draft_rope_scaling`"))

        if given is not None and self.draft_rope != "1d":
            raise ValueError(
                f"`draft_rope_scaling` cannot be combined with `draft_rope` {self.draft_rope}, which no server scales: "
                "leave one out."
            )

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """Return the requested RoPE scaling, in the form of a draft's config; `None` without one."""
        return self._rope_scaling

    @property
    def kind(self) -> Kind:
        """Return the kind of draft that is trained."""
        return kind_of_method(self.method)

    @property
    def latent_sizes(self) -> dict[str, int | None]:
        """Return those sizes of latent attention that were set, as fields of a draft's config."""
        sizes = {name: getattr(self, name) for name in LATENT_SIZES if getattr(self, name) is not None}
        return {**sizes, "q_lora_rank": None} if self.q_lora_rank == 0 else sizes


@dataclass
class AdapterArguments:
    """LoRA on the draft, by PEFT; names are those of TRL's `ModelConfig`."""

    _argument_group_name = "adapter"

    use_peft: bool = _arg(
        False,
        "Train a LoRA adapter on the draft that `init_from` names, instead of the draft itself. The draft is saved "
        "with the adapter merged in, and the adapter alone in `adapter/`.",
    )
    lora_r: Width = _arg(16, "Rank of the adapter's matrices.")
    lora_alpha: Count = _arg(32, "The adapter is added with the factor `lora_alpha / lora_r`.")
    lora_dropout: Share = _arg(0.0, "Dropout probability of the adapter's inputs in training.")
    lora_target_modules: list[str] | None = _arg(
        None,
        "Projections that get an adapter, by the last parts of their names. Unset: those of the draft's layer and "
        "`fc`; add `lm_head` for the head.",
    )
    lora_modules_to_save: list[str] | None = _arg(
        None, "Modules that are trained in full besides the adapter, such as `lm_head` or `norm` (every norm)."
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
        """Return the [`~peft.LoraConfig`] that `EagleTrainer` takes; `None` without `use_peft`."""
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
            "help": "Chats to train on: JSON, JSONL, Parquet, CSV or Arrow files, folders, or Hub data sets. Of these, "
            "`id` reads the split `train`, `id:split` another one, `id:subset:split` that of a subset, and "
            "`id@revision` another commit."
        }
    )
    data_weights: list[Annotated[float, Bounds(above=0, most=1_000_000)]] | None = _arg(
        None,
        "One number for each source in `train_data`: how often its records are used (0.5: a random half of them, 2: "
        "each twice). With `streaming`: the sources' shares of the mixture.",
    )
    data_licenses: list[str] | None = _arg(
        None, "Licence of each source in `train_data`, for the model card. Unset: those that their own cards state."
    )
    dataset_format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "text"] = _arg(
        "auto",
        "Form of the records; `auto` recognises it by their columns. `preference` uses the chosen answers. `text` is "
        "supervised as a whole or, if it is a rendered chat, after the header of each answer.",
    )
    eval_data: list[str] | None = _arg(None, "Chats to evaluate on.")
    eval_share: Share = _arg(0.0, "Share of the training chats to hold out for evaluation when `eval_data` is unset.")
    max_length: Annotated[int, Bounds(least=4)] = _arg(
        2048, "Longest sequence in tokens, no longer than the target can read. Longer ones are truncated, and counted."
    )
    packing: bool = _arg(
        False,
        "Put whole conversations side by side in rows of `max_length` tokens instead of padding each. The loss does "
        "not change; `per_device_train_batch_size` and `per_device_eval_batch_size` then count such rows.",
    )
    streaming: bool = _arg(
        False,
        "Read and tokenise conversations during training, shuffled among 1,000 at a time: for data too large to "
        "prepare first. Needs `max_steps`, and excludes packing, grouping by length, held-out data, stored features "
        "and counting tokens for a draft vocabulary. A record without an answer still counts in its batch.",
    )
    skip_bad_media: bool = _arg(
        False, "Leave out, and count, conversations with media that cannot be loaded, instead of stopping."
    )
    skip_bad_records: bool = _arg(
        False, "Leave out, and count, records that cannot be read or rendered, instead of stopping."
    )
    last_turn_only: bool = _arg(False, "Train only on what follows the last user message, instead of on every answer.")
    train_on_thoughts: bool = _arg(True, "Also train on the reasoning in answers, if the chat template writes it.")
    train_on_tool_calls: bool = _arg(True, "Also train on the tool calls of answers.")
    preprocessing_workers: Workers | None = _arg(None, "Number of processes that tokenise the data.")
    feature_store: str | None = _arg(
        None,
        "Folder of the target's features, as scripts/cache_features.py stores them: training reads these instead of "
        "running the target.",
    )
    cache_mode: Literal["read", "first_epoch"] = _arg(
        "read", "`read`: `feature_store` must be complete; `first_epoch`: it is filled in the first epoch, then read."
    )
    store_dtype: Literal["bfloat16", "float32", "float8"] = _arg(
        "bfloat16", "Number format of `feature_store`; `float8` is e4m3 with a scale for each token and tap."
    )
    acceptance_prompts: str | None = _arg(
        None,
        "Prompts (.jsonl, .json, .txt) to decode during training and at evaluations, to measure the acceptance length.",
    )
    acceptance_steps: Count | None = _arg(
        None, "Optimizer steps between measurements of the acceptance length. Unset: only at evaluations."
    )
    acceptance_num_prompts: Count = _arg(16, "Number of `acceptance_prompts` to use, beginning with the first.")

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
                f"`data_weights` holds {max(self.data_weights):g}, so each record would be used that many times: give "
                "at most 1000 (only with `streaming` are the weights shares)."
            )

        wrong = next((name for name in ("packing", "eval_share", "feature_store") if getattr(self, name)), None)
        if self.streaming and wrong:
            raise ValueError(f"`{wrong}` needs all data at once, which `streaming` never has: leave one of them out.")

        for name, default in (("cache_mode", "read"), ("store_dtype", "bfloat16")):
            if self.feature_store is None and getattr(self, name) != default:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but `feature_store` names no folder.")

        if self.acceptance_steps is not None and self.acceptance_prompts is None:
            raise ValueError(f"`acceptance_steps` is {self.acceptance_steps}, but `acceptance_prompts` names no file.")


@dataclass
class DryRunArguments:
    """Report how much memory a run would need, instead of running it."""

    _argument_group_name = "dry run"

    dry_run: bool = _arg(
        False,
        "Print how much memory every rank would need, computed from the configs alone, and stop. `target` may then be "
        "a folder with only its `config.json`.",
    )
    launch_config: str | None = _arg(
        None,
        "`dry_run`: launch config of accelerate, a file or one of ours by name (`fsdp2`), which says how many ranks "
        "there are and whether the draft is sharded. Unset: as this process was launched.",
    )
    world_size: Annotated[int, Bounds(least=1, most=2**20)] | None = _arg(
        None, "`dry_run`: number of ranks. Unset: that of `launch_config`."
    )
    device_memory_gb: Positive | None = _arg(None, "`dry_run`: warn if a rank needs more GiB than this.")
    supervised_share: Mass = _arg(
        1.0, "`dry_run`: share of a batch's tokens that belong to an answer; 1 is the worst case."
    )

    def __post_init__(self):
        check_numbers(self)
        for other in fields(self):
            value = getattr(self, other.name)
            if not self.dry_run and value != other.default:
                raise ValueError(
                    f"`{other.name}` is {value}, but only `dry_run` uses it: leave it out, or set `dry_run`."
                )
