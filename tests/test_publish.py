"""Publishing through the real `huggingface_hub` client, against a server on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import TOKEN, LocalHub
from tiny import tiny_pair
from tiny_files import write_chats, write_tiny_target

from hf_eagle.hub.model_card import CardFacts, render_model_card
from hf_eagle.hub.publish import contents


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "publish_draft.py"
# what must be in the repository, beside `custom_generate/`
PUBLISHED = {"config.json", "model.safetensors", "README.md", "training.png", "acceptance.json"}
# what a stranger does with a repository, in a process of its own: HF_ENDPOINT is read once
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
from hf_eagle import load_draft
folder = snapshot_download(sys.argv[1], revision=sys.argv[2])
print(folder, type(load_draft(folder)).__name__, type(load_draft(sys.argv[1])).__name__)
"""


@pytest.fixture
def draft(tmp_path):
    folder = tmp_path / "draft"
    tiny_pair()[1].save_pretrained(folder)
    (folder / "training.png").write_bytes(b"a picture")
    (folder / "acceptance.json").write_text("{}")
    for private in ("training_args.bin", "trainer_state.json", "checkpoint-4/optimizer.pt"):
        (folder / private).parent.mkdir(exist_ok=True)
        (folder / private).write_text("stays at home")
    render_model_card(folder, CardFacts(name="Tiny", target="org/Tiny", license="mit", training_plot="training.png"))
    return folder


@pytest.fixture
def hub():
    with LocalHub() as hub:
        yield hub


def environment(hub, home, token=TOKEN):
    """Of a process whose Hub is the local one; large files go the plain way, without the Hub's chunk store."""
    wanted = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **wanted, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}


def publish(hub, folder, *arguments, token=TOKEN):
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    env = environment(hub, folder.parent / "home", token)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)


def test_what_is_uploaded_and_read_back(hub, draft):
    found = publish(hub, draft, "--repo_id", "me/tiny-draft", "--private", "--revision", "v2")
    assert found.returncode == 0, found.stderr[-2000:]
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

    found = publish(hub, draft, "--repo_id", "me/tiny-draft")
    assert found.returncode == 0, found.stderr[-2000:]
    assert set(hub.uploads.values()) == {1}  # the weights were known already
    read = subprocess.run(
        [sys.executable, "-c", DOWNLOAD, "me/tiny-draft", "v2"],
        env=environment(hub, draft.parent / "other"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert read.returncode == 0, read.stderr[-2000:]
    folder, *kinds = read.stdout.split()
    assert kinds == ["LlamaForCausalLMEagle3"] * 2
    assert (Path(folder) / "config.json").read_bytes() == (draft / "config.json").read_bytes()


def test_a_wrong_token_is_said(hub, draft):
    found = publish(hub, draft, "--repo_id", "me/tiny-draft", token="hf_wrong")
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert "error: The Hub does not let this token write to `repo_id` me/tiny-draft (401)" in found.stderr


def test_a_cut_connection_is_said_and_a_second_run_recovers(hub, draft):
    hub.cut_uploads = hub.cut_commits = 1  # the client itself tries an upload again, but not a commit
    found = publish(hub, draft, "--repo_id", "tiny-draft")
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert "error: The connection to the Hub failed" in found.stderr and hub.files("me/tiny-draft") == {}
    assert hub.cut_uploads == hub.cut_commits == 0
    found = publish(hub, draft, "--repo_id", "tiny-draft")
    assert found.returncode == 0, found.stderr[-2000:]
    assert b'custom_generate="me/tiny-draft"' in hub.files("me/tiny-draft")["README.md"]
    assert hub.files("me/tiny-draft")["model.safetensors"] == (draft / "model.safetensors").read_bytes()
    assert set(hub.uploads.values()) == {1}


def test_a_dry_run_lists_files_and_the_card_and_sends_nothing(hub, draft):
    found = publish(hub, draft, "--repo_id", "me/tiny-draft", "--dry_run", "--include", "checkpoint-*/*")
    assert found.returncode == 0, found.stderr[-2000:]
    size = (draft / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in found.stdout and "checkpoint-4/optimizer.pt" in found.stdout
    assert "# Tiny" in found.stdout and '"model": "me/tiny-draft"' in found.stdout
    assert "training_args.bin" not in found.stdout and hub.repos == {}


def test_an_edited_card_goes_as_it_is(draft):
    card = (draft / "README.md").read_text() + "\nMy own words.\n"
    (draft / "README.md").write_text(card)
    assert contents(draft, "me/tiny-draft")["README.md"] == card.encode()


def test_what_cannot_be_published_is_refused(draft, tmp_path):
    with pytest.raises(ValueError, match="`include` 'notes.md' matches no file"):
        contents(draft, "me/tiny-draft", ["notes.md"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`draft` .*empty holds no config.json and no \*.safetensors"):
        contents(tmp_path / "empty", "me/tiny-draft")


def test_a_card_says_how_plain_transformers_uses_it_only_when_it_is_published(draft):
    assert "custom_generate" not in (draft / "README.md").read_text()
    facts = json.loads((draft / "card_facts.json").read_text())
    render_model_card(draft, {**facts, "draft": "me/tiny-draft"})
    assert 'custom_generate="me/tiny-draft"' in (draft / "README.md").read_text()


def test_training_pushes_its_draft_and_keeps_its_states(hub, tmp_path):
    write_tiny_target(tmp_path / "target")
    write_chats(tmp_path / "chats.jsonl")
    options = {
        "target": tmp_path / "target",
        "train_data": tmp_path / "chats.jsonl",
        "output_dir": tmp_path / "draft",
        "hub_model_id": "me/tiny-draft",
        "hub_strategy": "checkpoint",
        "max_steps": 4,
        "save_steps": 2,
        "save_total_limit": 1,
        "ttt_steps": 2,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "scripts" / "train_eagle.py"), *words, "--push_to_hub", "--hub_always_push"]
    env = environment(hub, tmp_path / "home")
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr[-2000:]
    files = hub.files("me/tiny-draft")
    assert {"config.json", "model.safetensors", "README.md"} <= files.keys()
    assert "training_args.bin" not in files and "last-checkpoint/optimizer.pt" in files
    assert b"optimizer steps | 4" in files["README.md"] and b'"model": "me/tiny-draft"' in files["README.md"]
    assert files["model.safetensors"] == (tmp_path / "draft" / "model.safetensors").read_bytes()
    assert (tmp_path / "draft" / "training_args.bin").is_file()
