"""What a run tells its draft's card of its data and arguments."""

import json
import logging

import pytest
from datasets import Dataset

from hf_eagle.data.packing import pack_dataset
from hf_eagle.hub.licenses import inherited_license
from hf_eagle.hub.run_facts import argument_facts, changed_arguments
from hf_eagle.training.run_arguments import RunArguments


@pytest.fixture
def rows():
    """Three conversations of 4, 6 and 10 tokens, the last two of each supervised."""
    sizes = (4, 6, 10)
    masks = [[0] * (size - 2) + [1, 1] for size in sizes]
    return Dataset.from_dict({"input_ids": [list(range(size)) for size in sizes], "loss_mask": masks})


@pytest.fixture
def chats(tmp_path):
    message = {"role": "user", "content": "Hello."}
    (tmp_path / "mine.jsonl").write_text((json.dumps({"messages": [message]}) + "\n") * 5)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    (tmp_path / "set" / "chats.jsonl").write_text((json.dumps({"messages": [message]}) + "\n") * 7)
    return tmp_path


def recipe(folder, *words):
    return RunArguments.parse(["--target", "org/t", "--output_dir", str(folder / "out"), *map(str, words)])


def test_sources_with_records_and_licences(chats, rows):
    found = argument_facts(recipe(chats, "--train_data", chats / "set", chats / "mine.jsonl"), rows)
    assert found["data"] == ["`set`, 7 records, licence cc-by-4.0", "`mine.jsonl`, 5 records"]
    assert found["datasets"] == [] and "license" not in found and "base_model" not in found
    given = ("--data_licenses", "MIT", "CC0-1.0", "--data_weights", 1, 0.5, "--license", "mit", "--base_model", "o/t")
    found = argument_facts(recipe(chats, "--train_data", chats / "set", chats / "mine.jsonl", *given), rows)
    assert found["data"][0] == "`set`, 7 records, licence MIT"
    assert found["data"][1] == "`mine.jsonl`, 5 records, each taken 0.5 times, licence CC0-1.0"
    assert (found["license"], found["base_model"]) == ("mit", "o/t")


def test_data_of_the_hub_are_linked_and_streams_are_not_counted(chats):
    found = argument_facts(recipe(chats, "--train_data", "org/chats:sft", "--streaming", "--max_steps", 3), None)
    assert found["data"] == ["[org/chats:sft](https://huggingface.co/datasets/org/chats)"]
    assert found["datasets"] == ["org/chats"] and found["data_statistics"] == {}
    for source in ("org/chats@v1.0", "org/chats@refs/pr/1:sft:train[:10]"):
        found = argument_facts(recipe(chats, "--train_data", source, "--streaming", "--max_steps", 3), None)
        assert found["data"] == [f"[{source}](https://huggingface.co/datasets/org/chats)"]
        assert found["datasets"] == ["org/chats"]


def test_data_of_this_machine_are_no_links(chats, rows, monkeypatch):
    monkeypatch.setenv("HOME", str(chats))
    monkeypatch.chdir(chats)
    for source in ("~/mine.jsonl", "./mine.jsonl", "mine.jsonl", "../gone/mine.jsonl", "a/b/mine.jsonl"):
        known = recipe(chats, "--train_data", "mine.jsonl", "--streaming", "--max_steps", 3)
        known.data.train_data = [source]  # as Python may give it, without a command line that expands it
        found = argument_facts(known, None)
        assert found["datasets"] == [] and found["data"] == ["`mine.jsonl`"], source


def test_packed_rows_are_counted_as_conversations(chats, rows):
    plain = recipe(chats, "--train_data", chats / "mine.jsonl")
    whole = argument_facts(plain, rows)["data_statistics"]
    packed = argument_facts(plain, pack_dataset(rows, 10))["data_statistics"]
    for found in (whole, packed):
        assert (found["conversations"], found["tokens"], found["supervised_share"]) == (3, 20, 0.3)
    assert whole["length"]["max"] == 10 and "length" not in packed


def test_hyperparameters_of_every_group_without_places(chats, rows):
    changed = ("--max_length", 64, "--fc_norm", "--target_dtype", "bfloat16", "--gguf_file", "x.gguf")
    found = argument_facts(recipe(chats, "--train_data", chats / "mine.jsonl", *changed), rows)
    assert found["hyperparameters"] == {"fc_norm": True, "target_dtype": "bfloat16", "max_length": 64}


def test_no_token_comes_to_a_card(chats, rows):
    (chats / "run.yaml").write_text("hub_token: hf_planted\nhub_model_id: me/draft\n")
    known = recipe(chats, "--train_data", chats / "mine.jsonl", "--config", chats / "run.yaml")
    assert known.training.hub_token == "hf_planted"
    told = [
        argument_facts(known, rows),
        *map(changed_arguments, (known.training, known.draft, known.target, known.data)),
    ]
    assert "planted" not in json.dumps(told, default=str)


def test_as_many_licences_as_sources(chats):
    with pytest.raises(SystemExit):
        recipe(chats, "--train_data", chats / "mine.jsonl", "--data_licenses", "MIT", "MIT")


def test_an_unknown_licence_is_warned_of_once(tmp_path, caplog):
    (tmp_path / "target").mkdir()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert inherited_license(str(tmp_path / "target"), str(tmp_path)) == {}
    (record,) = caplog.records
    assert "names no licence" in record.message and "pass the draft's licence as `license`" in record.message
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "other").mkdir()
    assert inherited_license(str(tmp_path / "other"), str(tmp_path)) == {"license": "mit"}
