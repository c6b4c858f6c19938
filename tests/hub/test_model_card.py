import json
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

from hf_eagle.hub.card_facts import CardFacts, measured_in, with_measured
from hf_eagle.hub.licenses import license_of
from hf_eagle.hub.model_card import facts_of_card, render_model_card
from hf_eagle.serving.commands import serve_commands


MEASURED = {
    "acceptance_length": 1.4750644883920895,
    "accepted_per_position": [785, 238, 82],
    "drafts": 2326,
    "generated_tokens": 3431,
    "tokens_per_second": 47.23,
    "target_only_tokens_per_second": 39.91,
    "identical_to_target": True,
    "num_prompts": 40,
    "num_speculative_tokens": 3,
    "dtype": "float32",
    "device": "cpu",
}


STATISTICS = {
    "conversations": 2000,
    "tokens": 300_000,
    "supervised_share": 0.625,
    "length": {"median": 151.0, "max": 512},
    "duplicates": 3,
    "coverage": {"4096": 0.951, "49152": 1.0},
    "overlap": {"mt_bench.jsonl": {"prompts": 160, "prompts_found": 2, "conversations_found": 5}},
}


def draft_folder(tmp_path, norm_output=False):
    config = {
        "draft_vocab_size": 8,
        "vocab_size": 1024,
        "norm_output": norm_output,
        "eagle_aux_hidden_state_layer_ids": [2, 15, 27],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"lm_head.weight": np.zeros((8, 4), np.float32), "fc.weight": np.zeros((4, 12), np.float32)}
    tensors |= {"d2t": np.zeros(8, np.int64), "t2d": np.zeros(1024, bool)}
    save_file(tensors, tmp_path / "model.safetensors")
    for plot in ("training.png", "history.png", "acceptance.png", "sweep.png"):
        (tmp_path / plot).write_bytes(b"a picture")
    return tmp_path


def full_facts() -> CardFacts:
    return CardFacts(
        name="Tiny-EAGLE3",
        target="org/Tiny-Instruct",
        draft="me/Tiny-EAGLE3",
        license="apache-2.0",
        datasets=["org/chats"],
        data=["2,000 prompts answered by the target", "chats, MIT"],
        data_statistics=STATISTICS,
        acceptance={"MT-Bench, first turns": MEASURED | {"plot": "acceptance.png"}},
        training={"optimizer steps": 1200, "minutes": 12.5},
        hyperparameters={"learning_rate": 2e-3, "bf16": True},
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        training_plot="training.png",
        history_plot="history.png",
        sweep_plot="sweep.png",
    )


def test_yaml_header_is_read_back_as_the_hub_reads_it(tmp_path):
    card = ModelCard.load(render_model_card(draft_folder(tmp_path), full_facts()))
    data = card.data.to_dict()
    assert data["base_model"] == "org/Tiny-Instruct" and data["base_model_relation"] == "finetune"
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "transformers",
        "text-generation",
        "apache-2.0",
    )
    assert data["datasets"] == ["org/chats"]
    assert {"speculative-decoding", "eagle3", "draft-model", "vllm", "sglang"} == set(data["tags"])

    (result,) = card.data.eval_results
    assert card.data.model_name == "Tiny-EAGLE3"
    assert (result.metric_type, result.metric_value) == ("acceptance_length", 1.4751)
    assert (result.dataset_type, result.dataset_name) == ("mt-bench", "MT-Bench, first turns")


def test_body_tells_every_fact(tmp_path):
    text = render_model_card(draft_folder(tmp_path), full_facts()).read_text()
    assert "| MT-Bench, first turns (40) | greedy, K=3 | **1.475** | 785, 238, 82 | 2,326 |" in text
    assert "47.2 tokens/s with the draft, 39.9 without it" in text and "float32 on cpu" in text
    assert "the same, token for token" in text
    assert "of 80 parameters" in text  # 8 * 4 + 4 * 12; the mapping is no parameter
    assert "layers 2, 15, 27" in text and "8 of the target's 1,024 tokens" in text
    assert "![Loss and teacher-forced accuracy during training](training.png)" in text
    for plot in ("acceptance", "sweep", "history"):
        assert f"({plot}.png)" in text
    assert "* 2,000 prompts answered by the target\n* chats, MIT\n" in text
    assert "| optimizer steps | 1200 |\n| minutes | 12.5 |" in text
    assert "| `learning_rate` | `0.002` |" in text
    assert "torch 2.13.0, transformers 5.23.0." in text
    assert "2503.01840" in text
    assert "{{" not in text and "{%" not in text and "None" not in text and "\n\n\n" not in text


def test_trees_and_draws_are_named(tmp_path):
    facts = full_facts()
    tree = {"method": "tree", "depth": 5, "top_k": 8, "total_tokens": 40, "num_speculative_tokens": 5}
    facts.acceptance = {"a": {**MEASURED, **tree, "temperature": 0.0}, "b": {**MEASURED, "temperature": 0.7}}
    card = ModelCard.load(render_model_card(draft_folder(tmp_path), facts))
    assert "| a (40) | greedy, tree of 40 tokens, depth 5 | **1.475** |" in card.text
    assert "| b (40) | temperature 0.7, K=3 | **1.475** |" in card.text
    names = {result.metric_name for result in card.data.eval_results}
    assert names == {
        "Acceptance length (greedy, tree of 40 tokens, depth 5)",
        "Acceptance length (temperature 0.7, K=3)",
    }


def test_commands_are_valid_json_and_shell(tmp_path):
    text = render_model_card(draft_folder(tmp_path), full_facts()).read_text()
    config = json.loads(re.search(r"--speculative-config '(.*)'", text)[1])
    assert config == {"method": "eagle3", "model": "me/Tiny-EAGLE3", "num_speculative_tokens": 3}
    assert "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4" in text
    assert "--model 'a folder/x'" in serve_commands("a folder/x", "d", 5)["vLLM"]
    assert "--speculative-num-draft-tokens 6" in serve_commands("t", "d", 5)["SGLang"]


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"min_pixels": 784, "max_pixels": 50176}, {"min_pixels": 784, "max_pixels": 50176}),
        ({"max_pixels": 50176, "fps": 1.0, "max_frames": 8}, {"max_pixels": 50176}),
        ({"fps": 1.0}, None),
        ({}, None),
    ],
)
def test_limits_of_media_are_served_as_they_were_trained(limits, told, tmp_path):
    facts = full_facts()
    facts.hyperparameters = {**limits, "learning_rate": 0.1}
    text = render_model_card(draft_folder(tmp_path), facts).read_text()
    given = re.search(r"--mm-processor-kwargs '(.*)'", text)
    assert (None if given is None else json.loads(given[1])) == told
    assert ("were shown to the target with" in text) == bool(limits)
    assert all(f"`{name}` {value}" in text for name, value in limits.items()) and "\n\n\n" not in text
    assert facts_of_card(tmp_path).media_limits == limits


def test_what_was_not_measured_is_left_out(tmp_path):
    card = ModelCard.load(render_model_card(tmp_path, {"name": "Bare", "target": str(tmp_path)}))
    data = card.data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "datasets", "model-index"} & set(data)
    assert not re.search(r"\d+\.\d{2,}", card.text.replace("2503.01840", ""))  # no number at all
    for word in ("Measured acceptance", "## Training", "![", "Versions", "None", "parameters", "token for token"):
        assert word not in card.text
    assert "## Serve it" in card.text and "## Limits" in card.text


def test_partial_measurements_drop_only_their_own_lines(tmp_path):
    measured = MEASURED | {"target_only_tokens_per_second": None, "identical_to_target": None}
    nothing = MEASURED | {"acceptance_length": None, "drafts": 0, "accepted_per_position": [0, 0, 0]}
    facts = CardFacts(name="X", target="org/t", acceptance={"first": measured, "second": nothing})
    card = ModelCard.load(render_model_card(draft_folder(tmp_path), facts))
    assert "| first (40) |" in card.text and "second" not in card.text
    assert "tokens/s" not in card.text and "token for token" not in card.text
    assert [result.dataset_name for result in card.data.eval_results] == ["first"]


def test_an_output_that_differed_is_not_called_the_same(tmp_path):
    facts = CardFacts(name="X", target="org/t", acceptance={"p": MEASURED | {"identical_to_target": False}})
    assert "token for token" not in render_model_card(draft_folder(tmp_path), facts).read_text()


@pytest.mark.parametrize("norm_output, name", [(True, "An EAGLE-3.1 draft"), (False, "An EAGLE-3 draft")])
def test_the_algorithm_is_read_from_the_checkpoint(tmp_path, norm_output, name):
    assert name in render_model_card(draft_folder(tmp_path, norm_output), full_facts()).read_text()


def test_unknown_facts_and_missing_plots_are_refused_and_keep_the_old_card(tmp_path):
    draft_folder(tmp_path)
    before = render_model_card(tmp_path, full_facts()).read_text()
    with pytest.raises(ValueError, match="`facts` holds licence, which no card shows; it takes: name, target"):
        render_model_card(tmp_path, {"name": "X", "target": "t", "licence": "mit"})
    with pytest.raises(ValueError, match="`training_plot` is 'no.png', but .* has no such file"):
        render_model_card(tmp_path, {"name": "X", "target": "t", "training_plot": "no.png"})
    with pytest.raises(ValueError, match=r"`acceptance\['p'\]\['plot'\]` is 'no.png'"):
        render_model_card(tmp_path, {"name": "X", "target": "t", "acceptance": {"p": MEASURED | {"plot": "no.png"}}})
    assert (tmp_path / "README.md").read_text() == before


def test_the_card_of_an_eagle1_draft(tmp_path):
    from tiny import tiny_eagle1_pair

    tiny_eagle1_pair()[1].save_pretrained(tmp_path)
    card = ModelCard.load(render_model_card(tmp_path, CardFacts(name="X", target="org/t", draft="me/d")))
    assert "An EAGLE-1/2 draft" in card.text and "2401.15077" in card.text and "2503.01840" not in card.text
    assert '"method": "eagle", "model": "me/d"' in card.text and "--speculative-algorithm EAGLE " in card.text
    assert "None" not in card.text and "layers" not in card.text and "{%" not in card.text
    tags = card.data.to_dict()["tags"]
    assert "eagle" in tags and "eagle3" not in tags


@pytest.mark.parametrize("length", [None, 3, 7])
def test_commands_draft_what_the_draft_proposes_by_default(tmp_path, length):
    facts = CardFacts(name="X", target="org/t", chain_length=length)
    text = render_model_card(draft_folder(tmp_path), facts).read_text()
    assert f'"num_speculative_tokens": {length or 3}' in text
    # what was measured goes before
    facts = CardFacts(name="X", target="org/t", chain_length=5, acceptance={"p": MEASURED})
    text = render_model_card(tmp_path, facts).read_text()
    assert f'"num_speculative_tokens": {MEASURED["num_speculative_tokens"]}' in text


@pytest.mark.parametrize("layers, told", [(1, "a one-layer model"), (2, "a small model")])
def test_a_draft_of_several_layers_is_not_called_one_layer(tmp_path, layers, told):
    file = draft_folder(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": layers}))
    assert told in render_model_card(tmp_path, CardFacts(name="X", target="org/t")).read_text()


def test_the_card_of_a_kind_that_no_server_is_known_to_run(tmp_path):
    facts = full_facts()
    facts.kind, facts.title = "block", "Block"
    card = ModelCard.load(render_model_card(draft_folder(tmp_path), facts))
    assert "A Block draft for [org/Tiny-Instruct](https://huggingface.co/org/Tiny-Instruct): a small model" in card.text
    assert "No server is known to run a draft of its kind" in card.text
    for word in ("## Serve it", "vllm", "sglang", "```", "## Citation", "EAGLE-3 ", "None", "{%", "\n\n\n"):
        assert word not in card.text
    assert "## Measured acceptance" in card.text and "## Training" in card.text and "## Limits" in card.text
    assert set(card.data.to_dict()["tags"]) == {"block", "speculative-decoding", "draft-model"}
    assert facts_of_card(tmp_path).kind == "block"

    bare = render_model_card(tmp_path, CardFacts(name="X", target="org/t", kind="block")).read_text()
    assert "A block draft for" in bare and "\n\n\n" not in bare


def test_a_card_that_is_told_the_kind_is_the_same(tmp_path):
    told = CardFacts(**{**vars(full_facts()), "kind": "eagle3", "title": "EAGLE-3"})
    alone = render_model_card(draft_folder(tmp_path, norm_output=True), full_facts()).read_text()
    assert render_model_card(tmp_path, told).read_text() == alone


def test_what_the_data_hold(tmp_path):
    card = render_model_card(draft_folder(tmp_path), full_facts()).read_text()
    assert "2,000 conversations, 300,000 tokens, 62.5% of them supervised. A conversation has 151 tokens" in card
    assert "512 at most; 3 repeat an earlier one." in card
    assert "| 4,096 | 95.10% |\n| 49,152 | 100.00% |" in card
    assert (
        "Of the 160 prompts in mt_bench.jsonl, 2 occur in the data (13 words in a row, or all of a prompt of 7 to 12 "
        "words; a still shorter prompt only if it is the whole message; in scripts without spaces 20 Chinese "
        "characters, 26 kana or 40 letters count as 13 words)." in card
    )
    bare = render_model_card(tmp_path, CardFacts(name="Tiny", target="org/Tiny")).read_text()
    assert "draft vocabulary |" not in bare and "repeat an earlier" not in bare
    # what a run counts of its own data is a part of it, and of packed rows a smaller one
    part = {name: STATISTICS[name] for name in ("conversations", "tokens", "supervised_share", "length")}
    card = render_model_card(tmp_path, CardFacts(name="Tiny", target="org/Tiny", data_statistics=part)).read_text()
    assert "has 151 tokens in the\nmedian and 512 at most.\n" in card and "draft vocabulary |" not in card
    del part["length"]
    card = render_model_card(tmp_path, CardFacts(name="Tiny", target="org/Tiny", data_statistics=part)).read_text()
    assert "300,000 tokens, 62.5% of them supervised.\n" in card and "median" not in card and "\n\n\n" not in card


def test_every_measurement_in_the_folder_is_a_result(tmp_path):
    draft_folder(tmp_path)
    humaneval = MEASURED | {"acceptance_length": 2.125, "accepted_per_position": [9, 5, 4], "drafts": 16}
    for name, found in (
        ("acceptance", MEASURED | {"prompts": "mt_bench.jsonl"}),
        ("acceptance_code", humaneval | {"prompts": "human_eval.jsonl.gz", "num_prompts": 7}),
        ("acceptance_code_tree", humaneval | {"prompts": "human_eval.jsonl.gz", "temperature": 0.5}),
        ("acceptance_notes", {"written": "by hand"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    card = ModelCard.load(render_model_card(tmp_path, CardFacts(name="X", target="org/t", **measured_in(tmp_path))))
    results = [(r.dataset_name, r.dataset_type, r.metric_value) for r in card.data.eval_results]
    assert sorted(results) == [
        ("human_eval", "human_eval", 2.125),
        ("human_eval", "human_eval", 2.125),  # of one set in two ways
        ("mt_bench", "mt_bench", 1.4751),
    ]
    assert "| human_eval (7) | greedy, K=3 | **2.125** | 9, 5, 4 | 16 |" in card.text
    assert "| human_eval, acceptance_code_tree (40) | temperature 0.5, K=3 | **2.125** |" in card.text
    assert "| mt_bench (40) | greedy, K=3 | **1.475** | 785, 238, 82 | 2,326 |" in card.text
    # the picture that was drawn of one of them; the others have none
    assert card.text.count("share of drafts that kept") == 1
    assert "![mt_bench: share of drafts that kept their k-th token](acceptance.png)" in card.text


def bucket(above, up_to, length, drafts=40):
    """An entry of `acceptance_by_context`."""
    interval = None if length is None else [length - 0.1, length + 0.1]
    found = {"above": above, "up_to": up_to, "acceptance_length": length, "acceptance_length_interval": interval}
    return found | {"drafts": drafts, "num_prompts": 4, "accepted_per_position": [drafts // 2, drafts // 4]}


def test_acceptance_by_context_and_with_windows_is_shown_in_tables(tmp_path):
    folder = draft_folder(tmp_path)
    contexts = [bucket(0, 512, 1.9), bucket(512, 2048, 1.3), bucket(2048, None, None, drafts=0)]
    windows = [
        {"window": None, "acceptance_by_context": contexts},
        {"window": 512, "acceptance_by_context": [bucket(0, 512, 1.8), bucket(512, 2048, 1.6), contexts[2]]},
    ]
    found = MEASURED | {"prompts": "mt_bench.jsonl", "acceptance_by_context": contexts, "windows": windows}
    (folder / "acceptance.json").write_text(json.dumps(found))
    (folder / "acceptance_context.png").write_bytes(b"a picture")
    facts = CardFacts(name="X", target="org/t")
    for _ in range(2):  # a second time nothing is added
        facts = with_measured(facts, folder)
        text = render_model_card(folder, facts).read_text()
        assert "| 1 to 512 | 1.900 (1.800 to 2.000) | 50.0% | 25.0% | 40 | 4 |" in text
        assert text.count("| 513 to 2,048 |") == 1 and "| above 2,048 |" not in text
        assert "| no window | **1.900** (1.800 to 2.000) | 1.300 (1.200 to 1.400) | - |" in text
        assert "| window 512 | 1.800 (1.700 to 1.900) | **1.600** (1.500 to 1.700) | - |" in text
        assert text.count("](acceptance_context.png)") == 1

    (folder / "acceptance_context.png").unlink()
    with pytest.raises(ValueError, match=r"`acceptance\['mt_bench'\]\['context_plot'\]` is 'acceptance_context.png'"):
        render_model_card(folder, facts)
    (folder / "acceptance.json").write_text(json.dumps(found | {"acceptance_by_context": [{"above": 0}]}))
    with pytest.raises(ValueError, match="acceptance.json lacks .*acceptance_by_context|acceptance.json .*above"):
        with_measured(CardFacts(name="X", target="org/t"), folder)


def test_speed_in_a_server_is_told_where_it_was_measured(tmp_path):
    draft_folder(tmp_path)
    shared = {"batch_size": 1, "tokens_per_second": 40.0, "speedup": 1.0, "acceptance_length": None}
    entries = [{"num_speculative_tokens": 0, **shared}]
    entries += [{"num_speculative_tokens": 3, **shared, "tokens_per_second": 62.0, "speedup": 1.55}]
    entries[1]["acceptance_length"] = 1.9
    arguments = {"num_prompts": 16, "max_new_tokens": 64, "dtype": "bfloat16", "rounds": 5}
    found = {"prompts": "mt_bench.jsonl", "machine": "Linux, 2 cores", "entries": entries, "arguments": arguments}
    (tmp_path / "serving.json").write_text(json.dumps(found))
    text = render_model_card(tmp_path, CardFacts(name="X", target="org/t", **measured_in(tmp_path))).read_text()
    assert text.count("## Measured speed in vLLM") == 1 and "\n\n\n" not in text
    assert "mt_bench, 16 prompts, answers of at most 64 tokens, greedy, bfloat16, Linux, 2 cores. Medians of 5" in text
    assert "| 3 | 1.900 | 62.0 (1.55x) |\n\nbatch 1: fastest with K = 3, 1.55x.\n" in text
    (tmp_path / "serving.png").write_bytes(b"a picture")
    text = render_model_card(tmp_path, CardFacts(name="X", target="org/t", **measured_in(tmp_path))).read_text()
    assert "1.55x.\n\n![mt_bench: speed-up and speed against the number of drafted tokens](serving.png)\n" in text
    text = render_model_card(tmp_path, CardFacts(name="X", target="org/t")).read_text()
    assert "Measured speed" not in text


def test_a_published_card_serves_the_targets_repository(tmp_path):
    """The folder that training knew the target by is nothing to strangers; and another folder's name stays unread."""
    draft_folder(tmp_path)
    (tmp_path / "target").mkdir()
    facts = {"name": "X", "target": str(tmp_path / "target"), "base_model": "org/Tiny"}
    assert f"--model {tmp_path / 'target'}" in render_model_card(tmp_path, facts).read_text()
    text = render_model_card(tmp_path, {**facts, "draft": "me/draft"}).read_text()
    assert "--model org/Tiny " in text and "--model-path org/Tiny " in text and 'pretrained("org/Tiny"' in text
    assert str(tmp_path) not in text


class TestLicences:
    def card(self, folder, header):
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(f"---\n{header}\n---\n# A model\n")
        return str(folder)

    def test_of_a_card(self, tmp_path):
        assert license_of(self.card(tmp_path / "a", "license: mit\ntags: [x]")) == {"license": "mit"}
        other = "license: other\nlicense_name: modified-mit\nlicense_link: LICENSE"
        found = license_of(self.card(tmp_path / "b", other))
        assert found == {"license": "other", "license_name": "modified-mit", "license_link": "LICENSE"}
        data = ModelCard.load(render_model_card(draft_folder(tmp_path), {"name": "X", "target": "t", **found})).data
        assert (data.license, data.license_name, data.license_link) == ("other", "modified-mit", "LICENSE")

    def test_of_what_was_fetched(self, tmp_path):
        entries = {"target": {"license": "Apache-2.0"}, "p/train.jsonl": {"from": {"x": {"license": "MIT"}, "n": 3}}}
        (tmp_path / "sources.json").write_text(json.dumps(entries))
        (tmp_path / "target").mkdir()
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "train.jsonl").write_text("{}")
        (tmp_path / "p" / "other.jsonl").write_text("{}")
        assert license_of(str(tmp_path / "target")) == {"license": "Apache-2.0"}
        assert license_of(str(tmp_path / "p" / "train.jsonl"), "dataset") == {"license": "MIT"}
        assert license_of(str(tmp_path / "p" / "other.jsonl"), "dataset") == {}
        card = ModelCard.load(render_model_card(draft_folder(tmp_path), {"name": "X", "target": "t", "license": "MIT"}))
        assert card.data.license == "mit"  # as the Hub spells it

    @pytest.mark.parametrize("header", ["tags: [x]", "license: [", "license:"])
    def test_of_none(self, tmp_path, header):
        assert license_of(self.card(tmp_path / "a", header)) == {}
        assert license_of(str(tmp_path)) == {}
        assert license_of("nobody/no-such-model") == {}  # nothing in the cache, and no network in tests


def test_limits_that_a_diagnosis_found(tmp_path):
    """The vocabulary's limit and acceptance by context, where they were measured; a broken file is named."""
    folder = draft_folder(tmp_path)
    edges = {"above": 0, "up_to": 64, "acceptance_length_interval": None, "drafts": 40, "num_prompts": 8}
    buckets = [edges | {"acceptance_length": 2.25, "accepted_per_position": [30, 20]}]
    vocabulary = {"missing": 0.034, "missing_by_category": {"code": 0.05, "prose": 0.018}, "acceptance_length": 2.4}
    headline = {"acceptance_length": 2.25, "num_prompts": 8, "acceptance_by_context": buckets, "vocabulary": vocabulary}
    found = {"headline": headline, "causes": [], "tried": [], "prompts": "mt_bench.jsonl"}
    (folder / "diagnosis.json").write_text(json.dumps(found))
    (folder / "diagnosis.png").write_bytes(b"a picture")

    facts = with_measured(CardFacts(name="X", target="org/t"), folder)
    text = render_model_card(folder, facts).read_text()
    assert "## Limits of the draft" in text and "mt_bench, 8 prompts, greedy: acceptance length 2.250." in text
    assert "cannot propose 3.4% of the tokens" in text and "code 5.0%, prose 1.8%" in text
    assert "at most 2.400" in text and "| 1 to 64 | 2.250 | 75.0% | 50.0% | 40 | 8 |" in text
    assert "(diagnosis.png)" in text and "{{" not in text and "None" not in text
    assert with_measured(facts_of_card(folder), folder).diagnosis == facts.diagnosis

    # a draft of the whole vocabulary, and no context beyond a bucket
    short = {name: headline[name] for name in ("acceptance_length", "num_prompts")}
    (folder / "diagnosis.json").write_text(json.dumps(found | {"headline": short}))
    text = render_model_card(folder, with_measured(CardFacts(name="X", target="org/t"), folder)).read_text()
    assert "acceptance length 2.250." in text and "cannot propose" not in text and "By the length" not in text

    (folder / "diagnosis.json").write_text(json.dumps({"headline": {"acceptance_length": "high"}}))
    with pytest.raises(ValueError, match=r"diagnosis\.json"):
        measured_in(folder)
