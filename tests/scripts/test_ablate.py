"""scripts/ablate.py: variants of a recipe trained for the same time, measured, not done twice, in a table."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from forks import ROOT
from tiny_files import write_chats, write_tiny_target
from warm_python import warm_python

from hf_eagle.door.sentences import is_sentence


sys.path.insert(0, str(ROOT / "scripts"))
import ablate  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    write_tiny_target(folder / "target")
    write_chats(folder / "chats.jsonl")
    recipe = {
        "target": str(folder / "target"),
        "train_data": [str(folder / "chats.jsonl")],
        "eval_data": [str(folder / "chats.jsonl")],
        "draft_vocab_size": 24,
        "ttt_steps": 2,
        "oov_rows": "renormalize",
        "per_device_train_batch_size": 4,
        "max_length": 64,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "variants.yaml").write_text("recipe: {}\nwhole vocabulary: {draft_vocab_size: null}\n")
    (folder / "prompts.txt").write_text("red green\nstone fish\nbird\n")
    return folder


def run(folder, monkeypatch, capsys, **changes):
    """Runs the comparison here and the scripts that it calls in forks; what was printed, and how many it called."""
    called = []

    def forked(command, env, stdout, stderr):
        called.append(command)
        done = warm_python().run(*command[1:], **env)
        stdout.write(done.stdout + done.stderr)
        return done

    values = {"recipe": "recipe.yaml", "variants": "variants.yaml", "prompts": "prompts.txt", "output_dir": "out"}
    options = [f"--{name}={folder / value}" for name, value in values.items()]
    options += [f"--{name}={value}" for name, value in ({"minutes": 0.005, "max_new_tokens": 8} | changes).items()]
    monkeypatch.setattr(subprocess, "run", forked)
    monkeypatch.setattr(sys, "argv", ["ablate.py", *options])
    ablate.main()
    return capsys.readouterr().out, len(called)


def test_variants_are_trained_measured_and_not_done_twice(folder, monkeypatch, capsys):
    printed, calls = run(folder, monkeypatch, capsys)
    assert calls == 2 * (2 + 2)  # two trials, a training and a measurement of each
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert sorted(row[0] for row in rows) == ["| recipe", "| whole vocabulary"]
    for row in rows:
        out = folder / "out" / ablate.slug(row[0][2:])
        trained = json.loads((out / "0" / "trainer_state.json").read_text())
        trials = [json.loads((out / f"trial-{n}" / "train_results.json").read_text()) for n in range(ablate.TRIALS)]
        trial = min(found["train_runtime"] for found in trials)
        assert int(row[1]) == trained["global_step"] == max(1, round(0.3 / (trial / ablate.TRIAL_STEPS)))
        acceptance = json.loads((out / "0" / "acceptance.json").read_text())
        assert row[4] == f"{acceptance['acceptance_length']:.3f} |" and acceptance["num_prompts"] == 3
        assert re.fullmatch(r"\d\.\d{3}", row[3])
        size = json.loads((out / "0" / "config.json").read_text())["draft_vocab_size"]
        assert (size == 24) == (row[0] == "| recipe")

    measured = folder / "out" / "recipe" / "0" / "acceptance.json"
    before = json.loads(measured.read_text())["accepted_per_position"]
    measured.unlink()  # as after an interruption of the measurement
    assert run(folder, monkeypatch, capsys)[1] == 1
    assert json.loads(measured.read_text())["accepted_per_position"] == before

    printed, calls = run(folder, monkeypatch, capsys, seeds=2)
    assert calls == 2 * 2  # the second seed
    assert printed.count(" ± ") == 2 and "(2 degrees of freedom)" in printed


def test_the_spread_is_of_each_variant_and_of_all():
    run = {"steps": 5, "minutes": 1.0, "estimate": None}
    lengths = {"one": [1.4, 1.2], "two": [1.6, 1.6, 1.9]}
    printed = ablate.table({name: [run | {"length": x} for x in found] for name, found in lengths.items()})
    assert printed.splitlines()[2:4] == ["| two | 5 | 1.0 |  | 1.700 ± 0.173 |", "| one | 5 | 1.0 |  | 1.300 ± 0.141 |"]
    assert "a standard deviation of 0.163 (3 degrees of freedom)" in printed  # sqrt((0.02 + 0.06) / 3)
    assert "degrees" not in ablate.table({"one": [run | {"length": 1.4}]})


def test_a_variant_that_fails_late_is_told_in_a_line_and_the_others_go_on(folder, monkeypatch, capsys):
    (folder / "wrong.yaml").write_text("deep: {tap_ids: [1, 900]}\nrecipe: {}\n")
    with pytest.raises(RuntimeError, match="^`output_dir` .*: 1 of 2 runs failed, with the errors above"):
        run(folder, monkeypatch, capsys, variants=folder / "wrong.yaml", output_dir=folder / "mixed")
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if line.startswith("deep: ")]
    assert len(told) == 1 and "trial-0.log" in told[0] and "`tap_ids`" in told[0] and told[0].endswith(".")
    rows = [line for line in printed.out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 1 and rows[0].startswith("| recipe |")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("{ttt_steps: 0}", "`ttt_steps` must be at least 1"),
        ("{ttt_steps: three}", "argument --ttt_steps/--ttt-steps: invalid int value: 'three'"),
        ("{ttt_steps: [1, 2]}", "gives `ttt_steps` a list"),
        ("{ttt_step: 2}", "unknown argument --ttt_step, did you mean --ttt_steps?"),
        ("{loss: mse}", "argument --loss: invalid choice: 'mse'"),
        ("{method: eagle1}", "`draft_vocab_size`"),
        ("{train_data: [/no/such.jsonl]}", "`train_data` /no/such.jsonl does not exist"),
        ("{target: /no/such}", "`target` /no/such does not exist"),
        ("{init_from: /no/such}", "`init_from` /no/such does not exist"),
        ("{optim: adamw_bnb_8bit}", "`optim` adamw_bnb_8bit cannot be used here"),
        ("{attn_implementation: none}", "`attn_implementation` must be one of"),
        ("{eval_strategy: no, load_best_model_at_end: true}", "`load_best_model_at_end`"),
        ("{max_length: 0}", "`max_length` must be at least"),
        ("{tools: /no/such.json}", "`tools` cannot be read"),
    ],
)
def test_all_variants_are_checked_before_the_first_is_trained(changes, said, folder, monkeypatch, capsys):
    variants = folder / "late.yaml"
    variants.write_text(f"recipe: {{}}\nlate one: {changes}\n")
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError) as problem:
        run(folder, monkeypatch, capsys, variants=folder / "late.yaml", output_dir=folder / "never")
    told = str(problem.value)
    assert told.startswith(f"`variants` {variants}: 'late one' cannot be trained: ") and said in told
    assert "\n" not in told and "/tmp/tmp" not in told and is_sentence(problem.value)
    assert sorted(folder.iterdir()) == before


def test_words_that_yaml_takes_for_truth_values_reach_the_runs(folder, monkeypatch, capsys):
    (folder / "words.yaml").write_text("words: {eval_strategy: no, bf16: no, load_best_model_at_end: off}\n")
    printed, _ = run(folder, monkeypatch, capsys, variants=folder / "words.yaml", output_dir=folder / "words")
    assert "| words |" in printed


def broken_config(target):
    (target / "config.json").write_text("[]")


def broken_tokenizer(target):
    (target / "tokenizer.json").write_text("{oops")


def broken_template(target):
    (target / "chat_template.jinja").write_text("{{ raise_exception('no chats here') }}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (broken_config, r"`target` .* cannot be read: config.json must hold an object"),
        (broken_tokenizer, r"`target` .* cannot be read: tokenizer.json"),
        (broken_template, r"[Pp]rompt .*no chats here"),
        (None, r"`max_new_tokens` is 300, but `target` .* reads 256 tokens at most"),
    ],
)
def test_what_only_a_measurement_would_find_is_told_before_training(
    change, said, folder, monkeypatch, capsys, tmp_path
):
    target, options = shutil.copytree(folder / "target", tmp_path / "target"), {}
    if change is None:
        options["max_new_tokens"] = 300
    else:
        change(target)
    (folder / "broken.yaml").write_text(f"recipe: {{}}\nbroken: {{target: {target}}}\n")
    with pytest.raises((OSError, ValueError), match=said):
        run(folder, monkeypatch, capsys, variants=folder / "broken.yaml", output_dir=tmp_path / "never", **options)
    assert not (tmp_path / "never").exists()


def test_weights_that_are_cut_are_told_in_one_sentence(folder, monkeypatch, capsys, tmp_path):
    target = shutil.copytree(folder / "target", tmp_path / "target")
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    (folder / "cut.yaml").write_text(f"cut: {{target: {target}}}\n")
    with pytest.raises(RuntimeError, match="^`output_dir` .*: 1 of 1 runs failed, with the errors above"):
        run(folder, monkeypatch, capsys, variants=folder / "cut.yaml", output_dir=tmp_path / "out")
    told = capsys.readouterr().err.strip()
    assert "model.safetensors is cut" in told and f"`target` {target}" in told and len(told.splitlines()) == 1


def test_bad_arguments(folder, monkeypatch, capsys):
    (folder / "list.yaml").write_text("- recipe\n")
    for option, message in (("nowhere.yaml", "does not exist"), ("list.yaml", "must hold `argument: value` lines")):
        with pytest.raises(ValueError, match=message):
            ablate.read_variants(folder / option)
    monkeypatch.setattr(sys, "argv", ["ablate.py", *(f"--{n}=x" for n in ("recipe", "variants", "prompts"))])
    sys.argv += ["--output_dir=x", "--minutes=0"]
    with pytest.raises(SystemExit):
        ablate.main()
    assert "`minutes` must be above 0" in capsys.readouterr().err


def test_a_full_disk_for_temporary_files_is_told(folder, monkeypatch, capsys):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    args = ablate.AblationArguments("recipe.yaml", "variants.yaml", "prompts.jsonl", str(folder / "out"))
    monkeypatch.setattr(ablate, "training_of", lambda *_: "a" * 200)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="^`TMPDIR` .*variant.yaml"):
            ablate.checked(args, "more", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
