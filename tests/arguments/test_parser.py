"""YAML file and command line, and `--help` without torch."""

import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import pytest

from hf_eagle.arguments.groups import (
    AdapterArguments,
    DataArguments,
    DraftArguments,
    DryRunArguments,
    TargetArguments,
)
from hf_eagle.arguments.objective import refuse_other_methods
from hf_eagle.arguments.parser import EagleArgumentParser, argument
from hf_eagle.data.forms import FORMS
from hf_eagle.training.run_arguments import RunArguments


FORMS_IN_ORDER = ("messages", "sharegpt", "alpaca", "prompt_completion", "preference", "text")
ROOT = Path(__file__).resolve().parents[2]
FILE = """
target: some/model
train_data: [a.jsonl, b.jsonl]
tap_ids: [1, 5, 9]
learning_rate: 1e-4
bf16: true
max_length: 512
draft_vocab_size: null
"""


@pytest.fixture
def parse(tmp_path):
    from hf_eagle import EagleTrainingArguments

    def parse(*args, file=FILE):
        (tmp_path / "run.yaml").write_text(file)
        parser = EagleArgumentParser((TargetArguments, DraftArguments, DataArguments, EagleTrainingArguments))
        return parser.parse_args_and_config(["--config", str(tmp_path / "run.yaml"), *args])

    return parse


def test_file_then_command_line(parse):
    target, draft, data, training = parse("--ttt_steps", "3", "--tap_ids", "2", "7", "--max_length=99")
    assert (target.target, target.tap_ids) == ("some/model", [2, 7])
    assert (data.train_data, data.max_length) == (["a.jsonl", "b.jsonl"], 99)
    assert draft.draft_vocab_size is None
    assert (training.learning_rate, training.bf16, training.ttt_steps) == (1e-4, True, 3)


@pytest.mark.parametrize("word", ["none", "None", "null"])
@pytest.mark.parametrize("given", ["{}={}", "{} {}"])
def test_none_unsets_every_number_that_may_be_unset(parse, word, given):
    """As null does in YAML, also where the file has set it: one number and several, of ours and of the library's."""
    file = FILE + "acceptance_prompts: p.txt\nacceptance_steps: 5\nmax_grad_norm: 1.0\nsave_total_limit: 3\n"
    file += "data_weights: [1, 2]\n"
    file = file.replace("draft_vocab_size: null", "draft_vocab_size: 24")
    names = ["draft_vocab_size", "tap_ids", "data_weights", "acceptance_steps", "save_total_limit"]
    words = [part for name in names for part in given.format(f"--{name}", word).split()]
    groups = parse(*words, file=file)
    for name in names:
        assert next(getattr(group, name) for group in groups if hasattr(group, name)) is None


@pytest.mark.parametrize("word", ["none", "None", "null"])
@pytest.mark.parametrize("given", ["{}={}", "{} {}"])
def test_none_unsets_a_scaling(parse, word, given):
    """As null does in YAML, also where the file has set it."""
    file = FILE + "draft_rope_scaling: {rope_type: linear, factor: 2.0}\n"
    draft = parse(*given.format("--draft_rope_scaling", word).split(), file=file)[1]
    assert draft.draft_rope_scaling is None and draft.rope_scaling is None
    assert parse(file=FILE + f"draft_rope_scaling: {word.lower()}\n")[1].rope_scaling is None


def test_data_options(parse):
    _, _, data, _ = parse(file=FILE + "chat_template_kwargs: {enable_thinking: false}\ndata_weights: [0.5, 2]\n")
    assert data.template_kwargs == {"enable_thinking": False} and data.data_weights == [0.5, 2.0]
    _, draft, _, _ = parse(file=FILE + "draft_rope_scaling: {rope_type: linear, factor: 2.0}\n")
    assert draft.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert get_args(DataArguments.__dataclass_fields__["dataset_format"].type) == ("auto", *FORMS_IN_ORDER)
    assert sorted(FORMS) == sorted(FORMS_IN_ORDER)


@pytest.mark.parametrize(
    ("args", "file", "message"),
    [
        ([], FILE + "lerning_rate: 3\n", "unknown argument --lerning_rate, did you mean --learning_rate?"),
        ([], FILE + "loss: mse\n", "--loss: invalid choice: 'mse'"),
        ([], FILE + "ttt_steps: many\n", "invalid int value: 'many'"),
        ([], "- a\n- b\n", "must hold `argument: value` lines, got list"),
        ([], "a: [1\n", "cannot be read as YAML"),
        ([], "max_length: 5\n", "the following arguments are required: --target, --train_data"),
        (["--max_length", "none"], FILE, "invalid int value: 'none'"),
        (["--draft_vocab_size", "nothing"], FILE, "invalid int value: 'nothing'"),
        (["--tap_ids", "1", "none"], FILE, "`tap_ids` must be a whole number, got None"),
        (["--fill_vocabulary"], FILE, "`fill_vocabulary` is set, but `draft_vocab_size` is not"),
        (["--ttt_step", "3"], FILE, "unknown argument --ttt_step, did you mean --ttt_steps?"),
        (["--ttt_steps", "0"], FILE, "`ttt_steps` must be at least 1 and at most 64, got 0"),
        (["--step_weight", "0"], FILE, "`step_weight` must be above 0 and at most 1, got 0.0"),
        (["--eval_share", "1.5"], FILE, "`eval_share` must be at least 0 and below 1, got 1.5"),
        (["--max_length", "2"], FILE, "`max_length` must be at least 4, got 2"),
        (["--data_weights", "1"], FILE, "`data_weights` has 1 values for the 2 sources of `train_data`"),
        (["--streaming", "--packing"], FILE, "`packing` needs all data at once, which `streaming` never has"),
        (["--streaming", "--eval_share", "0.1"], FILE, "`eval_share` needs all data at once"),
        (["--streaming", "--feature_store", "features"], FILE, "`feature_store` needs all data at once"),
        (["--dataset_format", "chatml"], FILE, "-format: invalid choice: 'chatml'"),
        (["--chat_template_kwargs", "{thinking: no}"], FILE, "`chat_template_kwargs` is not JSON"),
        (["--chat_template_kwargs", "[1]"], FILE, "`chat_template_kwargs` must be a JSON object, got [1]"),
        (["--config", "nowhere.yaml"], FILE, "nowhere.yaml cannot be read"),
    ],
)
def test_what_does_not_fit_is_one_sentence(parse, args, file, message, capsys):
    if args[:1] == ["--config"]:
        with pytest.raises(SystemExit):
            EagleArgumentParser(TargetArguments).parse_args_and_config(args)
    else:
        with pytest.raises(SystemExit):
            parse(*args, file=file)
    printed = capsys.readouterr().err
    assert message in printed and len(printed.strip().splitlines()) == 1


def test_values_are_checked_without_a_command_line_too():
    from hf_eagle import EagleTrainingArguments

    with pytest.raises(ValueError, match="`loss` must be one of ce, lk_alpha, lk_lambda, label, dpace, got 'mse'"):
        EagleTrainingArguments(output_dir="x", loss="mse")


@pytest.mark.parametrize(
    ("base_model", "what"),
    [
        ("models/llama", "a folder of this machine"),
        ("~/models/llama", "a folder of this machine"),
        ("./models/llama", "a folder of this machine"),
        ("llama", "a folder of this machine"),
        ("/nowhere/llama", "a folder of this machine"),
        ("~/nowhere", "a folder of this machine"),
        ("org/models/llama", "which is no Hub id"),
        ("", "which is no Hub id"),
    ],
)
def test_a_base_model_that_no_card_can_link_is_refused_at_the_start(base_model, what, tmp_path, monkeypatch):
    for folder in ("models/llama", "llama"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"^`base_model` is {base_model}, {what}: give the target's id on the Hub"):
        TargetArguments(target="llama", base_model=base_model)
    assert TargetArguments(target="llama", base_model="org/llama").base_model == "org/llama"


@dataclass
class Switches:
    """Truth values in every form that may get an option to turn them off, and one that does not."""

    plain: bool = argument(True, "Do it.")
    two_words: bool = argument(True, "Do it (default: never).")
    perhaps: bool | None = argument(True, "Do it, or let it be.")
    off: bool = argument(False, "Do that.")


def switches_of(group) -> list[str]:
    return [known.name for known in fields(group) if known.default is True]


@pytest.mark.parametrize(
    "group",
    [Switches, TargetArguments, DraftArguments, AdapterArguments, DataArguments, DryRunArguments, None],
    ids=lambda group: "EagleTrainingArguments" if group is None else group.__name__,
)
def test_an_option_that_turns_off_says_so(group, monkeypatch):
    """The library gives `--no_X` the help and the default of `--X`, the opposite of what it does."""
    if group is None:
        from hf_eagle import EagleTrainingArguments as group
    monkeypatch.setenv("COLUMNS", "1000")  # an option and its help in one line
    helped = EagleArgumentParser(group).format_help()
    assert set(re.findall(r"^  --no_(\w+)", helped, re.MULTILINE)) == set(switches_of(group))

    for name in switches_of(group):
        assert re.search(rf"^  --no_{name}\s+Turn off `--{name}`\.$", helped, re.MULTILINE), name
        assert re.search(rf"^  --{name}\s.+\(default: True\)$", helped, re.MULTILINE), name


@pytest.mark.parametrize("name", switches_of(Switches))
def test_an_option_that_turns_off_does_so(name, tmp_path):
    def parse(*args):
        return vars(EagleArgumentParser(Switches).parse_args_and_config(list(args))[0])

    unset = dict.fromkeys(switches_of(Switches), True) | {"off": False}
    (tmp_path / "run.yaml").write_text(f"{name}: false\n")
    assert parse() == unset
    assert parse(f"--no_{name}") == parse("--config", str(tmp_path / "run.yaml")) == unset | {name: False}
    assert parse("--config", str(tmp_path / "run.yaml"), f"--{name}") == unset


SCRIPTS = [
    "train_eagle",
    "evaluate_draft",
    "regenerate_answers",
    "write_prompts",
    "fetch_assets",
    "quickstart",
    "preview_data",
    "prune_draft",
    "import_draft",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_instant_and_complete(script):
    """Without torch there is nothing to wait for."""
    code = (
        "import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'scripts' / script)!r} + '.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "--config" in done.stdout
    documented = [line for line in done.stdout.splitlines() if line.startswith("  --")]
    assert len(documented) >= 3


def test_help_is_shown_whatever_else_is_asked(capsys):
    """The parser of the help loads no torch, so it does not know most arguments of transformers."""
    for more in (["--config", "qwen3-8b-eagle3"], ["--output_dir", "there"]):
        with pytest.raises(SystemExit) as ended:
            RunArguments.parse([*more, "--help"])
        assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "training_args").glob("*.yaml")))
def test_recipes_parse(recipe):
    from hf_eagle import EagleTrainingArguments

    parser = EagleArgumentParser((TargetArguments, DraftArguments, DataArguments, EagleTrainingArguments))
    target, draft, data, args = parser.parse_args_and_config(["--config", str(ROOT / "training_args" / recipe)])
    assert target.target
    refuse_other_methods(draft.kind, target, draft, args)
    assert draft.method == next(method for method in ("eagle1", "eagle2", "eagle3", "dflash") if method in recipe)
    assert (draft.fc_norm, draft.norm_output) == (("eagle3.1" in recipe,) * 2)
    if recipe in (
        "smollm2-135m-eagle1.yaml",
        "smollm2-135m-eagle3.yaml",
        "smollm2-135m-dflash.yaml",
    ):  # comparable: the same data, as often
        assert (data.max_length, data.packing, args.num_train_epochs) == (512, True, 3)
        assert args.per_device_train_batch_size == 1


def test_help_that_cannot_be_printed_is_told(monkeypatch):
    class Full:
        """A file on a full disk."""

        def write(self, text):
            raise OSError(28, "No space left on device")

        def fileno(self):
            raise OSError("none")

    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(OSError, match="^Standard output cannot be written .No space left on device.: make room where"):
        EagleArgumentParser(DataArguments).parse_args_and_config(["--help"])
