"""The launch configs, read by accelerate itself; what they make of the draft's FSDP plugin is what a draft needs."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import Qwen3MoeConfig

from hf_eagle import EagleTrainingArguments
from hf_eagle.arguments.groups import DataArguments, DraftArguments, TargetArguments
from hf_eagle.arguments.parser import EagleArgumentParser
from hf_eagle.targets.shard_layout import layout_of
from hf_eagle.training.distributed import check_plugin


ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "training_args" / "accelerate"
PROCESSES = {"single": 1, "ddp": 8, "fsdp2": 8, "fsdp2_expert_parallel": 8, "multi_node": 16}


def launched(name: str, monkeypatch) -> dict[str, str]:
    """The environment that `accelerate launch` would start the processes in."""
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), "train.py"])
    )
    environment = prepare_multi_gpu_env(args)
    for key, value in environment.items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    return environment


def test_all_are_there():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.num_processes == PROCESSES[name]
    assert config.num_machines == (2 if name == "multi_node" else 1)
    wanted = {"single": "NO", "ddp": "MULTI_GPU", "multi_node": "MULTI_GPU"}.get(name, "FSDP")
    assert config.distributed_type == wanted


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_expert_parallel"])
def test_a_draft_can_be_trained_under_its_plugin(name, monkeypatch):
    environment = launched(name, monkeypatch)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    check_plugin(FullyShardedDataParallelPlugin())


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "`fsdp_state_dict_type` is .*SHARDED.* FULL_STATE_DICT"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "`fsdp_cpu_ram_efficient_loading` is true: it would zero"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "`fsdp_activation_checkpointing` finds no layers in a draft"),
    ],
)
def test_settings_that_would_lose_a_draft_are_refused(variable, value, message, monkeypatch):
    launched("fsdp2", monkeypatch)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        check_plugin(FullyShardedDataParallelPlugin())


def test_fsdp1_is_refused(monkeypatch):
    launched("fsdp2", monkeypatch)
    plugin = FullyShardedDataParallelPlugin()
    plugin.fsdp_version = 1  # which accelerate makes on machines with a GPU only
    with pytest.raises(ValueError, match="`fsdp_version` is 1: a draft is trained under FSDP2 only; set it to 2"):
        check_plugin(plugin)


def test_the_recipe_fits_its_launch_config():
    """16 of Qwen3-30B-A3B's 128 experts on each of the 8 ranks that the launch config starts."""
    parser = EagleArgumentParser((TargetArguments, DraftArguments, DataArguments, EagleTrainingArguments))
    target = parser.parse_args_and_config(["--config", str(ROOT / "training_args" / "qwen3-30b-a3b-eagle3.yaml")])[0]
    world = load_config_from_file(str(FOLDER / "fsdp2_expert_parallel.yaml")).num_processes
    config = Qwen3MoeConfig(num_experts=128)
    layout = layout_of(config, target.target_sharding, target.target_shard_size, world=world)
    assert layout == {"fsdp_size": 8, "ep_size": 8, "dp_replicate_size": 1}
    assert config.num_experts // layout["ep_size"] == 16
