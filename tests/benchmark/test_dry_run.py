"""What `--dry_run` predicts for a rank: exact parameters, and bytes compared with those of real steps."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from real_configs import PARAMETERS, write_config
from transformers import AutoModelForCausalLM

from hf_eagle.arguments.groups import DryRunArguments
from hf_eagle.benchmark.dry_run import GIB, dry_run, read_target_config, shapes_of
from hf_eagle.drafts.costs_base import RunShapes
from hf_eagle.drafts.dflash.plan import BlockPlan
from hf_eagle.drafts.eagle1.configuration import Eagle1Config
from hf_eagle.drafts.eagle3.configuration import draft_config
from hf_eagle.drafts.training_base import Draw
from hf_eagle.training.launching import launch_of
from hf_eagle.training.run_arguments import RunArguments


ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(p for p in (ROOT / "training_args").glob("*.yaml"))


# "On 8 devices of 40 GiB", and what the dry run says that a rank holds
SIZES = re.compile(
    r"^# On (\d+) (?:devices?|process(?:es)?) of (\d+) GiB: by the dry run a rank holds ([\d.]+) GiB\.$", re.M
)
# counted in the published files, and no parameters
ROUTER_BUFFERS = {"moonshotai/Kimi-K2.5": 60 * 384}
LATENT_DRAFTS = {
    "deepseek-ai/DeepSeek-V3": 2_606_135_296,
    "moonshotai/Kimi-K2.5": 3_015_604_224,
    "Qwen/Qwen3-8B": 1_002_457_088,
    "zai-org/GLM-5": 2_424_072_704,
}


def world_of(recipe: Path) -> str:
    """The recipe's own number of ranks, at least 8."""
    return max("8", SIZES.search(recipe.read_text())[1], key=int)


def holding(holdings, start):
    return next(h for h in holdings if h.what.startswith(start))


# ---- recipes ----


@pytest.fixture(scope="module")
def script():
    import runpy

    return runpy.run_path(str(ROOT / "scripts" / "train_eagle.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_dry_run_from_configs(recipe, script, tmp_path, capsys, caplog):
    """As the script does it, with a folder that holds the target's `config.json` and nothing else."""
    asked = ["--config", str(recipe), "--dry_run", "--world_size", world_of(recipe), "--device_memory_gb", "0.5"]
    asked = RunArguments.parse(asked)
    name = asked.target.target
    asked.target.target = str(write_config(name, tmp_path / "target"))
    script["print_dry_run"](asked)
    printed = capsys.readouterr().out
    whole = PARAMETERS[name] - ROUTER_BUFFERS.get(name, 0)
    assert f"layers and {whole:,} parameters" in printed
    if "mla" in recipe.stem:
        draft = LATENT_DRAFTS[name]
        assert f"Eagle3DeepseekV2ForCausalLM of {draft:,} parameters" in printed
    if not recipe.stem.startswith(("smollm2", "tiny")):
        assert "This cannot fit `device_memory_gb` 0.5: a rank needs" in caplog.text


def launched(head: str) -> tuple[int, bool]:
    """How many processes the command in a recipe's head starts, and whether the draft is sharded among them."""
    command = " ".join(head.partition("# Launch: ")[2].replace("\\\n#", " ").split())
    if not command.startswith("accelerate launch"):
        nodes = re.match(r"torchrun --nproc-per-node (\d+) ", command)
        return int(nodes[1]) if nodes else 1, False
    config = yaml.safe_load((ROOT / re.search(r"--config_file (\S+)", command)[1]).read_text())
    asked = re.search(r"--num_processes (\d+)", command)
    return int(asked[1]) if asked else config["num_processes"], config["distributed_type"] == "FSDP"


def commented(comment: str, start: str) -> list[str]:
    """The words of a command in a comment, which begins with `start`, behind that."""
    return re.search(rf"^# {re.escape(start)} ((?:.*\\\n#)*.*)$", comment, re.M)[1].replace("\\\n#", " ").split()


def dry_ran(words: list[str], script, tmp_path, capsys) -> str:
    """What such a command prints."""
    asked = RunArguments.parse(words)
    asked.target.target = str(write_config(asked.target.target, tmp_path / "target"))
    script["print_dry_run"](asked)
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_devices_that_its_head_names(recipe, script, tmp_path, capsys, caplog):
    """By the very command of its head, which counts what the launch above it starts."""
    head = recipe.read_text()
    processes, sharded = launched(head)
    world, memory, told = SIZES.search(head).groups()
    assert processes == int(world)
    assert f"--config training_args/{recipe.name}" in head

    words = commented(head, "Dry run: hf-eagle train")
    assert words[:3] == ["--config", recipe.stem, "--dry_run"] and words[-2:] == ["--device_memory_gb", memory]
    printed = dry_ran(words, script, tmp_path, capsys)
    assert printed.startswith(f"Each of {world} rank(s): ")
    assert ("the draft's weights, gathered" in printed) == sharded
    assert float(re.search(r"^at most +([\d.]+)$", printed, re.M)[1]) == pytest.approx(float(told), abs=0.056)
    assert "This cannot fit" not in caplog.text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_layers_that_a_recipe_says_are_tapped_are(recipe, script, tmp_path, capsys):
    told = re.search(r"taps behind layers ([\d, ]+) and (\d+) follow", recipe.read_text())
    if told:
        printed = dry_ran(commented(recipe.read_text(), "Dry run: hf-eagle train"), script, tmp_path, capsys)
        layers = [int(number) for number in (*told[1].split(", "), told[2])]
        assert f"(taps {', '.join(str(number + 1) for number in layers)})" in printed


@pytest.mark.parametrize("documents", [[16] * 4, [40, 24], [64], [8] * 8, [2, 62], [33, 3, 28]])
@pytest.mark.parametrize("num_anchors", [1, 5, 512])
def test_blocks_of_a_row_are_counted_for_each_of_its_conversations(documents, num_anchors, tmp_path):
    """Packed, a row holds many conversations, and each has blocks of its own: never more than the dry run counts."""
    words = f"--config smollm2-135m-dflash --dry_run --max_length 64 --num_anchors {num_anchors} --block_size 4"
    asked = RunArguments.parse(words.split())
    target = read_target_config(str(write_config("assets/smollm2-135m-instruct", tmp_path)))
    shapes = shapes_of(target, asked.target, asked.data, asked.dry_run, asked.training, 3)

    batch = {
        "input_ids": torch.arange(64)[None],
        "loss_mask": torch.ones(1, 64, dtype=torch.long),
        "documents": torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))[None],
    }
    blocks = BlockPlan.of(batch, 4, num_anchors, Draw(0)).layout.anchors
    assert len(blocks) == sum(min(num_anchors, max(0, length - 2)) for length in documents)
    assert len(blocks) <= min(shapes.supervised, shapes.rows * shapes.num_anchors)


def test_recipes_pack_texts():
    """What pads: images, and blocks in number limited by conversation."""
    asked = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES}
    assert sorted(name for name, recipe in asked.items() if not recipe.get("packing")) == [
        "llama-3.1-8b-dflash",
        "qwen3-30b-a3b-dflash",
        "qwen3-8b-dflash",
        "qwen3-vl-30b-a3b-eagle3",
        "qwen3-vl-8b-eagle3",
        "tiny-qwen3-vl-eagle3",
    ]


LAUNCH_CONFIGS = sorted((ROOT / "training_args" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("config", LAUNCH_CONFIGS, ids=lambda path: path.stem)
def test_the_command_in_a_launch_config_can_be_run(config, script, tmp_path, capsys):
    comment = config.read_text()
    if "--config " not in comment:
        return  # it names no recipe
    words = commented(comment, f"accelerate launch --config_file training_args/accelerate/{config.name}")
    words = words[words.index("scripts/train_eagle.py") + 1 :]
    printed = dry_ran([*words, "--dry_run", "--launch_config", str(config)], script, tmp_path, capsys)
    said = yaml.safe_load(comment)
    assert printed.startswith(f"Each of {said['num_processes']} rank(s): ")
    assert ("the draft's weights, gathered" in printed) == (said["distributed_type"] == "FSDP")


@pytest.mark.parametrize(
    ("words", "launcher", "ranks", "sharded"),
    [
        ("", {}, 1, False),
        ("--world_size 4", {}, 4, False),
        ("--launch_config fsdp2", {}, 8, True),
        ("--launch_config fsdp2 --world_size 2", {}, 2, True),
        ("--launch_config ddp", {}, 8, False),
        ("--launch_config single", {}, 1, False),
        ("--world_size 4", {"ACCELERATE_USE_FSDP": "true"}, 4, True),
        ("", {"ACCELERATE_USE_FSDP": "true"}, 1, False),
        ("--launch_config ddp", {"ACCELERATE_USE_FSDP": "true"}, 8, True),
    ],
)
def test_the_launch_is_the_one_that_was_named_or_this_one(words, launcher, ranks, sharded, tmp_path, monkeypatch):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    asked = RunArguments.parse(["--config", "qwen3-8b-eagle3", "--dry_run", *words.split()])
    target = read_target_config(str(write_config("Qwen/Qwen3-8B", tmp_path)))
    shapes = shapes_of(target, asked.target, asked.data, asked.dry_run, asked.training, 7)
    assert (shapes.world_size, shapes.draft_sharded) == (ranks, sharded)


def test_a_sharded_target_needs_a_number_of_ranks_and_no_launcher(tmp_path):
    asked = RunArguments.parse(["--config", "qwen3-30b-a3b-eagle3", "--dry_run"])
    target = read_target_config(str(write_config("Qwen/Qwen3-30B-A3B", tmp_path)))
    with pytest.raises(ValueError, match="counts one rank: give .* with `--world_size`, or .* with `--launch_config`"):
        shapes_of(target, asked.target, asked.data, asked.dry_run, asked.training, 7)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("distributed_type: FSDP\n", "must give `num_processes` as a whole number of at least 1, got None"),
        ("num_processes: many\n", "must give `num_processes` .* got 'many'"),
        ("num_processes: 0\n", "got 0"),
        ("[1]\n", "`launch_config` .*"),
        (
            "distributed_type: DEEPSPEED\nnum_processes: 2\n",
            "`launch_config` .* whose `distributed_type` is DEEPSPEED, cannot train a draft: .* with FSDP2",
        ),
    ],
)
def test_a_file_that_is_no_launch_config_is_refused(written, message, tmp_path):
    (tmp_path / "launch.yaml").write_text(written)
    with pytest.raises(ValueError, match=message):
        launch_of(str(tmp_path / "launch.yaml"), None)
    with pytest.raises(ValueError, match="`launch_config` fsdp22 is neither a file nor a launch config: did you mean"):
        launch_of("fsdp22", None)


def test_qwen3_with_a_latent_draft(tmp_path):
    """Sizes that are known: 8 billion bfloat16, and of a billion what is not the embedding trained in float32."""
    target = read_target_config(str(write_config("Qwen/Qwen3-8B", tmp_path)))
    run = dry_run(target, draft_config(target, "mla", draft_vocab_size=32000), RunShapes(length=4096))
    assert holding(run.kept, "target, bfloat16, whole").bytes == 2 * 8_190_735_360
    trained = 1_002_457_088 - 151936 * 4096
    assert holding(run.kept, "draft, trained").bytes == holding(run.kept, "gradients").bytes == 4 * trained
    assert holding(run.kept, "AdamW").bytes == 8 * trained
    assert holding(run.kept, "draft, frozen").bytes == 4 * 151936 * 4096
    assert holding(run.target_step, "features").bytes == 4096 * 4 * 4096 * 2
    kept, largest = sum(h.bytes for h in run.kept), max(run.target_step + run.draft_step, key=lambda h: h.bytes)
    assert run.peak == kept + max(sum(h.bytes for h in run.target_step), sum(h.bytes for h in run.draft_step))
    assert largest.bytes < run.peak - kept
    assert run.warning(run.peak / GIB + 0.01) is None and run.warning(None) is None
    said = run.warning(20)
    assert f"a rank needs {run.peak / GIB:.1f} GiB, most of it for target, bfloat16, whole (15.3 GiB)" in said


def test_ranks_share_what_is_sharded(tmp_path):
    target = read_target_config(str(write_config("Qwen/Qwen3-30B-A3B", tmp_path)))
    draft, whole = draft_config(target, draft_vocab_size=32000), PARAMETERS["Qwen/Qwen3-30B-A3B"]

    def run(**shapes):
        return dry_run(target, draft, RunShapes(world_size=8, **shapes))

    for mode in ("fsdp2", "expert"):
        assert run(target_sharding=mode).kept[0].parameters == -(-whole // 8)
        assert run(target_sharding=mode, target_shard_size=4).kept[0].parameters == -(-whole // 4)
    # by the model's plan: head, projections and experts, but neither norms nor routers; of the embedding the plans of
    # transformers 5.17 and later ones differ
    with torch.device("meta"):
        splits_embedding = any("embed_tokens" in name for name in AutoModelForCausalLM.from_config(target).tp_plan)
    layer = 2 * 2048 + 2 * 128 + 2048 * 128
    replicated = 48 * layer + 2048 + (0 if splits_embedding else 151936 * 2048)
    assert run(target_sharding="tensor").kept[0].parameters == replicated + (whole - replicated) // 8
    # a gathered layer is that without its experts, where they stay
    gathered = [holding(run(target_sharding=mode).target_step, "a layer").bytes for mode in ("fsdp2", "expert")]
    attention = 2048 * 128 * (32 + 4 + 4 + 32)
    assert gathered == [2 * 2 * (layer + attention + 128 * 3 * 768 * 2048), 2 * 2 * (layer + attention)]

    trained = holding(run().kept, "draft, trained").parameters
    frozen = holding(run().kept, "draft, frozen").parameters
    assert holding(run().kept, "DDP's buckets").bytes == 4 * trained and not run().sharing_step
    for sharded in (False, True):
        held = run(draft_sharded=sharded).kept
        assert holding(held, "AdamW").bytes == 8 * (trained // 8 if sharded else trained)
        assert holding(held, "draft, frozen").bytes == 4 * (frozen // 8 if sharded else frozen)
    sharing = {h.what: h.bytes for h in run(draft_sharded=True).sharing_step}
    assert sharing["the draft's weights, gathered"] == 4 * (trained + frozen)
    assert sharing["gradients, whole"] == sharing["the buffer they are sent from"] == 4 * trained
    assert sharing["the head's gradient, as the loss made it"] == 4 * 32000 * 2048
    assert not [h for h in dry_run(target, draft, RunShapes()).kept if "buckets" in h.what]


def test_what_a_float32_target_lends_is_held_once(tmp_path):
    """A tied one lends EAGLE-1 one table for both ends."""
    target = read_target_config(str(write_config("meta-llama/Llama-3.2-1B-Instruct", tmp_path)))
    config, table = Eagle1Config.from_target(target), 128256 * 2048
    for dtype, copies in ((torch.float32, 0), (torch.bfloat16, 1)):
        frozen = holding(dry_run(target, config, RunShapes(target_dtype=dtype, ttt_steps=1)).kept, "draft, frozen")
        assert (frozen.bytes, frozen.parameters) == (4 * copies * table, 2 * table)


# ---- what is refused ----


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B"])
def test_of_a_served_target_a_rank_holds_the_ends(name, tmp_path):
    target = read_target_config(str(write_config(name, tmp_path)))
    config = draft_config(target, "llama", draft_vocab_size=32000)
    here, served = (dry_run(target, config, RunShapes(target_served=served)) for served in (False, True))
    ends = holding(served.kept, "target's embedding, norm and head, bfloat16")
    assert ends.parameters == 2 * target.vocab_size * target.hidden_size + target.hidden_size
    assert ends.bytes == 2 * ends.parameters < holding(here.kept, "target, bfloat16, whole").bytes / 5
    assert [h.what for h in served.target_step] == ["features"]
    # nothing else changes
    assert [vars(h) for h in served.kept[1:]] == [vars(h) for h in here.kept[1:]]
    assert [vars(h) for h in served.draft_step] == [vars(h) for h in here.draft_step]


def test_a_recipe_with_a_server_is_counted_so(tmp_path):
    path = str(write_config("Qwen/Qwen3-8B", tmp_path))
    words = ["--target", path, "--train_data", "nowhere", "--output_dir", str(tmp_path / "out"), "--dry_run"]
    served = ["--target_url", "http://localhost:8000", "--features_folder", "nowhere"]
    for more in ([], served):
        run = RunArguments.parse([*words, *more])
        run.check_paths()
        shapes = shapes_of(read_target_config(path), run.target, run.data, run.dry_run, run.training, 7)
        assert shapes.target_served == bool(more)


def test_a_config_that_is_out_of_reach_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be read here, which a `dry_run` needs: name a folder that holds its"):
        read_target_config(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"world_size": 8}, "`world_size` is 8, but only `dry_run` uses it"),
        ({"launch_config": "ddp"}, "`launch_config` is ddp, but only `dry_run` uses it"),
        ({"device_memory_gb": 80.0}, "`device_memory_gb` is 80.0, but only `dry_run`"),
        ({"dry_run": True, "world_size": 0}, "`world_size` must be at least 1 and at most 1,048,576, got 0"),
        ({"dry_run": True, "supervised_share": 0.0}, "`supervised_share` must be above 0 and at most 1"),
    ],
)
def test_arguments_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        DryRunArguments(**fields)
