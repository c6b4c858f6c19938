"""Publishing through the real `huggingface_hub` client, against a server on this machine."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import Future
from pathlib import Path

import pytest
from chain_models import make_draft, make_target
from forks import Forks
from huggingface_hub import ModelCard
from local_hub import TOKEN, LocalHub
from tiny_files import write_chats, write_tiny_target
from transformers.utils import PushInProgress

from hf_eagle.hub.model_card import CardFacts, render_model_card
from hf_eagle.hub.publish import contents, facts_to_publish, publish_draft
from hf_eagle.training.checkpoints import MANIFEST
from hf_eagle.training.saving import SavingMixin
from scripts import publish_draft as publish_script


ROOT = Path(__file__).resolve().parents[2]
# what must be in the repository, beside `custom_generate/`
PUBLISHED = {"config.json", "model.safetensors", "README.md", "training.png", "acceptance.json"}
# what a stranger does with a repository, in an environment that has transformers and not hf_eagle
STRANGER = """
import importlib.util, json, sys
assert importlib.util.find_spec("hf_eagle") is None
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM

target, repository, revision = sys.argv[1:]
model, forwards = AutoModelForCausalLM.from_pretrained(target), []
model.model.layers[0].register_forward_hook(lambda *_: forwards.append(1))
prompts = torch.randint(1, 67, (24, 4), generator=torch.Generator().manual_seed(2))[:3]
ways = {
    "plain": {},
    "chain": {"custom_generate": repository, "num_speculative_tokens": 2},
    "tree": {"custom_generate": repository, "method": "tree", "depth": 3, "tree_top_k": 2, "total_tokens": 8},
}
found = {"folder": snapshot_download(repository, revision=revision)}
for name, way in ways.items():
    options = {**way, "trust_remote_code": True} if way else {}
    mask = torch.ones_like(prompts)
    answers = model.generate(prompts, attention_mask=mask, max_new_tokens=24, do_sample=False, **options)
    found[name] = {"answers": answers.tolist(), "forwards": len(forwards)}
    forwards.clear()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a target and of a draft that was taught its answers."""
    folder, target = tmp_path_factory.mktemp("pair"), make_target()
    target.model.save_pretrained(folder / "target")
    make_draft(target, draft_vocab_size=40, tap_ids=[0, 2, 3]).save_pretrained(folder / "draft")
    return folder / "target", folder / "draft"


@pytest.fixture
def draft(tmp_path, pair):
    folder = shutil.copytree(pair[1], tmp_path / "draft")
    (folder / "training.png").write_bytes(b"a picture")
    (folder / "acceptance.json").write_text("{}")
    for private in ("training_args.bin", "trainer_state.json", "checkpoint-4/optimizer.pt"):
        (folder / private).parent.mkdir(exist_ok=True)
        (folder / private).write_text("stays at home")
    render_model_card(folder, CardFacts(name="Tiny", target="org/Tiny", license="mit", training_plot="training.png"))
    return folder


@pytest.fixture(scope="module")
def server():
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def hub(server):
    """With nothing on it."""
    for known in (server.repos, server.blobs, server.uploads):
        known.clear()
    return server


def environment(hub, home):
    """Of a process whose Hub is the local one; large files go the plain way, without the Hub's chunk store."""
    wanted = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **wanted, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def publish(server, tmp_path_factory):
    """Runs the script, whose Hub is the local one; returns its exit status and what it printed."""
    folder = tmp_path_factory.mktemp("publish")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server, folder / "home").items():
            patch.setenv(name, value)
        forks = Forks(Path(__file__).parent.with_name("publish_worker.py"))

    def run(*arguments):
        forks.start(folder / "printed.txt", *arguments)
        code = forks.wait()
        return code, (folder / "printed.txt").read_text()

    yield run
    forks.close()


def stranger(folder):
    """The python of a fresh environment that sees this one's packages, but nothing that is installed as editable."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def test_what_is_uploaded_and_a_stranger_drafts_with_it(hub, publish, draft, pair, tmp_path):
    code, printed = publish(draft, "--repo_id", "me/tiny-draft", "--private", "--revision", "v2")
    assert code == 0, printed
    assert hub.repos["me/tiny-draft"]["private"]
    files = hub.files("me/tiny-draft", "v2")
    assert {name for name in files if "/" not in name} == PUBLISHED
    assert files["model.safetensors"] == (draft / "model.safetensors").read_bytes()
    assert b"DRAFT = 'me/tiny-draft'" in files["custom_generate/generate.py"]
    # the card names the repository; the folder's own still names the folder
    assert (
        b'"model": "me/tiny-draft"' in files["README.md"] and b'custom_generate="me/tiny-draft"' in files["README.md"]
    )
    assert str(draft) in (draft / "README.md").read_text()
    assert hub.files("me/tiny-draft") == {}  # main was left alone

    code, printed = publish(draft, "--repo_id", "me/tiny-draft")
    assert code == 0, printed
    assert set(hub.uploads.values()) == {1}  # the weights were known already
    read = subprocess.run(
        [stranger(tmp_path / "venv"), "-c", STRANGER, str(pair[0]), "me/tiny-draft", "v2"],
        env=environment(hub, tmp_path / "other") | {"PYTHONPATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert read.returncode == 0, read.stderr[-2000:]
    found = json.loads(read.stdout.splitlines()[-1])
    for name in ("config.json", "model.safetensors"):
        assert (Path(found["folder"]) / name).read_bytes() == (draft / name).read_bytes()
    plain, chain, tree = (found[name] for name in ("plain", "chain", "tree"))
    assert plain["answers"] == chain["answers"] == tree["answers"] and len(plain["answers"][0]) == 28
    assert plain["forwards"] == 24 and max(chain["forwards"], tree["forwards"]) < 20  # the draft is right now and then


def test_a_wrong_token_is_said(hub, publish, draft):
    code, printed = publish(draft, "--repo_id", "me/tiny-draft", "--token", "hf_wrong")
    assert code == 1 and "Traceback" not in printed
    assert "error: The Hub does not let this token write to `repo_id` me/tiny-draft (401)" in printed


def test_a_cut_connection_is_said_and_a_second_run_recovers(hub, publish, draft):
    hub.cut_uploads = hub.cut_commits = 1  # the client itself tries an upload again, but not a commit
    code, printed = publish(draft, "--repo_id", "tiny-draft")
    assert code == 1 and "Traceback" not in printed
    assert "error: The connection to the Hub failed" in printed and hub.files("me/tiny-draft") == {}
    assert hub.cut_uploads == hub.cut_commits == 0
    code, printed = publish(draft, "--repo_id", "tiny-draft")
    assert code == 0, printed
    assert b'custom_generate="me/tiny-draft"' in hub.files("me/tiny-draft")["README.md"]
    assert hub.files("me/tiny-draft")["model.safetensors"] == (draft / "model.safetensors").read_bytes()
    assert set(hub.uploads.values()) == {1}


def test_a_dry_run_lists_files_and_the_card_and_sends_nothing(hub, publish, draft):
    code, printed = publish(draft, "--repo_id", "me/tiny-draft", "--dry_run", "--include", "checkpoint-*/*")
    assert code == 0, printed
    size = (draft / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in printed and "checkpoint-4/optimizer.pt" in printed
    assert "# Tiny" in printed and '"model": "me/tiny-draft"' in printed
    assert "training_args.bin" not in printed and hub.repos == {}


def test_what_servers_would_not_run_as_it_was_trained_is_refused(hub, publish, draft, pair):
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    where, beside = ("--repo_id", "me/tiny-draft"), ("--target", pair[0])
    code, printed = publish(draft, *where, "--dry_run")
    assert code == 0, printed  # of the draft alone nothing is wrong
    for way in ((), ("--dry_run",)):
        code, printed = publish(draft, *where, *beside, *way)
        assert code == 1 and "`max_position_embeddings` of 128 gives a shorter context than the target" in printed
        assert f"error: {draft} would not be served as it was trained: mend it, by scripts/check_draft.py" in printed
        assert ("  model.safetensors\n" in printed) == bool(way) and hub.repos == {}
    code, printed = publish(draft, *where, *beside, "--publish_anyway")
    assert code == 0 and "gives a shorter context" in printed and "model.safetensors" in hub.files("me/tiny-draft")


def test_a_card_is_completed_when_it_is_published(publish, draft):
    (draft / "target").mkdir()
    render_model_card(draft, CardFacts(name="Tiny", target=str(draft / "target")))
    measured = {"acceptance_length": 1.75, "accepted_per_position": [3], "drafts": 4, "num_speculative_tokens": 1}
    for name in ("acceptance", "acceptance_code"):
        (draft / f"{name}.json").write_text(json.dumps({**measured, "num_prompts": 2, "prompts": f"{name}.jsonl"}))
    code, printed = publish(draft, "--repo_id", "me/tiny-draft", "--dry_run")
    assert code == 0 and "a folder of this machine: give `base_model`." in printed
    assert printed.count("names no licence, because no card of ") == 1
    assert "pass the draft's licence as `license`" in printed
    facts = {"license": "mit", "base_model": "org/Tiny"}
    code, printed = publish(draft, "--repo_id", "me/tiny-draft", "--dry_run", "--license", "mit", "--base_model", "o/T")
    assert "license: mit\n" in printed and "base_model: o/T\n" in printed and "give `" not in printed
    card = ModelCard(contents(draft, "me/tiny-draft", facts=facts)["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("mit", "org/Tiny") and str(draft) not in card.text
    assert sorted(result.dataset_name for result in card.data.eval_results) == ["acceptance", "acceptance_code"]
    # published again, it tells each of them once
    render_model_card(draft, facts_to_publish(draft, "me/tiny-draft", facts))
    assert ModelCard(contents(draft, "me/tiny-draft")["README.md"].decode()).text == card.text


def test_an_edited_card_goes_as_it_is(draft):
    card = (draft / "README.md").read_text() + "\nMy own words.\n"
    (draft / "README.md").write_text(card)
    assert contents(draft, "me/tiny-draft")["README.md"] == card.encode()
    with pytest.raises(ValueError, match="`license` belongs on the card, but .*README.md was edited: write it there"):
        contents(draft, "me/tiny-draft", facts={"license": "mit"})


def test_a_card_that_names_this_machine_is_told_and_facts_that_are_none_are_one_sentence(hub, publish, draft):
    facts = json.loads((draft / "card_facts.json").read_text())
    (draft / "card_facts.json").write_text(json.dumps({**facts, "more": 1}))
    code, printed = publish(draft, "--repo_id", "me/tiny-draft", "--dry_run")
    assert code == 1 and "Traceback" not in printed
    assert f"error: {draft}/card_facts.json holds more, which no card shows; it takes: name, target, " in printed
    (draft / "card_facts.json").unlink()
    code, printed = publish(draft, "--repo_id", "me/tiny-draft", "--dry_run")
    assert code == 0 and f"goes as it is: it names {draft}, a folder of this machine." in printed
    # a folder that was moved since, and a target beside it
    moved = f"My own words.\n`vllm serve {draft.parent}/was-here --model {draft.parent}/target.`\n"
    (draft / "README.md").write_text(moved)
    code, printed = publish(draft, "--repo_id", "me/tiny-draft", "--dry_run")
    assert code == 0 and f"it names {draft.parent}/was-here, {draft.parent}/target, folders of this machine." in printed
    (draft / "README.md").write_text("My own words.\n")
    code, printed = publish(draft, "--repo_id", "me/tiny-draft", "--dry_run")
    assert code == 0 and "a folder of this machine" not in printed


def test_what_cannot_be_published_is_refused(draft, tmp_path):
    with pytest.raises(ValueError, match="`include` 'notes.md' matches no file"):
        contents(draft, "me/tiny-draft", ["notes.md"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`draft` .*empty holds no config.json and no \*.safetensors"):
        contents(tmp_path / "empty", "me/tiny-draft")


@pytest.mark.parametrize(
    ("card", "sentence"),
    [
        (bytes(range(128, 256)), r"README.md is not UTF-8 \(byte 0\), so no card"),
        (b"---\ntags: [\n---\n# Mine\n", "README.md does not begin with YAML as cards do .*"),
        (b"---\nhello\n---\n# Mine\n", r"README.md does not begin with YAML as cards do \(.*dict\)"),
        (None, "README.md is a folder, where the draft's card belongs"),
    ],
)
def test_a_card_that_the_hub_would_refuse_is_named(draft, card, sentence, monkeypatch):
    (draft / "README.md").unlink()
    if card is None:
        (draft / "README.md").mkdir()
    else:
        (draft / "README.md").write_bytes(card)
    with pytest.raises(ValueError, match=f"{sentence}: correct it, or move it away"):
        publish_draft(draft, "me/tiny-draft")
    monkeypatch.setattr(sys, "argv", ["publish_draft.py", str(draft), "--repo_id", "me/tiny-draft", "--dry_run"])
    with pytest.raises(ValueError, match=f"{sentence}: correct it, or move it away"):
        publish_script.main()
    contents(draft, "me/tiny-draft", leave_out_broken=True)  # which ends no training


@pytest.mark.parametrize("found", [{"sweep": 3}, {"sweep": []}, {"acceptance_length": 2.0, "sweep": [3]}])
def test_a_measurement_that_no_card_can_show_is_named(draft, found):
    (draft / "acceptance.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="acceptance.json .*: measure again with scripts/evaluate_draft.py"):
        contents(draft, "me/tiny-draft")


def test_no_file_of_elsewhere_is_included(draft, tmp_path):
    (tmp_path / "private.txt").write_text("mine")
    (draft / "note.txt").symlink_to(tmp_path / "private.txt")
    (draft / "more").symlink_to(tmp_path)
    for pattern in ("*.txt", "more/*.txt"):
        with pytest.raises(ValueError, match="`include` .* matches .*, a link to .*private.txt, which lies outside"):
            contents(draft, "me/tiny-draft", [pattern])


def test_a_card_says_how_plain_transformers_uses_it_only_when_it_is_published(draft):
    assert "custom_generate" not in (draft / "README.md").read_text()
    facts = json.loads((draft / "card_facts.json").read_text())
    render_model_card(draft, {**facts, "draft": "me/tiny-draft"})
    assert 'custom_generate="me/tiny-draft"' in (draft / "README.md").read_text()


def test_training_pushes_its_draft_and_keeps_its_states(hub, tmp_path):
    write_tiny_target(tmp_path / "target")
    (tmp_path / "target" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Tiny\n")
    write_chats(tmp_path / "chats.jsonl")
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "serving.json").write_text('{"entries": 3}')  # nothing that anybody left there ends a run
    options = {
        "target": tmp_path / "target",
        "base_model": "org/Tiny",
        "train_data": tmp_path / "chats.jsonl",
        "data_licenses": "CC0-1.0",
        "draft_vocab_size": 24,
        "oov_rows": "renormalize",
        "output_dir": tmp_path / "draft",
        "hub_model_id": "me/tiny-draft",
        "hub_strategy": "checkpoint",
        "max_steps": 4,
        "save_steps": 2,
        "save_total_limit": 1,
        "ttt_steps": 2,
        "max_length": 64,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "scripts" / "train_eagle.py"), *words, "--push_to_hub", "--hub_always_push"]
    env = environment(hub, tmp_path / "home")
    (tmp_path / "draft" / ".pushing" / "checkpoint-2").mkdir(parents=True)  # of a killed run
    hub.upload_seconds = 2  # meanwhile the next checkpoint is written, and this one deleted
    found = subprocess.run(command, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "failed" not in found.stderr
    assert len([message for message in hub.messages if message.startswith("Training in progress")]) == 4
    assert not (tmp_path / "draft" / ".pushing").exists()
    assert found.stderr.count("The card leaves a table out: ") == 1
    assert "draft/serving.json lacks `arguments`, `machine`: measure again" in found.stderr
    assert "HTTP Request" not in found.stderr and hub.url not in found.stderr  # no line for each of them
    files = hub.files("me/tiny-draft")
    assert {"config.json", "model.safetensors", "README.md"} <= files.keys()
    assert "training_args.bin" not in files
    # whole, so that it can be resumed from
    assert {f"last-checkpoint/{name}" for name in ("optimizer.pt", MANIFEST)} <= files.keys(), found.stderr[-2000:]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("cc-by-4.0", "org/Tiny")  # its target's licence
    for fact in (
        "| optimizer steps | 4 |\n",
        "| minutes | ",
        '"model": "me/tiny-draft"',
        "--model org/Tiny ",
        "* `chats.jsonl`, 12 records, licence CC0-1.0\n",
        "12 conversations, ",
        "| `draft_vocab_size` | `24` |",
        "| `ttt_steps` | `2` |",
    ):
        assert fact in card.text, fact
    assert str(tmp_path) not in card.text
    assert files["model.safetensors"] == (tmp_path / "draft" / "model.safetensors").read_bytes()
    assert (tmp_path / "draft" / "training_args.bin").is_file()


def test_pushes_that_fail_in_the_background_are_told_once(caplog):
    trainer = SavingMixin.__new__(SavingMixin)
    trainer.hub_model_id, sent, lost, running = "me/tiny-draft", Future(), Future(), Future()
    sent.set_result("a commit")
    lost.set_exception(OSError("no route to host"))
    trainer.push_in_progress = PushInProgress([sent, lost, running])
    for _ in range(2):
        trainer._tell_failed_pushes()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["A push to me/tiny-draft while training went on failed: no route to host"]
    assert trainer.push_in_progress.jobs == [running]
