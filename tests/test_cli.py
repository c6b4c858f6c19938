"""`hf-eagle`: verbs, recipes by name, what it says to a wrong word, and completion in bash."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_eagle import cli
from hf_eagle.docs import PAGES
from hf_eagle.shipped import find_config, recipe_names


ROOT = Path(__file__).resolve().parents[1]


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["hf-eagle", *arguments])
    cli.main()


def test_every_script_has_a_verb():
    """But those which are for a clone of the repository alone, or measure hf_eagle itself."""
    own = {"__init__.py", "quickstart.py", "fetch_assets.py"}
    missing = {path.name for path in (ROOT / "scripts").glob("*.py")} - own - set(cli.VERBS.values())
    assert not {name for name in missing if not name.startswith("benchmark_")}
    main_verbs = {"train", "evaluate", "regenerate", "cache", "check", "prune", "import", "publish"}
    more = {"write-prompts", "preview", "compare", "ablate", "benchmark", "benchmark-serving", "targets", "diagnose"}
    more |= {"serve-features"}
    assert cli.scripts().keys() == main_verbs | more


def test_help_lists_the_verbs_and_loads_no_torch():
    code = "import sys; from hf_eagle import cli; print(cli.usage()); assert not {'torch', 'yaml'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "\n  prune              Prune the vocabulary of a trained draft" in done.stdout
        and recipe_names()[0] in done.stdout
    )


def test_a_wrong_verb_is_told_the_nearest(monkeypatch, capsys):
    for verb, said in (("trian", "did you mean train?"), ("xyz", "verbs are train, evaluate")):
        with pytest.raises(SystemExit) as end:
            call(monkeypatch, verb)
        assert end.value.code == 2 and f"unknown verb {verb}, {said}" in capsys.readouterr().err


def test_a_wrong_argument_is_told_the_nearest_although_others_are_missing():
    start = [sys.executable, "-m", "hf_eagle", "check"]
    done = subprocess.run([*start, "--traget", "x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "hf-eagle check: error: unknown argument --traget, did you mean --target?" in done.stderr


def test_docs_shows_pages_and_lists_them(monkeypatch, capsys):
    call(monkeypatch, "docs")
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()[2:]] == PAGES

    for name in ("add_a_draft", "add-a-draft", "add_a_draft.md"):
        call(monkeypatch, "docs", name)
        assert capsys.readouterr().out.startswith("# Add a kind of draft\n")

    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "docs", "dtaa")
    assert end.value.code == 1 and "`docs` has no page dtaa: did you mean data?" in capsys.readouterr().err

    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "docs", "data", "training")
    said = "`docs` shows one page at a time, got data, training: name one of them."
    assert end.value.code == 1 and said in capsys.readouterr().err


def test_every_page_is_listed():
    assert sorted(PAGES) == sorted(path.stem for path in (ROOT / "hf_eagle" / "docs").glob("*.md"))


def test_every_verb_stands_apart_from_its_text():
    for line in cli.usage().splitlines():
        if line.startswith("  "):
            verb, text = line[2:].split("  ", 1)
            assert verb in [*cli.VERBS, "docs"] and text.strip()


def test_recipes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "smollm2-135m-eagle3" in recipe_names()
    for name in ("smollm2-135m-eagle3", "smollm2-135m-eagle3.yaml"):
        assert find_config(name) == ROOT / "training_args" / "smollm2-135m-eagle3.yaml"
    (tmp_path / "smollm2-135m-eagle3").write_text("mine: 1")  # a file of one's own comes first
    assert find_config("smollm2-135m-eagle3") == Path("smollm2-135m-eagle3")
    assert find_config("some/where.yaml") == Path("some/where.yaml")  # whoever reads it says that it is not there
    with pytest.raises(ValueError, match="neither a file nor a recipe: did you mean smollm2-135m-eagle1?"):
        find_config("smollm2-135m-eagle2.yaml")


def test_a_name_that_is_too_long_for_a_file_is_no_recipe():
    with pytest.raises(ValueError, match="`--config` aaa.* is neither a file nor a recipe"):
        find_config("a" * 20_000)


def test_bash_completes_verbs_and_recipes(monkeypatch, capsys):
    call(monkeypatch, "completion")
    script = capsys.readouterr().out

    def complete(*words, word=""):
        asked = f"""COMP_WORDS=({" ".join(words)} '{word}'); COMP_CWORD={len(words)}; _hf_eagle"""
        lines = "\n".join([script, asked, 'echo "${COMPREPLY[*]}"'])
        done = subprocess.run(["bash", "-c", lines], cwd=ROOT, capture_output=True, text=True)
        assert not done.stderr
        return done.stdout.split()

    assert complete("hf-eagle") == [*cli.scripts(), "docs"]
    assert complete("hf-eagle", "docs") == PAGES
    assert complete("hf-eagle", "train", "--config") == recipe_names()
    # arguments are asked of the command itself
    script += f'hf-eagle() {{ {sys.executable} -m hf_eagle "$@"; }}'
    assert {"--draft", "--repo_id", "--dry_run", "--config"} <= set(complete("hf-eagle", "publish", word="--"))


def test_version(monkeypatch, capsys):
    from hf_eagle import __version__

    call(monkeypatch, "--version")
    assert capsys.readouterr().out == f"hf_eagle {__version__}\n"
