"""A card is somebody's own only if its text is: not by where its folder lies, how it is named, or who looks at it."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

from hf_eagle.door.names import as_named, is_hub_id
from hf_eagle.hub.card_facts import FACTS, CardFacts, _warn_once, measured_in
from hf_eagle.hub.model_card import card_text, facts_of_card, is_edited, render_model_card
from hf_eagle.hub.publish import contents, facts_to_publish
from hf_eagle.serving.commands import serve_commands


MEASURED = {"acceptance_length": 1.5, "accepted_per_position": [3], "drafts": 4, "num_speculative_tokens": 1}

SERVED = {"arguments": {"num_prompts": 1, "max_new_tokens": 4, "dtype": "float32", "rounds": 1}, "machine": "mine"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working directory, which is the home too; with a target's folder and a draft's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = {"architectures": ["LlamaForCausalLMEagle3"], "vocab_size": 9}
    for folder in ("models/llama", "runs/draft"):
        Path(folder).mkdir(parents=True)
    Path("runs/draft/config.json").write_text(json.dumps(config))
    save_file({"fc.weight": np.zeros((2, 2), np.float32)}, "runs/draft/model.safetensors")
    return tmp_path


def spellings(home):
    """Ways to name the draft's folder."""
    (home / "linked").symlink_to(home / "runs" / "draft")
    (home / "runs" / "other").mkdir()
    return [
        "runs/draft",
        "runs/draft/",
        "./runs/draft",
        "runs/other/../draft",
        "linked",
        home / "linked",
        home / "runs" / "draft",
        "~/runs/draft",
    ]


def test_a_folder_has_one_card_however_it_is_named(home):
    cards = set()
    for draft in spellings(home):
        card = render_model_card(draft, CardFacts(name="X", target="org/t"))
        cards.add(card.read_text())
        for other in ("runs/draft", "linked", home / "runs" / "draft", "~/runs/draft"):
            assert facts_of_card(other) is not None and not is_edited(other)
    assert len(cards) == 1 and f"--speculative-draft-model-path {home}/runs/draft " in cards.pop()


@pytest.mark.parametrize("target", ["models/llama", "~/models/llama", "org/t"])
def test_a_card_that_was_moved_is_not_edited(home, monkeypatch, target):
    before = render_model_card("runs/draft", CardFacts(name="X", target=target)).read_text()
    shutil.move("runs/draft", "moved")
    shutil.rmtree("models")
    assert facts_of_card("moved") is not None
    monkeypatch.chdir("/")  # where a relative target would be another name
    found = facts_of_card(home / "moved")
    assert (found.base_model == "org/t") == (target == "org/t")
    # rendered again it names the new folder, and nothing else of it is new
    again = render_model_card(home / "moved", found).read_text()
    assert again == before.replace(f"{home}/runs/draft", f"{home}/moved")


@pytest.mark.parametrize("change", ["config", "weights", "crlf"])
def test_a_card_is_not_edited_by_what_lies_beside_it(home, change):
    card = render_model_card("runs/draft", CardFacts(name="X", target="org/t"))
    if change == "config":
        Path("runs/draft/config.json").write_text(json.dumps({"vocab_size": 8, "norm_output": True}))
    elif change == "weights":
        save_file({"fc.weight": np.zeros((3, 3), np.float32)}, "runs/draft/model.safetensors")
    else:  # as some version control writes text
        card.write_bytes(card.read_bytes().replace(b"\n", b"\r\n"))
    assert facts_of_card("runs/draft") is not None


@pytest.mark.parametrize("edit", ["one letter", "appended", "all of it", "another encoding"])
def test_a_card_whose_text_differs_is_edited(home, edit):
    card = render_model_card("runs/draft", CardFacts(name="X", target="org/t"))
    text = card.read_bytes()
    edited = {
        "one letter": text.replace(b"# X", b"# Y"),
        "appended": text + b"\n",
        "all of it": b"",
        "another encoding": text + "é".encode("latin-1"),
    }
    card.write_bytes(edited[edit])
    assert facts_of_card("runs/draft") is None and is_edited("runs/draft")
    assert contents("runs/draft", "me/d")["README.md"] == edited[edit]


def test_a_card_that_is_gone_is_rendered_anew_from_its_facts(home):
    before = render_model_card("runs/draft", CardFacts(name="X", target="org/t")).read_text()
    os.remove("runs/draft/README.md")
    assert not is_edited("runs/draft")
    found = contents("runs/draft", "me/d", facts={"license": "mit"})["README.md"].decode()
    assert ModelCard(found).data.license == "mit" and '"model": "me/d"' in found
    assert render_model_card("runs/draft", facts_of_card("runs/draft")).read_text() == before


def test_without_facts_a_card_is_somebodys_own_and_none_is_none(home):
    assert facts_of_card("runs/draft") is None and not is_edited("runs/draft")
    with pytest.raises(ValueError, match="`license` belongs on the card, but runs/draft/README.md is missing"):
        contents("runs/draft", "me/d", facts={"license": "mit"})
    Path("runs/draft/README.md").write_text("My own.")
    assert facts_of_card("runs/draft") is None and is_edited("runs/draft")


def test_a_card_of_a_version_that_wrote_no_digest(home):
    """It named the folder as it was told it."""
    for named in ("runs/draft", "/elsewhere/runs/draft", "my runs/draft"):
        facts = CardFacts(name="X", target="org/t", base_model="org/t")
        Path("runs/draft/README.md").write_text(card_text(Path("runs/draft"), facts, named=named))
        told = {name: value for name, value in vars(facts).items() if name != "card_sha256"}
        Path("runs/draft", FACTS).write_text(json.dumps(told))
        assert facts_of_card(home / "runs" / "draft") == facts
    with Path("runs/draft/README.md").open("a") as card:
        card.write("My own words.\n")
    assert is_edited("runs/draft")


def test_facts_that_cannot_be_read_leave_the_card_alone(home, caplog):
    card = render_model_card("runs/draft", CardFacts(name="X", target="org/t")).read_text()
    Path("runs/draft", FACTS).write_text("{oops")
    assert is_edited("runs/draft") and "card_facts.json cannot be read as JSON" in caplog.text
    with pytest.raises(ValueError, match="runs/draft/card_facts.json cannot be read as JSON"):
        contents("runs/draft", "me/d")
    assert Path("runs/draft/README.md").read_text() == card


# ---- no path of this machine is published ----


@pytest.mark.parametrize("base_model", [None, "models/llama", "~/models/llama", "./models/llama", "/models/llama"])
@pytest.mark.parametrize("target", ["models/llama", "~/models/llama", "./models/llama/", "/no/such/llama", "../llama"])
def test_local_paths_are_no_links_and_no_commands_of_a_published_card(home, target, base_model):
    text = render_model_card("runs/draft", CardFacts(name="X", target=target, base_model=base_model)).read_text()
    assert "https://huggingface.co/" not in text and ModelCard(text).data.to_dict().get("base_model") is None
    assert f"--model {as_named(target)} " in text and "~" not in text and "path/to" not in text

    published = contents("runs/draft", "me/d")["README.md"].decode()
    assert "https://huggingface.co/" not in published
    assert ModelCard(published).data.to_dict().get("base_model") is None
    for path in (str(home), "models/llama", "/no/such", "../", "~", "runs/draft"):
        assert path not in published
    assert published.count("path/to/llama ") == 2 and 'from_pretrained("path/to/llama")' in published
    assert "A draft" not in published and "draft for `llama`:" in published and "{{" not in published
    assert "Replace `path/to/llama` with the folder or the repository of your copy of the target." in published

    known = contents("runs/draft", "me/d", facts={"base_model": "org/Llama"})["README.md"].decode()
    assert "--model org/Llama " in known and "path/to" not in known and ModelCard(known).data.base_model == "org/Llama"


def test_a_folder_that_is_named_like_a_repository_is_a_folder(home):
    """For whoever loads a model, too."""
    text = render_model_card("runs/draft", {"name": "X", "target": "models/llama", "draft": "runs/draft"}).read_text()
    assert f'"model": "{home}/runs/draft"' in text and "huggingface.co" not in text and "custom_generate" not in text


def test_a_base_model_that_is_a_folder_is_refused_when_it_is_given_and_told_when_it_was(home, caplog):
    render_model_card("runs/draft", CardFacts(name="X", target="models/llama", base_model="~/models/llama"))
    assert "`base_model` ~/models/llama is a folder; give the target's Hub id" in caplog.text
    for base_model in ("models/llama", "~/models/llama", "/models/llama"):
        with pytest.raises(
            ValueError, match=f"`base_model` is {base_model}, a folder of this machine: give the target"
        ):
            facts_to_publish("runs/draft", "me/d", {"base_model": base_model})


@pytest.mark.parametrize("repo_id", ["/home/me/draft", "~/draft", "a/b/c", "", "./draft"])
def test_a_repository_has_a_repositorys_name(home, repo_id):
    render_model_card("runs/draft", CardFacts(name="X", target="org/t"))
    with pytest.raises(ValueError, match="`repo_id` is .*, which is no repository's name: give one like"):
        contents("runs/draft", repo_id)


@pytest.mark.parametrize("pattern", ["", "/etc/pass*", "../*", "checkpoint-*/../../*"])
def test_patterns_stay_inside_the_folder(home, pattern):
    Path("runs/beside.txt").write_text("private")
    with pytest.raises(ValueError, match=r"`include` .* is no pattern of files in .*: give one like checkpoint-\*/\*"):
        contents("runs/draft", "me/d", [pattern])


def test_names():
    for name in ("org/model", "model", "org/Model-1.5_b"):
        assert is_hub_id(name) and as_named(name) == name
    for name in ("/models/x", "~/x", "./x", "../x", "a/b/c", "C:\\x", "x/", ""):
        assert not is_hub_id(name) and os.path.isabs(as_named(name)) and "~" not in as_named(name)


def test_commands_expand_the_home(home):
    for command in serve_commands("~/models/llama", "~/runs/draft").values():
        assert f"{home}/models/llama " in command and f"{home}/runs/draft" in command and "~" not in command


# ---- what was measured, and is put on the card ----


BROKEN = [
    ("acceptance", {"acceptance_length": 2.5}, "lacks `accepted_per_position`, .*`num_speculative_tokens`"),
    ("acceptance", MEASURED, "lacks `num_prompts`"),
    (
        "acceptance_code",
        {**MEASURED, "num_prompts": 2, "drafts": "4"},
        "a whole number as `drafts`, but holds text",
    ),
    (
        "acceptance",
        {**MEASURED, "num_prompts": 2, "temperature": "hot"},
        "or null as `temperature`, but holds text",
    ),
    ("acceptance", {**MEASURED, "num_prompts": 2, "method": "tree"}, "lacks `total_tokens`, `depth`"),
    ("serving", {"entries": [{}]}, "lacks `arguments`, `machine`"),
    ("serving", {**SERVED, "entries": [{}]}, r"lacks `entries\[0\].num_speculative_tokens`, .*batch_size.*"),
    ("serving", {**SERVED, "entries": 3}, "a list as `entries`, but holds a whole number"),
]


@pytest.mark.parametrize("name, found, sentence", BROKEN)
def test_measurements_that_lack_what_a_card_shows_name_file_and_field(home, name, found, sentence):
    render_model_card("runs/draft", CardFacts(name="X", target="org/t"))
    Path(f"runs/draft/{name}.json").write_text(json.dumps(found))
    script = "evaluate_draft" if "acceptance" in name else "benchmark_serving"
    with pytest.raises(
        ValueError, match=f"runs/draft/{name}.json .*{sentence}: measure again with scripts/{script}.py"
    ):
        contents("runs/draft", "me/d")


@pytest.mark.parametrize(
    "name, found, sentence", [*BROKEN, ("serving", "{", "cannot be read as JSON"), ("acceptance", "\ud83d", "")]
)
def test_what_a_training_renders_leaves_broken_tables_out_and_says_so_once(home, caplog, name, found, sentence):
    """Its card and its pushes; who publishes by the verb is told to mend them."""
    sound = {**MEASURED, "num_prompts": 2, "prompts": "sound.jsonl"}
    Path("runs/draft/acceptance_sound.json").write_text(json.dumps(sound))
    text = found if isinstance(found, str) else json.dumps(found)
    Path(f"runs/draft/{name}.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    _warn_once.cache_clear()
    for _ in range(2):
        measured = measured_in("runs/draft", leave_out_broken=True)
        assert measured["serving"] == {} and list(measured["acceptance"]) == ["sound"]
        render_model_card("runs/draft", CardFacts(name="X", target="org/t", **measured))
        files = contents("runs/draft", "me/d", leave_out_broken=True)
        assert "| sound (2) |" in files["README.md"].decode()
        with pytest.raises(ValueError, match=f"runs/draft/{name}.json"):
            contents("runs/draft", "me/d")
    (told,) = [r.getMessage() for r in caplog.records if "leaves a table out" in r.getMessage()]
    assert f"runs/draft/{name}.json" in told and "or move the file away" in told and re.search(sentence, told)


def test_a_push_of_a_training_sends_a_card_whose_facts_are_broken_as_it_is(home):
    render_model_card("runs/draft", CardFacts(name="X", target="org/t"))
    Path("runs/draft/card_facts.json").write_text("{")
    with pytest.raises(ValueError, match="card_facts.json cannot be read as JSON"):
        contents("runs/draft", "me/d")
    sent = contents("runs/draft", "me/d", leave_out_broken=True)
    assert sent["README.md"] == Path("runs/draft/README.md").read_bytes()


def test_a_table_with_holes_is_refused(home):
    render_model_card("runs/draft", CardFacts(name="X", target="org/t"))
    entry = {"tokens_per_second": 2.0, "speedup": 1.0, "acceptance_length": None}
    pairs = [(0, 1), (0, 2), (3, 1)]
    for several in ([], pairs):
        entries = [{"num_speculative_tokens": count, "batch_size": size, **entry} for count, size in several]
        Path("runs/draft/serving.json").write_text(json.dumps({**SERVED, "entries": entries}))
        with pytest.raises(ValueError, match="serving.json lacks pairs of `num_speculative_tokens` and `batch_size`"):
            contents("runs/draft", "me/d")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"more": 1}, "holds more, which no card shows"),
        ({"name": None}, "must hold text as `name`, but holds null"),
        ({"datasets": "org/chats"}, "must hold a list as `datasets`, but holds text"),
        ({"acceptance": {"p": {"acceptance_length": 2}}}, r"`acceptance\['p'\]`, lacks `accepted_per_position`"),
        ({"data_statistics": {"tokens": 3}}, "`data_statistics`, lacks `conversations`"),
    ],
)
def test_facts_that_no_card_can_show_name_file_and_field(home, change, sentence):
    render_model_card("runs/draft", CardFacts(name="X", target="org/t"))
    path = Path("runs/draft", FACTS)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"runs/draft/card_facts.json.*{sentence}"):
        contents("runs/draft", "me/d")
    with pytest.raises(ValueError, match=f"`facts`.*{sentence}"):
        render_model_card("runs/draft", {"name": "X", "target": "org/t"} | change)


def test_facts_that_lack_one_and_facts_that_are_none(home):
    for content, sentence in (("null", "must hold an object, but holds null"), ('{"name": "X"}', "lacks `target`")):
        Path("runs/draft", FACTS).write_text(content)
        with pytest.raises(ValueError, match=f"card_facts.json {sentence}: correct it, or remove it"):
            facts_of_card("runs/draft")
