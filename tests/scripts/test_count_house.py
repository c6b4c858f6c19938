"""The walls between the rooms: each is found broken in a small made-up tree, and this repository breaks none."""

import subprocess
import sys

import pytest
from forks import ROOT


SCRIPT = ROOT / "scripts" / "dev" / "count_house.py"

# a house in which nothing is wrong, though every rule has something to look at
CLEAN = {
    "hf_eagle/__init__.py": '_PUBLIC = {"Eagle3Draft": "drafts.eagle3.modeling", "train": "training.trainer"}\n',
    "hf_eagle/cli.py": "def main():\n    from .training import trainer\n",
    "hf_eagle/shipped.py": "",
    "hf_eagle/data/records.py": "from ..shipped import shipped\n",
    "hf_eagle/targets/target.py": "from ..data import records\n",
    "hf_eagle/drafts/kinds.py": 'KINDS = {"eagle1": {"head": "target"}, "eagle3": {}}\n',
    "hf_eagle/drafts/base.py": "class DraftModel:\n    pass\n",
    "hf_eagle/drafts/eagle3/__init__.py": "",
    "hf_eagle/drafts/eagle3/modeling.py": (
        "class Eagle3Draft:\n    def own(self, kind):\n        return kind == 'eagle3' or hasattr(self.draft, 'd2t')\n"
    ),
    "hf_eagle/serving/rules_vllm.py": "from .kinds import KINDS\n",
    "hf_eagle/serving/kinds.py": 'KINDS = {"eagle1": 1, "eagle3": 2}\n',
    "hf_eagle/serving/probe.py": "from ..drafts.base import DraftModel\n",
    "hf_eagle/training/trainer.py": "from ..drafts.eagle3 import modeling\nfrom ..serving import probe\n",
    "scripts/train.py": (
        "from hf_eagle.training.trainer import x\n"
        "def main(draft, method, model_type, target):\n"
        "    if method == 'tree' or model_type != 'llama' or isinstance(draft, DraftModel):\n"
        "        return getattr(draft, method), getattr(target.config, 'head_dim', None)\n"
    ),
}


def check(tmp_path, *options: str, **files: str):
    """Code and output of `--check` over the clean house with further lines, by path with `__` for `/`."""
    for path, text in {**CLEAN, **{f"{name.replace('__', '/')}.py": text for name, text in files.items()}}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    command = [sys.executable, str(SCRIPT), "--root", str(tmp_path), *(options or ("--check",))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def test_a_clean_house_passes_in_silence(tmp_path):
    assert check(tmp_path) == (0, "")


@pytest.mark.parametrize(
    "line",
    [
        "from ..training.trainer import x",
        "from ..training import trainer",
        "import hf_eagle.training.trainer",
        "from hf_eagle import train",
        "    from .. import training",
        "if TYPE_CHECKING: from ..training import trainer",
        "trainer = import_module('..training.trainer', __package__)",
    ],
)
def test_an_upward_import_is_found_however_it_is_written(tmp_path, line):
    text = f"\ndef late():\n{line}\n" if line.startswith(" ") else f"\n\n{line}\n"
    code, printed = check(tmp_path, hf_eagle__data__late=text)
    assert code == 1
    assert "upward imports: 1, at most 0\n  hf_eagle/data/late.py:3: data/ imports training/" in printed


@pytest.mark.parametrize(
    "files, found",
    [
        ({"hf_eagle__cli": "from .data import records\n"}, "hf_eagle/cli.py:1: the hall imports data/"),
        ({"hf_eagle__data__x": "from ..cli import main\n"}, "hf_eagle/data/x.py:1: data/ imports hf_eagle.cli"),
        ({"hf_eagle__data__x": "import scripts.train\n"}, "hf_eagle/data/x.py:1: the package imports scripts/"),
        ({"hf_eagle__attic__x": ""}, "hf_eagle/attic/: this room has no place"),
    ],
)
def test_the_hall_and_strangers(tmp_path, files, found):
    code, printed = check(tmp_path, **files)
    assert code == 1 and found in printed


def test_a_circle_is_found_with_the_imports_it_is_made_of(tmp_path):
    code, printed = check(tmp_path, hf_eagle__data__x="\nfrom ..targets import target\n")
    assert code == 1
    circle = "data -> targets (hf_eagle/data/x.py:2); targets -> data (hf_eagle/targets/target.py:1)"
    assert f"circles of rooms: 1, at most 0\n  data, targets: {circle}" in printed


@pytest.mark.parametrize(
    "files, way",
    [
        (
            {"hf_eagle__serving__rules_vllm": "\nfrom ..drafts import base\n"},
            "rules_vllm.py:2: comes to hf_eagle.drafts.base",
        ),
        (
            {"hf_eagle__serving__served_math": "def late():\n    from .probe import DraftModel\n"},
            "served_math.py:2: comes to hf_eagle.drafts.base by "
            "hf_eagle/serving/served_math.py:2 -> hf_eagle/serving/probe.py:1",
        ),
        (
            {"hf_eagle__serving__kinds__eagle3": "from ...drafts import kinds\n"},
            "kinds/eagle3.py:1: comes to hf_eagle.drafts.kinds",
        ),
    ],
)
def test_what_servers_do_is_restated_without_drafts(tmp_path, files, way):
    code, printed = check(tmp_path, **files)
    assert code == 1
    assert f"serving's rules that come to drafts/: 1, at most 0\n  hf_eagle/serving/{way}" in printed


def test_loose_files_are_counted(tmp_path):
    assert check(tmp_path, **{f"hf_eagle__helper{i}": "" for i in range(3)})[0] == 0
    code, printed = check(tmp_path, hf_eagle__helper3="")
    assert code == 1 and "loose files under hf_eagle/: 7, at most 6" in printed


BRANCHES = [
    ("a", "if method == 'eagle1': pass"),
    ("a", "x = 1 if 'LlamaForCausalLMEagle3' in names else 2"),
    ("a", "if draft.method in ('eagle1', 'eagle2'): pass"),
    ("a", "if method in FEATURES: pass"),
    ("a", "if args.draft_method != other: pass"),
    ("a", "if name.endswith('LlamaForCausalLMEagle'): pass"),
    ("a", "if type(draft) is Eagle3Draft: pass"),
    ("b", "    case 'eagle1' | 'eagle2': pass"),
    ("b", "    case Eagle3Draft(): pass"),
    ("c", "if isinstance(draft, (int, Eagle3Draft)): pass"),
    ("d", "if hasattr(draft, 'lm_head'): pass"),
    ("d", "x = getattr(model.draft.config, 'tap_width', None)"),
    ("e", "x = {'eagle1': 1}.get(method, 2)"),
    ("f", "x = 1 if form.eagle1 else 2"),
    ("f", "x = [y for y in z if not y.is_eagle3]"),
]


@pytest.mark.parametrize("rule, line", BRANCHES)
def test_a_branch_on_the_kind_is_found_by_its_rule(tmp_path, rule, line):
    text = f"FEATURES = ('eagle1', 'eagle2')\nmatch {'draft' if rule == 'b' else '0'}:\n"
    text += f"{line}\n" if rule == "b" else f"    case _: pass\n{line}\n"
    code, printed = check(tmp_path, "--list", hf_eagle__training__x=text)
    number = text[: text.index(line)].count("\n") + 1
    found = f"hf_eagle/training/x.py:{number}: ({rule}) {line.strip()}"
    assert code == 0 and f"branches on the kind of draft: 1, at most 15\n  {found}\n" in printed


@pytest.mark.parametrize("row", ['{"fresh": {}}', '[Kind(name="fresh")]', '[Kind(methods={"fresh": "chain"})]'])
def test_names_of_a_new_kind_come_from_the_table_of_kinds(tmp_path, row):
    files = {"hf_eagle__drafts__kinds": f"KINDS = {row}\n", "hf_eagle__training__x": "x = 1 if a == 'fresh' else 2\n"}
    assert "(a) x = 1 if a == 'fresh' else 2" in check(tmp_path, "--list", **files)[1]


def test_too_many_branches_break_a_wall(tmp_path):
    lines = [line for rule, line in BRANCHES if rule == "a"] * 3
    code, printed = check(tmp_path, scripts__x="FEATURES = ('eagle1',)\n" + "\n".join(lines[:16]))
    assert code == 1 and "branches on the kind of draft: 16, at most 15\n  scripts/x.py:2: (a)" in printed


def test_a_capability_is_counted_apart(tmp_path):
    text = (
        "x = draft.config.mrope_section is None\ny = config.image_embeddings == 'vision'\nz = target.tap_ids is None\n"
    )
    code, printed = check(tmp_path, "--list", hf_eagle__training__x=text)
    places = "\n  hf_eagle/training/x.py:1: (-) x = draft.config.mrope_section is None\n  hf_eagle/training/x.py:2:"
    assert f"tests of a capability: 2{places}" in printed and "branches on the kind of draft: " not in printed


def test_style_is_measured(tmp_path):
    """Of two long functions one has air; blank lines in a docstring are none."""
    lines = "\n".join(f"    x{i} = {i}" for i in range(20))
    airy = f"def f():\n{lines}\n\n    # why\n    return 1\n"
    dense = f'def f():\n    """Says\n\n    much."""\n{lines}\n'
    code, printed = check(tmp_path, "--root", str(tmp_path), hf_eagle__data__airy=airy, hf_eagle__data__dense=dense)
    rows = {line[:52].strip(): line[52:].split() for line in printed.splitlines()}
    dense = rows["bodies >= 20 lines without blank line or comment, %"]
    assert dense == ["53", "50", "at", "most", "10", "<-", "beyond"]
    assert rows["function lines, median / p90 / max"][-1] == "24"


def test_this_repository_holds_its_walls():
    """The gate: what `make lint` runs."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_batch_is_followed_from_its_collator_to_its_loss():
    done = subprocess.run([sys.executable, str(SCRIPT), "--batch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    way = done.stdout.partition("hops of a batch:")[2].splitlines()[1:]
    assert "collat" in way[0].lower() and any("drafts/eagle3/modeling.py: " in hop for hop in way)
    assert any("losses/" in hop for hop in way)


def test_a_docstring_that_cites_what_is_not_there_is_found(tmp_path):
    (tmp_path / "hf_eagle" / "docs").mkdir(parents=True)
    (tmp_path / "hf_eagle" / "docs" / "contract.md").write_text("# C\n\n## 1. Taps\n\n## 2. Loss\n")
    held = '"""As contract sections 1 and 2, and `docs/contract.md`, say."""\n'
    assert "docstrings that cite" not in check(tmp_path, hf_eagle__data__held=held)[1]
    wrong = '"""Contract section 4."""\n\n\ndef f():\n    """See docs/none.md."""\n\n\n'
    wrong += 'def g():\n    """As the contract says."""\n'
    code, printed = check(tmp_path, hf_eagle__data__wrong=wrong)
    assert code == 1 and "docstrings that cite what is not there: 3, at most 0" in printed
    assert "hf_eagle/data/wrong.py:1: section 4 of the contract" in printed
    assert "hf_eagle/data/wrong.py:4: none.md" in printed


def test_a_long_readme_and_few_pages_are_found(tmp_path):
    (tmp_path / "README.md").write_text("x" * 9_001)
    (tmp_path / "hf_eagle" / "docs").mkdir(parents=True)
    (tmp_path / "hf_eagle" / "docs" / "data.md").write_text("# Data\n")
    code, printed = check(tmp_path)
    assert code == 1 and "README, bytes: 9,001, at most 9,000" in printed
    assert "pages of docs: 1, at least 10\n  hf_eagle/docs/data.md" in printed
