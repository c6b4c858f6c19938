"""The door of every verb: what is wrong with a path is one sentence with its argument, before anything is loaded.

Every path argument of every verb is walked through every fault of a path. One that is new and has no place in the table
fails a test.
"""

import hashlib
import importlib
import json
import os
import re
import sys
import types
import typing
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from faulty import FAULTS
from warm_python import ROOT, WarmPython

from hf_eagle.cli import VERBS
from hf_eagle.door.sentences import is_sentence
from hf_eagle.training.run_arguments import RunArguments


sys.path.insert(0, str(ROOT / "scripts"))

SCRIPTS = {**VERBS, "quickstart": "quickstart.py", "fetch_assets": "fetch_assets.py"}
DRAFT_CONFIG = {"architectures": ["LlamaForCausalLMEagle3"]}

# the faults of each kind of path: what is named instead
FAULTS_OF = {
    "file": ("missing", "folder for file", "unreadable"),
    "folder": ("missing", "file for folder", "unreadable"),
    "model": ("missing", "file for folder", "unreadable"),
    "data": ("missing", "unreadable"),
    "store": ("missing", "file for folder", "unreadable"),
    "checkpoint": ("missing", "file for folder", "unreadable", "another folder", "cut"),
    "output": ("missing", "folder for file", "file for folder", "unreadable", "an input", "a link", "full"),
    "output folder": ("file for folder", "unreadable", "an input", "a link", "full"),
    "folder to fill": ("file for folder", "unreadable", "full"),
}
WRITTEN = ("output", "output folder", "folder to fill")
# arguments of text that name nothing on this machine
TEXTS = {
    *("base_model", "chat_template_kwargs", "commit_message", "data_licenses", "device", "license", "server_model"),
    *("lora_modules_to_save", "lora_target_modules", "method", "repo_id", "revision", "server_url", "target_revision"),
    *("attn_implementation", "dtype", "engine_args", "form", "include", "system_prompts", "token", "train_options"),
    *("batch_sizes", "draft_rope_scaling", "num_speculative_tokens", "sweep_tokens"),
    *("behind", "context_buckets", "only", "windows", "activation_checkpointing_kwargs"),
    *("target_url", "host"),
    "launch_config",  # of a dry run, which writes nothing and reads nothing else
    "gguf_file",  # a name within `target`, which is looked at with it
}
RECIPE = {"target": "target", "train_data": "chats.jsonl", "eval_data": "more.jsonl", "tools": "tools.json"}
RECIPE |= {"media_root": "pictures", "features_folder": "features"}
RECIPE_KINDS = {"target": "model", "train_data": "data", "eval_data": "data", "tools": "file", "media_root": "folder"}
RECIPE_KINDS |= {"features_folder": "folder"}
SERVED = ["--target_url", "http://localhost:8000"]


@dataclass
class Verb:
    """A command that passes its door, and the kinds of its path arguments."""

    given: dict[str, str]
    kinds: dict[str, str]
    more: list[str] = field(default_factory=list)
    unused: set[str] = field(default_factory=set)  # path arguments of a recipe that this verb does not look at


WALK = {
    "train": Verb(
        {**RECIPE, "init_from": "draft", "acceptance_prompts": "prompts.jsonl", "feature_store": "store"}
        | {"output_dir": "out/run", "resume_from_checkpoint": "checkpoint-1"},
        {**RECIPE_KINDS, "init_from": "model", "acceptance_prompts": "file", "feature_store": "store"}
        | {"output_dir": "output folder", "resume_from_checkpoint": "checkpoint"},
        SERVED,
    ),
    "cache": Verb(
        {**RECIPE, "feature_store": "out/store", "output_dir": "out/run"},
        {**RECIPE_KINDS, "feature_store": "output folder"},
        SERVED,
        unused={"resume_from_checkpoint", "output_dir", "init_from", "acceptance_prompts"},
    ),
    "serve-features": Verb(
        {"target": "target", "train_data": "chats.jsonl", "folder": "out/features", "serving_python": "python"},
        {"target": "model", "folder": "folder to fill", "serving_python": "file"},
        # the data, and what training reads, may lie elsewhere
        unused={"train_data", "eval_data", "tools", "media_root", "features_folder", "feature_store", "init_from"}
        | {"acceptance_prompts", "output_dir", "resume_from_checkpoint"},
    ),
    "preview": Verb(
        {**RECIPE, "overlap_prompts": "prompts.jsonl", "html": "out/a.html", "output_json": "out/a.json"},
        {**RECIPE_KINDS, "overlap_prompts": "file", "html": "output", "output_json": "output"},
        SERVED,
        unused={"resume_from_checkpoint", "output_dir", "feature_store", "init_from", "acceptance_prompts"},
    ),
    "evaluate": Verb(
        {
            **{"target": "target", "draft": "draft", "prompts": "prompts.jsonl", "tools": "tools.json"},
            **{"output_json": "out/a.json", "output_tokens": "out/tokens.json", "media_root": "pictures"},
        },
        {
            **{"target": "model", "draft": "model", "prompts": "file", "tools": "file"},
            **{"output_json": "output", "output_tokens": "output", "media_root": "folder"},
        },
    ),
    "regenerate": Verb(
        {"target": "target", "data": "chats.jsonl", "held_out": "prompts.jsonl", "output": "out/a.jsonl"}
        | {"tools": "tools.json", "media_root": "pictures"},
        {"target": "model", "data": "data", "held_out": "file", "output": "output", "tools": "file"}
        | {"media_root": "folder"},
    ),
    "write-prompts": Verb(
        {"target": "target", "output": "out/a.jsonl", "tools": "tools.json"},
        {"target": "model", "output": "output", "tools": "file"},
        ["--server_url", "http://localhost:8000"],
        unused={"questions", "texts"},  # only with `behind`
    ),
    "targets": Verb({"target": "target"}, {"target": "model"}),
    "check": Verb(
        {"draft": "draft", "target": "target", "fix": "out/mended"},
        {"draft": "folder", "target": "model", "fix": "output folder"},
    ),
    "diagnose": Verb(
        {
            **{"draft": "draft", "target": "target", "prompts": "prompts.jsonl", "data": "chats.jsonl"},
            **{"trained_target": "target", "tools": "tools.json"},
            **{"output_json": "out/a.json", "repaired": "out/repaired"},
        },
        {
            **{"draft": "model", "target": "model", "prompts": "file", "data": "data", "trained_target": "model"},
            **{"tools": "file", "output_json": "output", "repaired": "output folder"},
        },
    ),
    "prune": Verb(
        {"draft": "draft", "target": "target", "counts_from": "chats.jsonl", "output_dir": "out/pruned"}
        | {"tools": "tools.json"},
        {"draft": "model", "target": "model", "counts_from": "data", "output_dir": "output folder", "tools": "file"},
        ["--draft_vocab_size", "16"],
        unused={"token_ids"},  # instead of `counts_from`: see below
    ),
    "import": Verb(
        {"draft": "draft", "target": "target", "output_dir": "out/imported"},
        {"draft": "model", "target": "model", "output_dir": "output folder"},
    ),
    "publish": Verb(
        {"draft": "draft", "target": "target"}, {"draft": "folder", "target": "model"}, ["--repo_id", "me/tiny"]
    ),
    "compare": Verb({"runs": "run", "output_png": "out/a.png"}, {"runs": "folder", "output_png": "output"}),
    "ablate": Verb(
        {"recipe": "recipe.yaml", "variants": "variants.yaml", "prompts": "prompts.jsonl", "output_dir": "out/ablated"},
        {"recipe": "file", "variants": "file", "prompts": "file", "output_dir": "output folder"},
    ),
    "benchmark": Verb(
        {"target": "target", "data": "chats.jsonl", "store_dir": "out/stores", "output_json": "out/a.json"},
        {"target": "model", "data": "data", "store_dir": "folder to fill", "output_json": "output"},
        ["--compare", "live"],
    ),
    "benchmark-serving": Verb(
        {"target": "target", "draft": "draft", "prompts": "prompts.jsonl", "output_json": "out/a.json"}
        | {"tools": "tools.json", "serving_python": "python"},
        {"target": "model", "draft": "model", "prompts": "file", "output_json": "output", "tools": "file"}
        | {"serving_python": "file"},
    ),
    "quickstart": Verb(
        {"output_dir": "out/quick", "assets_dir": "assets", "train_config": "recipe.yaml"},
        {"output_dir": "output folder", "assets_dir": "folder to fill", "train_config": "file"},
    ),
    "fetch_assets": Verb({"output_dir": "assets"}, {"output_dir": "folder to fill"}),
}
CASES = [
    (verb, name, fault)
    for verb, told in WALK.items()
    for name, kind in told.kinds.items()
    for fault in (*FAULTS_OF[kind], "empty")
]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """What the commands of the table name; nothing in it is changed by any test."""
    house = tmp_path_factory.mktemp("doors")
    chats = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    state = {"global_step": 1, "log_history": [{"step": 1, "loss": 1.0}]}
    manifest = json.dumps({"files": {"optimizer.pt": 1, "scheduler.pt": 1}, "rows_per_step": 4})
    texts = {
        **{"target/config.json": json.dumps({"model_type": "llama"}), "target/model.safetensors": "weights"},
        **{"draft/config.json": json.dumps(DRAFT_CONFIG), "draft/model.safetensors": "weights"},
        **{"chats.jsonl": chats, "more.jsonl": chats, "prompts.jsonl": '{"prompt": "a"}\n', "a file": "mine"},
        **{"tools.json": json.dumps(tools), "run/trainer_state.json": json.dumps(state), "python": "#!"},
        **{"recipe.yaml": "target: t\ntrain_data: [c]\noutput_dir: o\n", "variants.yaml": "recipe: {}\n"},
        **{"store/store.json": json.dumps({"format": 2}), "out/README": "", "assets/README": "", "pictures/README": ""},
        **{"features/README": ""},
        **{"a folder/README": "", "locked/config.json": json.dumps(DRAFT_CONFIG), "locked.jsonl": chats},
        **{"locked store/store.json": "{}", "locked folder/README": ""},
    }
    for folder in ("checkpoint-1", "locked checkpoint", "cut checkpoint"):
        texts |= {f"{folder}/checkpoint_manifest.json": manifest, f"{folder}/trainer_state.json": json.dumps(state)}
        texts |= {f"{folder}/optimizer.pt": "o", f"{folder}/scheduler.pt": "" if folder.startswith("cut") else "s"}
    for name, text in texts.items():
        (house / name).parent.mkdir(exist_ok=True)
        (house / name).write_text(text)
    locked = ["locked/config.json", "locked.jsonl", "locked store/store.json", "locked folder"]
    locked.append("locked checkpoint/checkpoint_manifest.json")
    for name in ("a link to nothing", *locked):
        if name in locked:
            (house / name).chmod(0)
        else:
            (house / name).symlink_to(house / "nothing")
    yield house
    for name in locked:
        (house / name).chmod(0o700)


def digests(house):
    found = {}
    for path in sorted(house.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found[str(path.relative_to(house))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_symlink():
            found[str(path.relative_to(house))] = os.readlink(path)
        else:
            found[str(path.relative_to(house))] = "a folder"
    return found


def place_with(fault: str, kind: str, told: Verb, house: Path, links: Path) -> Path | str:
    """What is named instead of a path, for it to have this fault."""
    if fault == "empty":
        return ""
    if kind not in WRITTEN:
        locked = {"model": "locked", "folder": "locked folder", "store": "locked store"}
        locked = (locked | {"checkpoint": "locked checkpoint"}).get(kind, "locked.jsonl")
        places = {"missing": "nothing.jsonl", "folder for file": "a folder", "file for folder": "a file"}
        places |= {"another folder": "draft", "cut": "cut checkpoint"}
        return house / (places | {"unreadable": locked})[fault]
    if fault in ("an input", "a link"):
        read = an_input(kind, told, house)
        if fault == "an input":
            return read
        (links / "link").unlink(missing_ok=True)
        (links / "link").symlink_to(read)
        return links / "link"
    places = {"missing": "no/such/place.png", "folder for file": "a folder", "unreadable": "locked folder/place.png"}
    places |= {"file for folder": "a file/a.png" if kind == "output" else "a file", "full": "out/full.png"}
    return house / places[fault]


def an_input(kind: str, told: Verb, house: Path) -> Path:
    """What the command reads, a file or a folder as its output is one, if it reads such a thing."""
    read = [
        house / path for name, path in told.given.items() if told.kinds.get(name) not in ("output", "output folder")
    ]
    return next((path for path in read if path.is_dir() == (kind != "output")), read[0])


def command(told: Verb, house: Path, **changed) -> list[str]:
    paths = {name: house / path for name, path in told.given.items()} | changed
    return [*told.more, *(word for name, path in paths.items() for word in (f"--{name}", str(path)))]


def script_of(verb: str) -> types.ModuleType:
    return importlib.import_module(SCRIPTS[verb].removesuffix(".py"))


def test_every_verb_is_walked():
    assert WALK.keys() == SCRIPTS.keys()


@pytest.mark.parametrize("verb", WALK)
def test_every_argument_of_text_is_a_path_in_the_table_or_no_path(verb):
    """So that a new argument that names a file is looked at too."""
    from transformers import TrainingArguments

    script, told = script_of(verb), WALK[verb]
    groups = getattr(script, "parser", RunArguments.parser)().dataclass_types
    library = set(TrainingArguments.__dataclass_fields__) - {"output_dir", "resume_from_checkpoint"}
    for group in groups:
        hints = typing.get_type_hints(group)
        for name in group.__dataclass_fields__.keys() - library:
            if str in (hints[name], *parts_of(hints[name])):
                assert name in told.kinds.keys() | told.unused | TEXTS, f"{verb}: which kind of path is `{name}`?"
    assert not told.unused & told.kinds.keys()


def parts_of(hint) -> list:
    """The types in a union or a list; a `Literal` names no file."""
    if typing.get_origin(hint) is typing.Literal:
        return []
    return [inner for part in typing.get_args(hint) for inner in (part, *parts_of(part))]


@pytest.mark.parametrize("verb", WALK)
def test_a_sound_command_passes_and_leaves_nothing(verb, house, monkeypatch):
    monkeypatch.chdir(house)
    before = digests(house)
    assert script_of(verb).door(command(WALK[verb], house))
    assert digests(house) == before


@pytest.mark.parametrize("verb", WALK)
def test_a_path_at_fault_is_one_sentence_with_its_argument(verb, house, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(house)
    before, told = digests(house), WALK[verb]
    for name, fault in [(name, fault) for of, name, fault in CASES if of == verb]:
        place = place_with(fault, told.kinds[name], told, house, tmp_path)
        said = refused(script_of(verb), command(told, house, **{name: place}), fault, capsys)
        assert names(said, name, fault, told) and "\n" not in said.strip(), (name, fault, said)
        assert digests(house) == before, (name, fault)


def names(said: str, name: str, fault: str, told: Verb) -> bool:
    """Whether a sentence names the argument; a disk that is full is so for all outputs, and the first is told of."""
    also = [other for other, kind in told.kinds.items() if fault == "full" and kind in WRITTEN]
    return any(f"`{argument}`" in said for argument in (name, *also))


def refused(script, argv: list[str], fault: str, capsys) -> str:
    """What a door says of a command."""
    try:
        with FAULTS.get(fault, nullcontext)():
            script.door(argv)
    except SystemExit as end:
        assert end.code == 2
        return capsys.readouterr().err
    except (OSError, ValueError) as problem:
        assert is_sentence(problem) and str(problem).endswith("."), problem
        return str(problem)
    raise AssertionError(f"{script.__name__} takes {argv} with the fault {fault}")


@cache
def python() -> WarmPython:
    """With no more than a door imports, which makes each of its many processes cheap."""
    modules = ("hf_eagle.training.run_arguments", "hf_eagle.arguments.training", "hf_eagle.store.feature_store")
    return WarmPython(modules=modules, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("verb", WALK)
def test_a_process_says_so_too(verb, house, tmp_path):
    """One for each kind of fault."""
    before, told = digests(house), WALK[verb]
    for fault in dict.fromkeys(fault for of, _, fault in CASES if of == verb):
        name = next(name for of, name, other in CASES if (of, other) == (verb, fault))
        place = place_with(fault, told.kinds[name], told, house, tmp_path)
        script = ROOT / "scripts" / SCRIPTS[verb]
        argv = command(told, house, **{name: place})
        done = python().run(ROOT / "tests" / "faulty.py", fault, script, *argv, cwd=house)
        assert done.returncode in (1, 2) and not done.stdout, (fault, done)
        assert names(done.stderr, name, fault, told) and len(done.stderr.splitlines()) == 1, (fault, done.stderr)
        assert " failed in " not in done.stderr
        assert digests(house) == before, (name, fault)


def test_no_verb_writes_but_through_the_door():
    """So that a full disk is told with the argument, and leaves no half of a file."""
    own = {"ablate.py": 1, "fetch_assets.py": 1}  # a log that is written while it is read; a file in a temporary folder
    for name in SCRIPTS.values():
        text = (ROOT / "scripts" / name).read_text()
        writes = re.findall(
            r"\.write_text\(|\.write_bytes\(|open\(.*['\"][wa]b?['\"]|save_pretrained\((?!folder\))", text
        )
        assert len(writes) == own.get(name, 0), (name, writes)
