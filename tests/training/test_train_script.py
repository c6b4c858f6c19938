"""`scripts/train_eagle.py` as a user starts it: from a recipe, resumed, under launchers, and its errors."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_loading import write_adapter
from tiny_files import WORDS, tiny_recipe, write_chats, write_tiny_target
from warm_python import warm_python


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny tied target with a tokenizer, chats, and a recipe."""
    folder = tmp_path_factory.mktemp("script")
    write_tiny_target(folder / "target")
    write_chats(folder / "chats.jsonl")
    recipe = tiny_recipe(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    recipe = {name: x for name, x in recipe.items() if name not in ("draft_vocab_size", "ttt_steps", "oov_rows")}
    (folder / "eagle1.yaml").write_text(
        yaml.safe_dump({**recipe, "method": "eagle1", "gradient_accumulation_steps": 2})
    )
    return folder


def train(folder, *args, launcher=(), ranks=1, expect=0, recipe="recipe.yaml"):
    command = [str(ROOT / "scripts" / "train_eagle.py"), "--config", str(folder / recipe), *map(str, args)]
    if launcher:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, *launcher, *command]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    else:
        done = warm_python().run(*command, cwd=folder, ranks=ranks)
    assert done.returncode == expect, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def curve(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.fixture(scope="module")
def trained(folder):
    (folder / "prompts.txt").write_text("red green\nstone fish\nbird\n")
    acceptance = (
        "--acceptance_prompts",
        folder / "prompts.txt",
        "--acceptance_steps",
        3,
        "--acceptance_num_prompts",
        2,
    )
    printed = train(folder, "--output_dir", folder / "draft", "--eval_share", 0.25, *acceptance)
    assert "Draft vocabulary: 24 of" in printed and "vLLM and SGLang load that folder" in printed
    return folder / "draft"


def test_a_recipe_leaves_a_draft_with_its_curves(trained, folder):
    from hf_eagle import FrozenTarget, load_draft

    draft = load_draft(trained, FrozenTarget.from_pretrained(str(folder / "target")))
    assert draft.config.draft_vocab_size == 24 and draft.config.tap_ids == [2, 4, 5]
    assert sorted(curve(trained)) == [1, 2, 3, 4, 5, 6]
    assert (trained / "training.png").stat().st_size > 5000
    results = json.loads((trained / "eval_results.json").read_text())
    assert results["eval_loss"] > 0 and results["eval_acceptance_length"] >= 1
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "acceptance_length" in entry] == [3, 6]
    assert (trained / "acceptance_history.png").stat().st_size > 5000


def test_a_second_run_into_the_folder_is_refused(trained, folder):
    printed = train(folder, "--output_dir", trained, expect=1)
    assert printed.strip().splitlines()[-1].startswith("error: `output_dir`")
    assert "holds another run" in printed and "Traceback" not in printed


def test_resuming_keeps_the_mapping_although_the_data_changed(trained, folder):
    before = load_file(trained / "model.safetensors")
    write_chats(folder / "others.jsonl", words=[w.upper() for w in WORDS])
    train(
        folder,
        *("--output_dir", trained, "--train_data", folder / "others.jsonl"),
        *("--resume_from_checkpoint", "last", "--max_steps", 8),
    )
    after = load_file(trained / "model.safetensors")
    assert torch.equal(after["d2t"], before["d2t"]) and torch.equal(after["t2d"], before["t2d"])
    assert after["lm_head.weight"].shape == (24, 32)
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_resuming_with_other_settings_is_refused(trained, folder):
    args = ("--output_dir", trained, "--resume_from_checkpoint", "last")
    printed = train(folder, *args, "--tap_ids", 1, 4, 6, expect=1)
    assert "error: `tap_ids` is [1, 4, 6] but" in printed and "was trained with [2, 4, 5]" in printed
    printed = train(folder, *args, "--draft_vocab_size", "none", expect=1)
    assert re.search(r"error: `draft_vocab_size` is none \(all \d+ tokens\) but .* was trained with 24", printed)


def test_packed_training_resumes_in_the_middle_of_an_epoch(folder, tmp_path):
    recipe = ("--packing", "--max_length", 64, "--per_device_train_batch_size", 1, "--eval_share", 0.1)
    grouped = ("--train_sampling_strategy", "group_by_length")  # what a recipe for padded batches says
    printed = train(folder, "--output_dir", tmp_path / "whole", *recipe, *grouped)
    assert "10 conversations packed into" in printed and "so random sampling replaces `group_by_length`" in printed
    state = json.loads((tmp_path / "whole" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["epoch"] % 1 > 0
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    train(folder, "--output_dir", tmp_path / "resumed", *recipe, "--resume_from_checkpoint", "last")
    assert sorted(curve(tmp_path / "resumed")) == [1, 2, 3, 4, 5, 6]
    assert curve(tmp_path / "resumed") == pytest.approx(curve(tmp_path / "whole"), rel=1e-6)
    assert json.loads((tmp_path / "whole" / "eval_results.json").read_text())["eval_loss"] > 0


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "training_args/accelerate/single.yaml")],
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers_give_the_same_curve(launcher, folder, tmp_path):
    args = ("--max_steps", 2, "--save_strategy", "no", "--train_sampling_strategy", "sequential")
    train(folder, "--output_dir", tmp_path / "alone", *args)
    ranks = 2 if "torch.distributed.run" in launcher else 1
    launched = ("--per_device_train_batch_size", 4 // ranks)
    train(folder, "--output_dir", tmp_path / "launched", *args, *launched, launcher=launcher)
    assert curve(tmp_path / "launched") == pytest.approx(curve(tmp_path / "alone"), rel=1e-5)


def test_a_target_that_is_an_adapter_is_merged_before_it_is_spread(folder, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", folder / "target")
    args = ("--target", adapter, "--max_steps", 2, "--save_strategy", "no", "--train_sampling_strategy", "sequential")
    train(folder, "--output_dir", tmp_path / "alone", *args)
    spread = ("--per_device_train_batch_size", 2, "--target_sharding", "fsdp2")
    train(folder, "--output_dir", tmp_path / "spread", *args, *spread, ranks=2)
    assert (tmp_path / "spread" / "merged-target" / "model.safetensors").is_file()
    assert curve(tmp_path / "spread") == pytest.approx(curve(tmp_path / "alone"), rel=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train_data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--draft_vocab_size", "10000"], "`draft_vocab_size` must be between 1 and"),
        (["--draft_vocab_size", "60"], "different tokens: use more data"),
        (["--tap_ids", "2", "4", "99"], "`tap_ids` must be entry ids between 0 and 8"),
        (["--resume_from_checkpoint", "nowhere"], "`resume_from_checkpoint` nowhere does not exist"),
        (
            ["--acceptance_prompts", "nowhere.jsonl"],
            "`acceptance_prompts` nowhere.jsonl does not exist: correct the path",
        ),
    ],
)
def test_bad_input_is_one_sentence(args, message, folder, tmp_path):
    printed = train(folder, "--output_dir", tmp_path / "out", *args, expect=1)
    last = printed.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in printed, printed
    assert "Traceback" not in printed
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_stream_of_mixed_sources_resumes_on_two_ranks(folder, tmp_path):
    """The second source's records have another form; each rank takes its batches of the same stream."""
    records = [json.loads(line)["messages"] for line in open(folder / "chats.jsonl")]
    asked = [{"instruction": chat[0]["content"], "output": chat[1]["content"]} for chat in records]
    (folder / "alpaca.json").write_text(json.dumps(asked))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "stream.yaml").write_text(yaml.safe_dump({**recipe, "draft_vocab_size": None}))
    args = ("--streaming", "--data_weights", 3, 1, "--last_turn_only", "--train_on_thoughts", "false")
    args += ("--train_data", folder / "chats.jsonl", folder / "alpaca.json")
    printed = train(folder, *args, "--output_dir", tmp_path / "alone", recipe="stream.yaml")
    assert "a stream of records, `messages` (role, content)" in printed and "`instruction` with `input`" in printed
    shutil.copytree(tmp_path / "alone" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    args += (
        "--output_dir",
        tmp_path / "resumed",
        "--resume_from_checkpoint",
        "last",
        "--per_device_train_batch_size",
        2,
    )
    train(folder, *args, ranks=2, recipe="stream.yaml")
    assert sorted(curve(tmp_path / "resumed")) == [1, 2, 3, 4, 5, 6]
    assert curve(tmp_path / "resumed") == pytest.approx(curve(tmp_path / "alone"), rel=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "error: `draft_vocab_size` is 24, but `streaming` data cannot be counted first"),
        (["--max_steps", -1], "error: `streaming` data have no length: set `max_steps`"),
        (
            ["--train_sampling_strategy", "group_by_length"],
            "error: `train_sampling_strategy` is group_by_length, which",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_refused_first(args, message, folder, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import train_eagle

    command = ["train_eagle.py", "--config", str(folder / "recipe.yaml"), "--streaming", "--output_dir", "nowhere"]
    monkeypatch.setattr("sys.argv", [*command, *map(str, args)])
    with pytest.raises(ValueError) as caught:
        train_eagle.main()
    assert f"error: {caught.value}".startswith(message) and not Path("nowhere").exists()


def test_another_tokenizer_than_the_mappings_is_refused(trained, folder, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(folder / "target", tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    file = json.loads((tmp_path / "target" / "tokenizer.json").read_text())
    vocabulary = file["model"]["vocab"]
    first, second = [word for word in vocabulary if word not in tokenizer.all_special_tokens][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "target" / "tokenizer.json").write_text(json.dumps(file))
    args = ("--output_dir", trained, "--resume_from_checkpoint", "last", "--target", tmp_path / "target")
    printed = train(folder, *args, expect=1)
    assert "mapping was made with another tokenizer" in printed


def test_an_adapter_is_trained_and_resumed(trained, folder, tmp_path):
    args = ("--output_dir", tmp_path / "lora", "--init_from", trained, "--use_peft", "--lora_r", 4)
    modules = ("--lora_target_modules", "q_proj", "fc", "lm_head")
    printed = train(folder, *args, *modules, "--max_steps", 3)
    # q: 64 -> 32, fc: 96 -> 32, head: 32 -> 24
    assert f"The adapter has {4 * (96 + 128 + 56)} parameters" in printed and "load that folder" in printed
    before, after = (load_file(run / "model.safetensors") for run in (trained, tmp_path / "lora"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {"midlayer.self_attn.q_proj.weight", "fc.weight", "lm_head.weight"}

    train(folder, *args, *modules, "--resume_from_checkpoint", "last", "--max_steps", 4)
    assert sorted(curve(tmp_path / "lora")) == [1, 2, 3, 4]


def test_an_adapter_on_no_draft_or_in_its_place_is_refused(trained, folder, monkeypatch):
    sys.path.insert(0, str(ROOT / "scripts"))
    import train_eagle

    args = ["--config", folder / "recipe.yaml", "--use_peft", "--overwrite"]
    for more, message in (
        (["--output_dir", folder / "new"], "`use_peft` trains an adapter on an existing draft: name that draft"),
        (["--output_dir", trained, "--init_from", f"{trained}/"], "is also the input `init_from`: name"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_eagle.py", *map(str, args + more)])
        with pytest.raises(ValueError, match=message):
            train_eagle.main()
    assert (trained / "model.safetensors").is_file()


def test_a_dry_run_needs_a_config_and_leaves_nothing(folder, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "target" / "config.json", tmp_path / "bare")
    args = ("--target", tmp_path / "bare", "--output_dir", tmp_path / "out", "--dry_run", "--device_memory_gb", 0.0001)
    printed = train(folder, *args, "--world_size", 2)
    assert "Each of 2 rank(s): LlamaForCausalLM of 8 layers" in printed and "DDP's buckets" in printed
    assert "Taps: entry ids 2, 4, 5 of 8 layers (Llama)." in printed
    assert "This cannot fit `device_memory_gb` 0.0001" in printed and not (tmp_path / "out").exists()
    printed = train(folder, *args[:-3], "--world_size", 2, expect=2)
    assert "`world_size` is 2, but only `dry_run` uses it" in printed


@pytest.fixture(scope="module")
def trained_eagle1(folder):
    printed = train(folder, "--output_dir", folder / "eagle1", "--eval_share", 0.25, recipe="eagle1.yaml")
    assert "vLLM and SGLang load that folder" in printed
    return folder / "eagle1"


def test_eagle1_leaves_a_draft_with_its_curves(trained_eagle1, folder):
    from hf_eagle import FrozenTarget, LlamaForCausalLMEagle, load_draft

    draft = load_draft(trained_eagle1, FrozenTarget.from_pretrained(str(folder / "target")))
    assert type(draft) is LlamaForCausalLMEagle and draft.config.tokenizer_fingerprint
    history = json.loads((trained_eagle1 / "trainer_state.json").read_text())["log_history"]
    for entry in (e for e in history if "loss" in e):
        assert entry["loss"] == pytest.approx(entry["regression_loss"] + 0.1 * entry["ce_loss"], rel=1e-3)
    assert json.loads((trained_eagle1 / "eval_results.json").read_text())["eval_ce_loss"] > 0
    assert (trained_eagle1 / "training.png").stat().st_size > 5000


def test_eagle2_resumes_what_eagle1_began(trained_eagle1, folder):
    """They are one draft; EAGLE-3 is another."""
    args = ("--output_dir", trained_eagle1, "--resume_from_checkpoint", "last", "--max_steps", 8)
    printed = train(folder, *args, "--method", "eagle3", recipe="eagle1.yaml", expect=1)
    assert "error: `method` is eagle3 but" in printed and "was trained with eagle1" in printed
    (folder / "asked.txt").write_text("red green\nstone fish\n")
    acceptance = ("--acceptance_prompts", folder / "asked.txt", "--acceptance_steps", 8)
    train(folder, *args, "--method", "eagle2", *acceptance, recipe="eagle1.yaml")
    assert max(curve(trained_eagle1)) == 8
    history = json.loads((trained_eagle1 / "trainer_state.json").read_text())["log_history"]
    assert [entry["acceptance_length"] >= 1 for entry in history if "acceptance_length" in entry] == [True]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--draft_vocab_size", 24],
            "`draft_vocab_size` is 24, which means nothing to an EAGLE-1/2 draft: leave it out",
        ),
        (["--tap_ids", 2, 4, 5], "`tap_ids` is [2, 4, 5], which means nothing"),
        (["--fc_norm", "true"], "`fc_norm` is True, which means nothing"),
        (["--ttt_steps", 2], "`ttt_steps` is 2, which means nothing"),
        (
            ["--method", "eagle3", "--feature_noise", "none"],
            "`feature_noise` is none, which means nothing to an EAGLE-3",
        ),
    ],
)
def test_options_of_another_method_are_one_sentence(args, message, folder, tmp_path):
    printed = train(folder, "--output_dir", tmp_path / "out", *args, recipe="eagle1.yaml", expect=1)
    assert printed.strip().splitlines()[-1].startswith("error: ") and message in printed, printed
    assert "Traceback" not in printed and not (tmp_path / "out").exists()
