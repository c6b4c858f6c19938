"""The servers' table of kinds: it leans on nothing that writes drafts, and says so of a kind that it lacks."""

import ast
import json
from dataclasses import replace
from functools import partial
from importlib.util import resolve_name
from pathlib import Path

import pytest
from safetensors.torch import save_file
from test_serving_check import run
from tiny import tiny_eagle1_pair, tiny_pair
from tiny_blocks import tiny_block_pair
from tiny_mla import tiny_mla_pair

from hf_eagle import serving
from hf_eagle.drafts.kinds import KINDS, Kind, register_kind
from hf_eagle.serving.check import check_draft, require_servable, serves
from hf_eagle.serving.commands import serve_commands, served_as
from hf_eagle.serving.draft_folder import DraftFolder, Finding
from hf_eagle.serving.kinds import SERVED, kind_of, rows_of
from hf_eagle.serving.repair import repair_draft


SERVING = Path(serving.__file__).parent
# those that run a server or hf_eagle itself; the others restate, and nothing that they restate comes from here
RUNNING = {"probe", "speed", "served_prompts"}
RESTATING = sorted(path for path in SERVING.rglob("*.py") if path.stem not in RUNNING)


@pytest.mark.parametrize("path", RESTATING, ids=lambda path: path.relative_to(SERVING).as_posix())
def test_what_restates_the_servers_leans_on_nothing_else_of_ours(path):
    package = ".".join(("hf_eagle.serving", *path.relative_to(SERVING).parent.parts))
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.add(resolve_name("." * node.level + (node.module or ""), package))
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    ours = {name for name in imported if name.split(".")[0] == "hf_eagle"}
    # how files are read and written is nothing that a server does otherwise
    assert all(name.startswith(("hf_eagle.serving", "hf_eagle.door")) for name in ours), ours


def test_there_is_something_that_restates():
    names = {path.relative_to(SERVING).as_posix() for path in RESTATING}
    assert {"rules_vllm.py", "rules_sglang.py", "served_math.py", "kinds/eagle1.py", "kinds/latent.py"} <= names


# ---- the table ----


@pytest.mark.parametrize(
    ("pair", "row", "kind"),
    [
        (tiny_eagle1_pair, "eagle1", "eagle1"),
        (tiny_pair, "eagle3", "eagle3"),
        (tiny_mla_pair, "mla", "eagle3"),
        (tiny_block_pair, "dflash", "dflash"),
        (partial(tiny_block_pair, served_form="transformers"), "dflash", "dflash"),
    ],
)
def test_a_folder_is_told_by_its_tensors_and_without_them_by_its_config(pair, row, kind, tmp_path):
    _, draft = pair()
    draft.save_pretrained(tmp_path)
    folder = DraftFolder.read(tmp_path)
    assert kind_of(folder) is SERVED[row] and SERVED[row].kind == kind == draft.kind.name
    assert kind_of(replace(folder, shapes={})) is SERVED[row]
    config = {name: value for name, value in folder.config.items() if name != "architectures"}
    assert kind_of(replace(folder, config=config)) is SERVED[row]


def test_a_folder_that_no_row_knows_is_held_to_the_rules_of_eagle3(tmp_path):
    assert kind_of(DraftFolder(tmp_path, {})) is SERVED["eagle3"]


def test_every_kind_of_the_package_is_served():
    """One that is not is a decision: take it out here."""
    assert {row.kind for row in SERVED.values()} == set(KINDS) and all(map(serves, KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_kind_are_called_alike_by_the_servers(kind):
    """A command is made from the kind alone."""
    assert len({(row.vllm.name, row.sglang.name, row.citation) for row in rows_of(kind)}) == 1


def test_one_row_is_all_that_a_kind_needs(monkeypatch, tmp_path):
    """Nothing else in serving/ knows the names in the table."""

    def rule(folder, target):
        yield Finding("vLLM", "`blocks` is missing.", "write it")

    row = replace(SERVED["eagle3"], name="block", kind="block", tells=lambda folder: "blocks.weight" in folder.shapes)
    row = replace(row, vllm=replace(row.vllm, name="block", rules=(rule,)), sglang=replace(row.sglang, name="BLOCK"))
    row = replace(row, folder_rules=(), value_rules=(), mending=(lambda draft: draft.write("blocks", 4),))
    monkeypatch.setitem(SERVED, "block", replace(row, sglang=replace(row.sglang, rules=())))
    _, draft = tiny_pair()
    draft.save_pretrained(tmp_path / "draft")
    tensors = {"blocks.weight": draft.fc.weight.detach(), "fc.weight": draft.norm.weight.detach()}
    save_file(tensors, tmp_path / "draft" / "model.safetensors")

    assert [str(found) for found in check_draft(tmp_path / "draft")] == ["vLLM: `blocks` is missing. Fix: write it."]
    assert repair_draft(tmp_path / "draft", tmp_path / "mended") == ['`blocks` is 4 now, it was "missing"']
    assert serves("block") and '"method": "block"' in serve_commands("t", "d", kind="block")["vLLM"]
    assert "--speculative-algorithm BLOCK " in serve_commands("t", "d", kind="block")["SGLang"]


# ---- a kind without a row ----


@pytest.fixture
def block_draft(monkeypatch, tmp_path):
    """The folder of a draft of a kind that is registered from outside, and that no server knows."""
    monkeypatch.setattr("hf_eagle.drafts.kinds.KINDS", dict(KINDS))
    register_kind(Kind("block", "Block", "somewhere.block", {"BlockDraft": "modeling"}, {"block": "chain"}))
    _, draft = tiny_pair()
    draft.save_pretrained(tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    (tmp_path / "draft" / "config.json").write_text(json.dumps({**config, "architectures": ["BlockDraft"]}))
    return tmp_path / "draft"


UNKNOWN = "is a draft of kind `block`, which no server is known to run"


def test_the_check_of_an_unknown_kind_is_one_limit(block_draft):
    assert not serves("block")
    (found,) = check_draft(block_draft, kind="block")
    assert found.level == "limit" and UNKNOWN in found.text
    assert any(found.level == "fault" for found in check_draft(block_draft))  # for who does not say its kind


def test_an_unknown_kind_is_saved_with_one_warning(block_draft, caplog):
    require_servable(block_draft, tiny_pair()[0].config, kind="block")
    (record,) = caplog.records
    assert record.levelname == "WARNING" and UNKNOWN in record.message and str(block_draft) in record.message


def test_a_known_kind_is_checked_as_without_its_name(tmp_path):
    target, draft = tiny_pair()
    draft.config.max_position_embeddings = 64
    draft.save_pretrained(tmp_path)
    assert check_draft(tmp_path, target.config, kind="eagle3") == check_draft(tmp_path, target.config) != []
    with pytest.raises(ValueError, match="would not be served as it was trained.*gives a shorter context"):
        require_servable(tmp_path, target.config, kind="eagle3")


def test_no_command_serves_an_unknown_kind():
    assert serve_commands("t", "d", kind="block") == {}
    with pytest.raises(ValueError, match="No server is known to run a draft of kind `block`"):
        served_as("block")


def test_an_unknown_kind_is_not_mended_by_the_rules_of_another(block_draft, tmp_path):
    with pytest.raises(ValueError, match=UNKNOWN):
        repair_draft(block_draft, tmp_path / "mended", kind="block")
    assert not (tmp_path / "mended").exists()


def test_the_script_says_so(block_draft, tmp_path, monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, block_draft)
    assert code == 1 and UNKNOWN in printed.out and len(printed.out.splitlines()) == 1
    code, printed = run(monkeypatch, capsys, block_draft, "--fix", tmp_path / "mended")
    assert code == 2 and UNKNOWN in printed.err
