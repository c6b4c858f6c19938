"""All verbs x all of their number arguments x what no number may be: one sentence with the argument, and no work."""

import dataclasses
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import transformers
from warm_python import warm_python

from hf_eagle.arguments.bounds import LIMIT, Bounds, bounds_of, check_numbers
from hf_eagle.arguments.inherited import INHERITED
from hf_eagle.arguments.parser import EagleArgumentParser
from hf_eagle.cli import VERBS


ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {**VERBS, "quickstart": "quickstart.py", "fetch-assets": "fetch_assets.py"}
VALUES = ("0", "-1", "nan", "inf", "1e30", "text")
# where these mean something; nothing else of `VALUES` is ever taken
FINE = {
    "0": {
        *(
            "mask_token_id",
            "dpace_alpha",
            "q_lora_rank",
            "tap_ids",
            "lora_dropout",
            "eval_share",
            "lk_scale",
            "lk_decay",
            "num_previews",
        ),
        *("html_conversations", "temperature", "seed", "time_limit", "retries", "hub_seconds", "max_steps"),
        *("learning_rate", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "eval_delay"),
        *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "data_seed", "dataloader_num_workers"),
        *("local_rank", "regression_weight", "ce_weight"),
    },
    "-1": {"max_steps", "local_rank"},
}
NOT_FINE = {("write-prompts", "temperature")}  # prompts are drawn, never the most probable one
# numbers that are limited by what is there (records, a target's positions, steps), or that cost nothing
ANY = {
    *("acceptance_num_prompts", "eval_prompts", "num_chats", "num_prompts", "num_records", "tap_ids"),
    *("max_frames", "max_pixels", "min_pixels", "fps", "target_shard_size", "draft_vocab_size", "sampling_top_k"),
    *("max_length", "max_model_len", "max_new_tokens", "eval_new_tokens"),
    *("max_steps", "num_train_epochs", "warmup_steps", "max_unsupervised_steps", "acceptance_steps"),
    *("eval_steps", "eval_delay", "save_steps", "save_total_limit", "logging_steps", "torch_empty_cache_steps"),
    *("eval_accumulation_steps", "ddp_bucket_cap_mb", "ddp_timeout", "local_rank", "device_memory_gb"),
    *("mask_token_id", "num_anchors", "slot_decay", "loss_window"),
    *("ce_weight", "regression_weight", "lk_decay", "lk_scale", "lora_alpha", "max_grad_norm", "neftune_noise_alpha"),
}
HANGS = (
    ("evaluate", "num_speculative_tokens", 65),
    ("evaluate", "turns", 10**8),
    ("evaluate", "batch_size", 10**9),
    ("train", "ttt_steps", 65),
    ("train", "per_device_train_batch_size", 10**9),
    ("benchmark", "repeats", 10**9),
    ("benchmark", "ttt_steps", 65),
    ("benchmark-serving", "rounds", 10**9),
    ("ablate", "seeds", 10**9),
    ("preview", "html_conversations", 10**9),
    ("quickstart", "num_speculative_tokens", 65),
    ("write-prompts", "num_prompts", 10**9),
)
# texts that hold numbers
COUNTS = {"evaluate": ("sweep_tokens",), "benchmark-serving": ("num_speculative_tokens", "batch_sizes")}


@cache
def parser_of(verb: str) -> EagleArgumentParser:
    """The parser that a verb makes when it runs, with all groups."""
    made = []

    class Seen(Exception):
        """The parser was made."""

    def parse(self, *_, **__):
        made.append(self)
        raise Seen

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))  # where a script that runs finds the others
        patch.setattr(EagleArgumentParser, "parse_args_and_config", parse)
        with pytest.raises(Seen):
            runpy.run_path(str(ROOT / "scripts" / SCRIPTS[verb]), run_name="walk")["door"]([])
    return made[0]


def is_number(hint) -> bool:
    """Whether a type is one of numbers, by a look of our own."""
    if get_origin(hint) is Literal:
        return False
    return hint in (int, float) or any(map(is_number, get_args(hint)))


def numbers_of(verb: str) -> list[str]:
    hints = [item for group in parser_of(verb).dataclass_types for item in get_type_hints(group).items()]
    fields = {f.name for group in parser_of(verb).dataclass_types for f in dataclasses.fields(group)}
    return sorted({name for name, hint in hints if name in fields and is_number(hint)})


def words_for(verb: str, *given: str) -> list[str]:
    """A command line with all that a verb must be told."""
    needed = {action.dest for action in parser_of(verb)._actions if action.required}
    return [word for name in sorted(needed) for word in (f"--{name}", "nowhere")] + list(given)


@pytest.mark.parametrize("verb", SCRIPTS)
def test_what_no_number_may_be_is_refused(verb, capsys):
    parser = parser_of(verb)
    for name in numbers_of(verb):
        for value in VALUES:
            words = words_for(verb, f"--{name}={value}")
            if name in FINE.get(value, ()) and (verb, name) not in NOT_FINE:
                parser.parse_known_args(words)
                continue
            with pytest.raises(SystemExit) as ended:
                parser.parse_args_and_config(words)
            printed = capsys.readouterr()
            assert ended.value.code == 2 and not printed.out
            assert len(printed.err.strip().splitlines()) == 1
            assert re.search(rf"`{name}` must be|argument --{name}\b.*: invalid (int|float) value", printed.err)


@pytest.mark.parametrize("verb", COUNTS)
def test_texts_of_counts_have_bounds_too(verb, capsys):
    for name in COUNTS[verb]:
        for value in (*VALUES, "0..3", "1..300000000", "3..1", "9" * 5000, "1," * 2000 + "1", "1..", "..2", ""):
            with pytest.raises(SystemExit):
                parser_of(verb).parse_args_and_config(words_for(verb, f"--{name}={value}"))
            assert (
                f"`{name}` must be numbers from 1 to {1024 if name == 'batch_sizes' else 64}" in capsys.readouterr().err
            )


@pytest.mark.parametrize("verb", SCRIPTS)
def test_help_shows_the_bounds(verb):
    """Of every number, from its type alone: in words that hold of the numbers at the bounds themselves."""
    parser = parser_of(verb)
    shown = {text.split()[0]: " ".join(text.split()) for text in re.split(r"\n  --", parser.format_help())[1:]}
    for group in parser.dataclass_types:
        for name, bounds in bounds_of(group).items():
            told = bounds.told()
            assert f"({told}" in shown[name] if told else not re.search(r"\((at |above|below|-?\d)", shown[name])
            assert_holds(told, bounds)


def assert_holds(told: str, bounds: Bounds) -> None:
    limits = [float(found.replace(",", "")) for found in re.findall(r"-?[\d,.]+", told)]
    inside = "to" in told.split() or told.startswith(("at least", "at most"))
    for limit in limits[: 1 + told.count(" to ")]:
        assert (bounds.violation(bounds.kind(limit)) is None) == inside, told


def test_the_walk_sees_numbers():
    assert sum(len(numbers_of(verb)) for verb in SCRIPTS) > 150
    assert {"max_length", "learning_rate", "acceptance_steps", "data_weights"} <= set(numbers_of("train"))
    assert {verb for verb in SCRIPTS if not numbers_of(verb)} == {"publish", "compare", "targets"}
    for value, names in FINE.items():
        assert names <= {name for verb in SCRIPTS for name in numbers_of(verb)}, value


@pytest.mark.parametrize("kind", VALUES)
def test_a_real_process_for_each_kind(kind, tmp_path):
    """What a user sees: exit status 2 and one line, before any of the files is missed."""
    given = ["--target", tmp_path / "t", "--data", tmp_path / "d", "--output", tmp_path / "o.jsonl"]
    done = warm_python().run(ROOT / "scripts" / "regenerate_answers.py", *given, f"--top_p={kind}")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "top_p" in done.stderr
    assert not any(tmp_path.iterdir())


def test_every_number_of_the_library_has_bounds():
    """A field that a version of transformers adds is looked at before it is relied on."""
    hints = get_type_hints(transformers.TrainingArguments)
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert {name for name in fields if is_number(hints[name])} == set(INHERITED)


@pytest.mark.parametrize(("verb", "name", "value"), HANGS)
def test_a_number_that_would_only_hang_is_refused_at_the_door(verb, name, value):
    parser = parser_of(verb)
    (bounds,) = {bounds_of(group)[name] for group in parser.dataclass_types if name in bounds_of(group)}
    assert bounds.violation(value) is not None and "at most" in bounds.violation(value) and bounds.most < 2**31 - 1
    assert bounds.violation(int(bounds.most)) is None


def test_every_number_without_a_bound_costs_nothing():
    """Whoever adds an argument says what its largest number is, or adds it here."""
    groups = {group for verb in SCRIPTS for group in parser_of(verb).dataclass_types}
    bounds = [item for group in groups for item in bounds_of(group).items()]
    assert {name for name, one in bounds if one.most == LIMIT and one.below is None} <= ANY


def test_numbers_from_python_are_checked_alike():
    from hf_eagle import EagleTrainingArguments
    from hf_eagle.arguments.groups import DataArguments

    for group, name in ((EagleTrainingArguments, "max_steps"), (DataArguments, "max_length")):
        first = {"output_dir": "x"} if group is EagleTrainingArguments else {"train_data": ["x"]}
        for value in (float("nan"), float("inf"), 1e30, "text", 2.5, True, -2, 2**31):
            with pytest.raises(ValueError, match=rf"^`{name}` must be .*, got "):
                group(**first, **{name: value})


def test_defaults_lie_within_bounds():
    for verb in SCRIPTS:
        for group in parser_of(verb).dataclass_types:
            defaults = {field.name: field.default for field in dataclasses.fields(group)}
            assert dataclasses.MISSING not in {defaults[name] for name in bounds_of(group)}  # none is required
            check_numbers(group, defaults)


@pytest.mark.parametrize(
    ("bounds", "value", "wanted"),
    [
        (Bounds(), 1.5, None),
        (Bounds(), -1e30, "at least -2,147,483,647"),
        (Bounds(kind=int), 2**31, "at most 2,147,483,647"),
        (Bounds(kind=int), 1.0, "a whole number"),
        (Bounds(), "1", "a number"),
        (Bounds(), float("nan"), "a finite number"),
        (Bounds(least=0, below=1), 1, "at least 0 and below 1"),
        (Bounds(above=0, most=1), 0, "above 0 and at most 1"),
        (Bounds(above=0), 0, "above 0"),
        (Bounds(least=0, most=2**32 - 1), 2**32 - 1, None),
        # without a lower bound, help promises no more than the upper one
        (Bounds(most=5), -6, None),
        (Bounds(most=5), 6, "at most 5"),
        (Bounds(most=0.5), -1, None),
        (Bounds(most=-1), -2, None),
        (Bounds(most=-1), 0, "at most -1"),
        (Bounds(below=-1), -2, None),
    ],
)
def test_what_is_said_of_a_number(bounds, value, wanted):
    assert bounds.violation(value) == wanted


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        (Bounds(), ""),
        (Bounds(kind=int), ""),
        (Bounds(least=1, kind=int), "at least 1"),
        (Bounds(most=5), "at most 5"),
        (Bounds(least=0, most=100), "0 to 100"),
        (Bounds(least=0, most=2**32 - 1), "0 to 4,294,967,295"),
        (Bounds(least=0, below=1), "at least 0 and below 1"),
        (Bounds(above=0, most=1), "above 0 and at most 1"),
        (Bounds(above=0), "above 0"),
    ],
)
def test_what_help_says_of_a_number(bounds, told):
    assert bounds.told() == told
