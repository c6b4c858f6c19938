"""README and the pages of `hf_eagle/docs`: what they tell people to type exists, and is taken."""

import ast
import importlib
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

from hf_eagle.cli import VERBS
from hf_eagle.docs import PAGES, read_page
from hf_eagle.shipped import recipe_names
from hf_eagle.training.run_arguments import RunArguments


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

TEXTS = {name: read_page(name) for name in PAGES}
TEXTS |= {name: (ROOT / f"{name}.md").read_text(encoding="utf-8") for name in ("README", "CONTRIBUTING")}
SCRIPTS = {**VERBS, "quickstart": "quickstart.py", "fetch_assets": "fetch_assets.py"}
# verbs whose first word may be the value of this argument
FIRST = {**dict.fromkeys(("check", "diagnose", "prune", "import", "publish"), "draft"), "targets": "target"}
# options of other programs: servers, accelerate, pip, ruff, git, pytest
FOREIGN = {
    *("speculative-config", "speculative-algorithm", "speculative-draft-model-path", "speculative-num-steps"),
    *("speculative-eagle-topk", "speculative-num-draft-tokens", "model", "model-path", "chat-template"),
    "model-impl",
    "disable-log-stats",
    *("config_file", "nproc-per-node", "no-index", "enforce-eager"),
}


def blocks(text):
    """The lines of code blocks, indented by four or fenced, where a `\\` at an end joins two."""
    text = re.sub(r"\\\n *", " ", text)
    fenced = re.findall(r"```(?:bash|sh)?\n(.*?)```", text, flags=re.DOTALL)
    return [*re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE), *"\n".join(fenced).splitlines()]


def commands(text):
    """`(verb, arguments)` of every command of ours."""
    files = {name: verb for verb, name in SCRIPTS.items()}
    for line in blocks(text):
        if not re.search(r"hf[-_]eagle|scripts/", line):
            continue
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word in ("hf-eagle", "hf_eagle") and place + 1 < len(words) and words[place + 1] in SCRIPTS:
                yield words[place + 1], words[place + 2 :]
                break
            if word.startswith("scripts/") and Path(word).name in files:
                yield files[Path(word).name], words[place + 1 :]
                break


@cache
def parser(verb):
    script = importlib.import_module(SCRIPTS[verb].removesuffix(".py"))
    return getattr(script, "parser", RunArguments.parser)()


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_is_taken(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for verb, arguments in commands(TEXTS[name]):
        if verb == "benchmark-serving":  # whose default is there once `make test-serving` has run
            arguments = [*arguments, "--serving_python", sys.executable]
        if "..." not in arguments:
            parser(verb).parse_args_and_config(arguments, first=FIRST.get(verb))


def test_commands_are_found():
    """So that the test above looks at something."""
    found = [verb for text in TEXTS.values() for verb, _ in commands(text)]
    assert len(found) >= 25 and {"train", "regenerate", "evaluate", "check", "prune", "publish", "cache"} <= set(found)


def test_every_option_exists():
    known = {option for verb in SCRIPTS for option in parser(verb)._option_string_actions}
    # scripts of the house describe themselves
    for path in [*(ROOT / "scripts" / "dev").rglob("*.py"), *(ROOT / "tests").glob("*.py")]:
        code = path.read_text(encoding="utf-8")
        known |= set(re.findall(r'"(--\w+)"', code))
        if 'metadata={"help":' in code:  # options are fields
            known |= {f"--{name}" for name in re.findall(r"^    (\w+): [^=\n]*= field\(", code, re.M)}
    for name, text in TEXTS.items():
        told = {option for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
        assert {option for option in told - known if option[2:] not in FOREIGN} <= {"--help", "--version"}, name


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for name, text in TEXTS.items():
        code = "\n".join([*blocks(text), *re.findall(r"`([^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))])
        told = re.findall(r"^(?:[A-Z_]+=\S+ )*make((?: [A-Z_]+=\S+)*) ([a-z-]+)", code, flags=re.MULTILINE)
        assert {target for _, target in told} <= targets, name


def test_every_path_exists():
    for name, text in TEXTS.items():
        told = re.findall(r"(?:hf_eagle|scripts|tests|training_args|model_cards)/[\w./-]*\w", text)
        missing = [path for path in told if not (ROOT / path).exists() and not (ROOT / f"{path}.py").exists()]
        assert not [path for path in missing if "<" not in path and not path.endswith("_")], name


def test_the_page_of_kinds_lists_every_recipe():
    section = TEXTS["kinds"].partition("## Recipes")[2].partition("Which choice")[0]
    assert sorted(re.findall(r"`([^`/]+-(?:eagle|dflash)[^`]*)`", section)) == recipe_names()


def test_pages_name_pages_that_exist():
    for name, text in TEXTS.items():
        for told in re.findall(r"[Pp]ages? ((?:`\w+`(?:, | and )?)+)", text):
            assert set(re.findall(r"`(\w+)`", told)) <= set(PAGES), name


def test_python_in_pages_is_python():
    """README's is run, see `test_readme.py`; a page's may be a part of something."""
    for text in TEXTS.values():
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            ast.parse(block)
