"""What an installed hf_eagle holds, and that the checks of a change cannot be passed by skipping."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from tiny_files import write_chats, write_tiny_target


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as `python -m build` does, by way of a source distribution, with the real setuptools, offline, from a copy:
    the build must leave nothing in the repository."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("setup.cfg", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("hf_eagle", "training_args", "model_cards", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')"]
    done = subprocess.run(source, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (folder / "dist").glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--use-pep517", "--wheel-dir", str(folder / "dist"), str(archive)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources(folder: str, pattern: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)}


def test_every_module_recipe_and_card_template_is_in_the_wheel(names):
    recipes, cards = sources("training_args", "*.yaml"), sources("model_cards", "*.md")
    assert recipes and cards
    expected = sources("hf_eagle", "*.py") | {f"hf_eagle/{name}" for name in recipes | cards}
    expected |= sources("hf_eagle/docs", "*.md")
    own = sources("scripts/dev", "*.py")  # for the people of this repository
    expected |= {f"hf_eagle/commands/{name}" for name in sources("scripts", "*.py") - own}
    assert own and expected <= names, expected - names
    assert not {f"hf_eagle/commands/{name}" for name in own} & names


def test_nothing_else_is_in_the_wheel(names):
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"hf_eagle"}
    assert not [name for name in names if name.endswith((".pyc", ".safetensors", ".jsonl"))]


def test_scripts_put_no_module_of_ours_on_the_path(names):
    """Each puts the folder above its own in front of `sys.path`, where `trainer` or `data` would be anybody's."""
    beside = {name.split("/")[2] for name in names if name.startswith("hf_eagle/commands/")}
    assert beside == {"__init__.py", "scripts"}


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(info).decode())
    assert metadata["Name"] == "hf_eagle" and metadata["Requires-Python"] == ">=3.10"
    assert metadata["License"] == "Apache-2.0" or metadata["License-Expression"] == "Apache-2.0"
    requirements = metadata.get_all("Requires-Dist")
    assert "transformers<6,>=5.17" in requirements and "torch>=2.9" in requirements
    # a new dependency is a decision: this list is the one to change
    needed = {r.partition(";")[0].split("<")[0].split(">")[0].strip() for r in requirements if "extra ==" not in r}
    fixed = {"torch", "transformers", "accelerate", "peft", "datasets", "evaluate", "safetensors"}
    assert needed == fixed | {"jinja2", "matplotlib"}


def test_an_installed_copy_finds_its_templates_and_recipes(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "from importlib.resources import files\n"
        "import hf_eagle\n"
        "from hf_eagle.hub.model_card import render_model_card\n"
        "print(hf_eagle.__file__)\n"
        "assert any(f.name.endswith('.yaml') for f in files('hf_eagle.training_args').iterdir())\n"
        "print(render_model_card('.', {'name': 'X', 'target': 'org/t'}).read_text())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site")) and "# X" in done.stdout


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """`hf-eagle` in a fresh environment that has the wheel, and the dependencies of this one."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = ["install", "-qq", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    (site,) = (environment / "lib").glob("python*/site-packages")
    # of a virtual environment within another one, or within a system's, they lie in several folders
    folders = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join([sysconfig.get_path("purelib"), *folders]) + "\n")

    def run(folder, *options):
        arguments = [str(environment / "bin" / "hf-eagle"), *map(str, options)]
        done = subprocess.run(
            arguments, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_the_command_trains_by_a_recipes_name_outside_the_repository(command, tmp_path):
    write_tiny_target(tmp_path / "target")
    write_chats(tmp_path / "chats.jsonl")
    paths = ("--target", "target", "--train_data", "chats.jsonl", "--output_dir", "draft")
    small = ("--max_steps", 1, "--draft_vocab_size", 24, "--oov_rows", "renormalize", "--save_strategy", "no")
    code, printed = command(tmp_path, "train", "--config", "smollm2-135m-eagle3", *paths, *small, "--use_cpu")
    assert code == 0, printed
    code, printed = command(tmp_path, "evaluate", "--traget", "target")
    assert code == 2 and "hf-eagle evaluate: error: unknown argument --traget, did you mean --target?" in printed
    code, printed = command(tmp_path, "check", "draft", "--target", "target")
    assert code == 0 and "draft: vLLM and SGLang serve it as it was trained." in printed, printed


@pytest.mark.parametrize(
    "tests, serving, passes",
    [
        ("=== 12 passed, 1 skipped in 3.21s ===", "=== 5 passed, 3 warnings in 70.02s (0:01:10) ===", True),
        ("=== 12 passed in 3.21s ===", "=== 4 passed, 1 skipped in 70.02s (0:01:10) ===", False),
        ("=== 12 passed in 3.21s ===", "=== 5 skipped in 0.30s ===", False),
        ("=== 12 passed in 3.21s ===", "=== 3 passed, 2 deselected in 0.30s ===", False),
        ("=== 12 passed in 3.21s ===", "nothing ran", False),
        ("=== 1 failed, 11 passed in 3.21s ===", "=== 5 passed in 3s ===", False),
        ("=== 12 passed in 3.21s ===", "=== 1 failed, 4 passed in 3s ===", False),
    ],
)
def test_ci_fails_when_a_test_fails_or_a_serving_test_is_skipped(tmp_path, tests, serving, passes):
    done = run_ci(tmp_path, {"test": tests, "test-serving": serving})
    assert (done.returncode == 0) == passes, done.stdout + done.stderr
    if passes:
        closing = done.stdout.rpartition("=== done")[2]
        assert tests in closing and serving in closing


def test_ci_says_that_the_server_could_not_be_installed(tmp_path):
    says = {"install-serving": "no such package: failed", "test-serving": "=== 5 passed in 70.02s ==="}
    done = run_ci(tmp_path, says)
    assert done.returncode == 1 and "5 passed" not in done.stdout
    assert done.stderr == "no such package: failed\nthe server could not be installed\n"


def run_ci(tmp_path, says: dict[str, str]):
    """.ci/run as it is, with a `make` that says for its targets what it is told to."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    said = " ".join(f"{target}) line='{line}' ;;" for target, line in says.items())
    make = tmp_path / "make"
    make.write_text(
        f'#!/usr/bin/env bash\ncase $1 in {said} *) line=$1 ;; esac\necho "$line"\n[[ $line != *failed* ]]\n'
    )
    make.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([tmp_path / ".ci" / "run"], env=environment, capture_output=True, text=True)


def test_make_alone_lists_the_commands():
    done = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0
    for target in ("install", "assets", "quickstart", "test", "test-serving", "lint", "docs", "clean"):
        assert f"make {target} " in done.stdout
