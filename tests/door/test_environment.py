"""Known traps of the environment, told from made-up metadata."""

import ast
import importlib.metadata
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from hf_eagle.door.environment import how_to_install, tell_traps, traps
from hf_eagle.door.printer import told as told_of


def install(folder, packages):
    """Metadata of packages, as pip writes them; `name==version`, and what each requires."""
    for package, needed in packages.items():
        name, version = package.split("==")
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in needed), ""]))


@pytest.fixture
def told(tmp_path, monkeypatch):
    """What is told of an environment that holds these packages and nothing else."""

    def told(packages):
        install(tmp_path, packages)
        found = {dist.metadata["Name"]: dist for dist in importlib.metadata.distributions(path=[str(tmp_path)])}

        def distribution(name):
            if name not in found:
                raise importlib.metadata.PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(importlib.metadata, "distribution", distribution)
        return list(traps())

    return told


CUDNN = "torch 2.9.1+cu128 runs Conv3d without cuDNN where that is older than 9.15"


@pytest.mark.parametrize(
    ("packages", "wanted"),
    [
        ({}, []),
        ({"torch==2.13.0+cpu": []}, []),
        ({"torch==2.9.1+cu128": [], "nvidia-cudnn-cu12==9.10.2.21": []}, [CUDNN]),
        ({"torch==2.9.1+cu130": [], "nvidia-cudnn-cu13==9.13.0.50": []}, ["pip install 'nvidia-cudnn-cu13>=9.15'"]),
        ({"torch==2.9.1+cu128": [], "nvidia-cudnn-cu12==9.16.0.29": []}, []),
        ({"torch==2.9.0+cu128": [], "nvidia-cudnn-cu12==9.16.0.29": []}, ["torch 2.9.0+cu128 runs Conv3d without"]),
        ({"torch==2.9.1+cpu": []}, []),
        ({"torch==2.10.0": [], "nvidia-cudnn-cu12==9.10.2.21": []}, []),
        ({"torch==2.13.0+cpu": [], "torchvision==0.28.0+cpu": ["numpy", "torch (==2.13.0)"]}, []),
        ({"torch==2.13.0+cu130": [], "torchvision==0.28.0": ["torch==2.13.0"]}, []),
        (
            {"torch==2.13.0+cpu": [], "torchvision==0.28.0": ["torch==2.13.0"]},
            ["torchvision 0.28.0 is PyPI's build, for torch with CUDA, and torch 2.13.0+cpu is installed"],
        ),
        ({"torch==2.13.1": [], "torchvision==0.28.0": ["torch==2.13.0"]}, []),  # of the same generation
        (
            {"torch==2.13.0": [], "torchvision==0.24.0": ["torch==2.9.0", "gdown; extra == 'x'"]},
            ["torchvision 0.24.0 was built for torch 2.9.0, and torch 2.13.0 is installed"],
        ),
        ({"torch==2.13.0": [], "torchvision==0.28.0": []}, []),
        ({"torch==2.9.0": [], "torchcodec==0.9.1": []}, []),
        (
            {"torch==2.10.0": [], "torchcodec==0.9.1": []},
            ["torchcodec 0.9.1 was built for torch 2.9, and"],
        ),
        ({"torch==2.9.1": [], "torchcodec==0.10.0+cpu": []}, ["torchcodec 0.10.0+cpu was built for torch 2.10"]),
        ({"torch==2.13.0": [], "torchcodec==0.99.0": []}, []),  # of which nothing is known
        ({"torch==nightly": [], "torchcodec==0.9.1": []}, []),
        ({"torchvision==0.24.0": ["torch==2.9.0"]}, []),
        (
            {
                **{"torch==2.9.1": [], "nvidia-cudnn-cu12==9.10.2.21": [], "torchcodec==0.7.0": []},
                "torchvision==0.23.0": ["torch==2.8.0"],
            },
            ["runs Conv3d", "torchvision 0.23.0", "torchcodec 0.7.0"],
        ),
    ],
)
def test_each_trap_is_told_with_what_to_do(told, packages, wanted):
    found = told(packages)
    assert len(found) == len(wanted), found
    assert all(part in sentence and "install" in sentence for part, sentence in zip(wanted, found, strict=True))


INSTALLS = {
    "2.13.0+cpu": "`pip install torchvision --index-url https://download.pytorch.org/whl/cpu`",
    "2.13.0+cu130": "`pip install torchvision --index-url https://download.pytorch.org/whl/cu130`",
    "2.13.0": "from where torch came from",
    "2.13.0+git1234": "from where torch came from",
}


@pytest.mark.parametrize("torch", INSTALLS)
def test_the_index_of_each_build(told, torch):
    told({f"torch=={torch}": []})
    assert INSTALLS[torch] in how_to_install("torchvision")


FAILURES = {
    "raise RuntimeError('operator torchvision::nms does not exist')": "operator torchvision::nms does not exist",
    "raise ImportError('libcudart.so.13: cannot open shared object file')": "libcudart.so.13: cannot open",
    "import torch_of_yesterday": "No module named 'torch_of_yesterday'",
}


@pytest.mark.parametrize("code", FAILURES)
def test_a_torchvision_that_cannot_be_imported_is_one_sentence(code, told, tmp_path, monkeypatch):
    """Which names it and the cure, however far transformers' lazy imports carried the error."""
    told({"torch==2.13.0+cpu": [], "torchvision==0.28.0": ["torch==2.13.0"]})
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    try:
        try:
            import torchvision  # noqa: F401
        except Exception as problem:
            raise ModuleNotFoundError("Could not import module 'TrainingArguments'.") from problem
    except ModuleNotFoundError as problem:
        found = told_of(problem)
    wanted = f"torchvision 0.28.0 cannot be imported next to torch 2.13.0+cpu ({FAILURES[code]}"
    assert found.startswith(wanted) and INSTALLS["2.13.0+cpu"] in found and "\n" not in found


def test_other_imports_that_fail_are_no_fault_of_torchvision(told):
    told({"torch==2.13.0+cpu": [], "torchvision==0.28.0": ["torch==2.13.0"]})
    try:
        import nothing_of_this_name  # noqa: F401
    except ModuleNotFoundError as problem:
        assert "torchvision" not in told_of(problem)


def test_they_are_warnings(told, monkeypatch, caplog):
    told({"torch==2.10.0": [], "torchcodec==0.9.1": []})
    tell_traps()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_nothing_is_imported_for_it():
    code = "import sys; from hf_eagle.door.environment import tell_traps; tell_traps(); "
    code += "print([name for name in ('torch', 'torchvision', 'torchcodec', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "script", ["train_eagle", "cache_features", "evaluate_draft", "preview_data", "regenerate_answers"]
)
def test_each_verb_that_reads_media_tells_them_behind_its_log(script):
    """Before the log is set up nobody would read them."""
    source = Path(__file__).resolve().parents[2] / "scripts" / f"{script}.py"
    main = next(x for x in ast.parse(source.read_text()).body if isinstance(x, ast.FunctionDef) and x.name == "main")
    found = [x for x in ast.walk(main) if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)]
    calls = [call.func.id for call in sorted(found, key=lambda call: call.lineno)]
    assert "tell_traps" in calls
    assert "show_log" not in calls or calls.index("show_log") < calls.index("tell_traps")
