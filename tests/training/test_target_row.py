"""The table of families in page `targets` is what the code says, and `hf-eagle targets` answers from it."""

import json
import sys

import pytest
from family_table import MAKERS, PICTURES, measured, of_family, pictures_of
from releases import is_older, skip_before
from transformers import CohereConfig

from hf_eagle import cli
from hf_eagle.docs import read_page
from hf_eagle.targets.architectures import FAMILIES, family_of
from hf_eagle.targets.media_inputs import why_not_shown
from hf_eagle.targets.shard_layout import layout_of
from hf_eagle.training.target_row import COLUMNS, as_table, read_table, row_from_config, row_of_folder


TABLE = read_table(read_page("targets"))
ROWS = {row["family"]: row for row in TABLE}


def call(monkeypatch, capsys, *arguments):
    """The rows that the verb prints."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # which a verb takes the place of
    monkeypatch.setattr("sys.argv", ["hf-eagle", "targets", *arguments])
    cli.main()
    return read_table(capsys.readouterr().out)


def test_the_page_has_a_row_for_each_family():
    assert list(ROWS) == [family.name for family in FAMILIES]
    assert as_table(TABLE) in read_page("targets")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_follows_from_a_config_is_as_the_page_says(family, caplog):
    config = MAKERS[of_family(family)[0]][0]()
    found = row_from_config(config)
    wanted = {name: ROWS[family.name][name] for name in found}
    if is_older("transformers", "5.24"):  # which shards no target
        wanted["sharded"] = "no"
    assert found == wanted
    # nobody has chosen what is tried for the row
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("hf_eagle")]


def test_pictures_are_as_the_page_says():
    """A folder is answered from its own config: of a family's text part alone, no."""
    assert {name: row["pictures"] for name, row in ROWS.items()} == {x.name: pictures_of(x)[1] for x in FAMILIES}
    for make in PICTURES.values():
        config = make(10)
        row = ROWS[family_of(config).name]
        assert row_of_folder(row, config)["pictures"] == "yes" and why_not_shown(config.get_text_config())


def test_what_is_suppressed_for_a_row_is_said_to_who_chooses_it(caplog):
    skip_before("transformers", "5.24")
    config = MAKERS[of_family(next(x for x in FAMILIES if x.name == "gpt-oss"))[0]][0]()
    row_from_config(config)
    layout_of(config, "tensor", world=2)
    assert "`target_sharding` tensor splits the embedding" in caplog.text


# `python tests/family_table.py` looks at all of them
@pytest.mark.parametrize("family", [x for x in FAMILIES if x.name in ("Llama", "Llama 4", "DeepSeek-V3.2", "Gemma 4")])
def test_what_a_run_shows_is_as_the_page_says(family):
    (name,) = of_family(family)
    found = measured(name)
    assert found == {step: ROWS[family.name][step] for step in found}


def test_the_verb_shows_the_table_and_a_row_of_it(monkeypatch, capsys):
    assert call(monkeypatch, capsys) == TABLE
    for name in ("Qwen3.5", "qwen3.5", "qwen3_5_text"):
        assert call(monkeypatch, capsys, name) == [ROWS["Qwen3.5"]]


def test_a_folder_is_answered_from_its_own_config_without_weights(monkeypatch, capsys, tmp_path):
    """Three key heads cannot be spread over two ranks."""
    skip_before("transformers", "5.24")
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 96, **sizes}))
    assert call(monkeypatch, capsys, str(tmp_path)) == [{**ROWS["Llama"], "sharded": "fsdp2"}]


def test_a_folder_of_a_target_that_is_shown_pictures_says_so(monkeypatch, capsys, tmp_path):
    skip_before("transformers", "5.24")
    for name, family in (("gemma3", "Gemma 3"), ("mistral3", "Mistral"), ("qwen3.5", "Qwen3.5")):
        PICTURES[name](10).save_pretrained(tmp_path / name)
        (row,) = call(monkeypatch, capsys, str(tmp_path / name))
        assert (row["family"], row["pictures"], row["decoded"]) == (family, "yes", "yes")


def test_a_folder_with_the_name_of_a_family_is_written_as_a_path(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("Llama", "llama"):  # a family's name, and its model type
        CohereConfig(num_hidden_layers=8).save_pretrained(name)
        assert call(monkeypatch, capsys, name) == [ROWS["Llama"]]
        for path in (f"./{name}", f"{name}/", str(tmp_path / name)):
            assert call(monkeypatch, capsys, path)[0]["family"] == "cohere (not tested)"


def test_a_folder_of_no_family_says_so(monkeypatch, capsys, tmp_path):
    CohereConfig(num_hidden_layers=8).save_pretrained(tmp_path)
    (row,) = call(monkeypatch, capsys, str(tmp_path))
    assert tuple(row) == COLUMNS and row["family"] == "cohere (not tested)" and row["vLLM"] == "unknown"
    assert row["tapped"] == "checked when loaded" and "EAGLE-3" in row["drafts"]


def test_neither_a_family_nor_a_folder_is_refused(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        call(monkeypatch, capsys, str(tmp_path / "nothing"))
    assert "`target`" in capsys.readouterr().err
