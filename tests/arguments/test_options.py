"""Options of transformers' training that cannot work are refused with their name, and what is not refused trains."""

import json
import warnings
from contextlib import suppress

import pytest
import torch
from tiny import random_chats, tiny_pair
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_eagle import EagleTrainer, EagleTrainingArguments
from hf_eagle.arguments import training
from hf_eagle.arguments.devices import check_attention, device_of
from hf_eagle.arguments.options import refuse_unavailable
from hf_eagle.shipped import find_config, recipe_names
from hf_eagle.training.run_arguments import RunArguments


REFUSED = [
    ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` is 5.0, but a draft has no embeddings"),
    ({"use_liger_kernel": True}, "`use_liger_kernel` is True, but Liger has no kernels"),
    ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1, but"),
    ({"torch_compile": True}, "`torch_compile` cannot work"),
    ({"torch_compile_backend": "inductor"}, "`torch_compile_backend` cannot work"),
    ({"torch_compile_mode": "default"}, "`torch_compile_mode` cannot work"),
    ({"log_level": "loud"}, "`log_level` must be one of debug, .*, got 'loud'"),
    ({"log_level_replica": "loud"}, "`log_level_replica` must be one of"),
    ({"train_sampling_strategy": "x"}, "`train_sampling_strategy` must be one of random, sequential"),
    ({"include_num_input_tokens_seen": "x"}, "`include_num_input_tokens_seen` must be one of all"),
    ({"eval_strategy": "x"}, "`eval_strategy` must be one of no, steps, epoch, got 'x'"),
    ({"save_strategy": "x"}, "`save_strategy` must be one of no, steps, epoch, best"),
    ({"logging_strategy": "x"}, "`logging_strategy` must be one of"),
    ({"hub_strategy": "x"}, "`hub_strategy` must be one of end"),
    ({"optim": "x"}, "`optim` must be one of adamw_torch"),
    ({"lr_scheduler_type": "x"}, "`lr_scheduler_type` must be one of linear"),
    ({"debug": "x"}, "`debug` must be of underflow_overflow, .*, got 'x'"),
    ({"debug": ["x"]}, "`debug` must be of"),
    ({"lr_scheduler_kwargs": "x"}, "`lr_scheduler_kwargs` must be a JSON object"),
    ({"activation_checkpointing_kwargs": "x"}, "`activation_checkpointing_kwargs` must be a JSON object"),
    ({"gradient_checkpointing_kwargs": "{"}, "`gradient_checkpointing_kwargs` is not JSON"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "`activation_checkpointing_kwargs` sets `use_ree"),
    ({"activation_checkpointing_kwargs": '{"use_reentrant": true}'}, "`activation_checkpointing_kwargs` sets `use_ree"),
    ({"accelerator_config": "{"}, "`accelerator_config` is not JSON"),
    ({"accelerator_config": "/no"}, "`accelerator_config` names /no, which is no file"),
    ({"accelerator_config": {"x": 1}}, "`accelerator_config` cannot be as given: .*'x'"),
    ({"accelerator_config": {"x": 1}, "seed": 3}, "^`accelerator_config` cannot be as given"),
    ({"fsdp": True, "fsdp_config": "/no"}, "`fsdp_config` names /no, which is no file"),
    ({"deepspeed": "/no"}, "`deepspeed` names /no, which is no file"),
    ({"deepspeed": "a" * 400}, "`deepspeed` names aaa"),
    ({"parallelism_config": "x"}, "`parallelism_config` must be an `accelerate.ParallelismConfig`"),
    ({"dataloader_persistent_workers": True}, "`dataloader_persistent_workers` is True, but there are no workers"),
    ({"dataloader_prefetch_factor": 2}, "`dataloader_prefetch_factor` is 2, but there are no workers"),
    ({"dataloader_multiprocessing_context": "fork"}, "`dataloader_multiprocessing_context` is fork, but there are no"),
    ({"dataloader_multiprocessing_context": "x"}, "`dataloader_multiprocessing_context` must be one of fork"),
    ({"ddp_backend": "nccl"}, "`ddp_backend` is nccl, but this is one process"),
    ({"hub_model_id": "a/b/c"}, "`hub_model_id` 'a/b/c' is no name of a repository"),
    ({"hub_model_id": ""}, "`hub_model_id` '' is no name"),
    ({"hub_revision": "../x y"}, "`hub_revision` '../x y' is not a valid branch name"),
    # what the library says by itself is told with the name
    ({"logging_steps": 2.5}, "`logging_steps` cannot be as given"),
    ({"save_steps": 2.5, "save_strategy": "steps"}, "`save_steps` cannot be as given"),
    ({"fp16": True, "bf16": True}, "`bf16`, `fp16` cannot be as given"),
    ({"load_best_model_at_end": True, "save_strategy": "steps"}, "^`load_best_model_at_end`.* cannot be as given"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "`lr_scheduler_type` cannot be as given"),
]
UNAVAILABLE = [
    ({"report_to": ["x"]}, "`report_to` names x, which cannot be used here"),
    ({"optim_args": "x"}, "`optim` adamw_torch_fused with `optim_args` x cannot be used here"),
    ({"optim": "sgd", "optim_args": "momentum=-1"}, "`optim` sgd with `optim_args` momentum=-1 cannot be used here"),
    ({"lr_scheduler_kwargs": {"num_cycles": "x"}}, "`lr_scheduler_type` cosine does not go with .*'num_cycles': 'x'"),
    ({"lr_scheduler_kwargs": {"num_cycles": 1e999}}, "`lr_scheduler_type` cosine does not go with"),
    ({"lr_scheduler_kwargs": {"x": 1}}, "`lr_scheduler_type` cosine does not go with `lr_scheduler_kwargs` {'x': 1}"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "`lr_scheduler_type` cosine_with_min_lr does not go with"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "`lr_scheduler_type` warmup_stable_decay does not go with"),
    ({"fsdp": True}, "`fsdp` shards a draft over ranks, but this is one process"),
    ({"push_to_hub": True}, "`push_to_hub` (cannot work while|needs a token)"),
]


def arguments(tmp_path, **options):
    return EagleTrainingArguments(**{"output_dir": str(tmp_path), "report_to": "none", **options})


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_work_anywhere_is_refused_as_it_is_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as told:
        arguments(tmp_path, **options)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("options", "message"), UNAVAILABLE)
def test_what_cannot_work_here_is_refused_as_a_run_begins(tmp_path, options, message):
    args = arguments(tmp_path, **options)  # a recipe is looked at where it cannot run
    with pytest.raises(ValueError, match=message) as told:
        refuse_unavailable(args)
    assert "\n" not in str(told.value)


ZERO = [{"zero_optimization": {"stage": stage}} for stage in range(4)]


@pytest.mark.parametrize("given", [*ZERO, json.dumps(ZERO[3])], ids=["off", "1", "2", "3", "3, as text"])
def test_deepspeed_is_refused_whatever_its_stage(given, tmp_path):
    with pytest.raises(
        ValueError, match="^`deepspeed` cannot train a draft: ZeRO's stage 3 .* Shard the draft with FSDP2"
    ):
        arguments(tmp_path, deepspeed=given)


def test_a_launchers_deepspeed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="^The launch config's `distributed_type` DEEPSPEED cannot train a draft"):
        arguments(tmp_path)


def trained(tmp_path, **options) -> bool:
    """Whether a tiny run takes a step with these options; anything but a refusal of ours is an error."""
    args = arguments(tmp_path, max_steps=1, ttt_steps=1, save_strategy="no", disable_tqdm=True, **options)
    try:
        refuse_unavailable(args)
    except ValueError as problem:
        assert any(f"`{name}`" in str(problem) for name in options)
        return False
    target, draft = tiny_pair()
    EagleTrainer(draft, args, target, train_dataset=random_chats(8)).train()
    return True


@pytest.mark.parametrize("recipe", recipe_names())
def test_no_recipe_uses_a_deprecated_name(recipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        asked = RunArguments.parse(["--config", recipe])
    wanted = "activation_checkpointing: true" in find_config(recipe).read_text()
    assert asked.training.gradient_checkpointing == wanted  # which every version of transformers reads


@pytest.mark.parametrize("given", [None, True, False])
def test_checkpointing_reaches_a_library_that_knows_the_older_name_only(given, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "complete", lambda args: seen.append(args.gradient_checkpointing))
    default = TrainingArguments.__dataclass_fields__["gradient_checkpointing"].default
    with suppress(AttributeError):  # what the library itself would have completed
        arguments(tmp_path, activation_checkpointing=given)
    assert seen == [default if given is None else given]


@pytest.mark.parametrize("name", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"])
@pytest.mark.parametrize("given", [{"determinism_check": "none"}, '{"determinism_check": "none"}', {}, None])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_kwargs` is deprecated")
def test_a_checkpoint_is_never_reentrant(name, given, tmp_path):
    """PyTorch's own default is, if it gets any other argument."""
    args = arguments(tmp_path, **{name: given})
    wanted = {"determinism_check": "none", "use_reentrant": False} if given else given
    for known in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        assert getattr(args, known) == wanted


def test_no_noise_is_no_refusal(tmp_path):
    assert trained(tmp_path, neftune_noise_alpha=0.0)


def test_every_optimizer_trains_or_is_refused(tmp_path):
    assert {"adafactor", "sgd"} <= {name.value for name in OptimizerNames if trained(tmp_path, optim=name.value)}


def test_every_schedule_trains_or_is_refused(tmp_path):
    evaluated = ("reduce_lr_on_plateau", "greedy")  # refused without evaluations
    names = [name.value for name in SchedulerType if name.value not in evaluated]
    assert {"linear", "cosine"} <= {name for name in names if trained(tmp_path, lr_scheduler_type=name)}


def test_every_reporter_is_there_or_is_refused(tmp_path):
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name, callback in INTEGRATION_TO_CALLBACK.items():
        try:
            refuse_unavailable(arguments(tmp_path, report_to=[name]))
        except ValueError as problem:
            assert f"`report_to` names {name}" in str(problem)
            with pytest.raises((ImportError, RuntimeError, TypeError, ValueError)):
                callback()


def test_a_recipe_without_output_is_seen(tmp_path):
    assert arguments(tmp_path).names_output_dir and not EagleTrainingArguments().names_output_dir


@pytest.mark.parametrize("name", ["banana", "cuda:99", "cuda:banana", "cpu,cuda", "meta", "cuda:", "", "/dev/x"])
def test_devices_that_are_not_there_are_refused(name):
    with pytest.raises(ValueError, match="^`device` ") as told:
        device_of(name)
    assert "\n" not in str(told.value) and len(str(told.value)) < 300


def test_devices_that_are_there():
    assert device_of("cpu") == "cpu"
    assert device_of(None) == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash_attention_2", "is flash_attention_2, but neither|has no kernel for a CPU"),
        ("flash_attention_3", "is flash_attention_3, but neither|has no kernel for a CPU"),
        ("banana", "must be one of eager, .*sdpa.*, got 'banana'"),
        ("", "must be one of eager"),
        ("kernels-community/flash-attn", "which needs the package `kernels`"),
    ],
)
def test_attention_that_is_not_there_is_refused(monkeypatch, name, message):
    monkeypatch.setattr("hf_eagle.arguments.devices.find_spec", lambda _: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"^`attn_implementation` .*({message})"):
        check_attention("attn_implementation", name)


@pytest.mark.parametrize("name", [None, "eager", "sdpa", "flex_attention"])
def test_attention_that_is_there(name):
    check_attention("attn_implementation", name)
