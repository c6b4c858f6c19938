"""Public mixtures in the columns in which they are published, one record each, written by hand."""

import json
import re
from datetime import datetime, timezone
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_tokenizer import assistant, system, user

from hf_eagle.data.forms import recognise_form
from hf_eagle.data.records import load_records, to_messages
from hf_eagle.evaluation.prompts import load_prompts


PAGE = Path(__file__).resolve().parents[2] / "hf_eagle" / "docs" / "data_forms.md"
QA = [user("q"), assistant("a")]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
WHEN = datetime(2023, 4, 9, 0, 2, 53, tzinfo=timezone.utc)
WILD = {"country": "Canada", "hashed_ip": "22fd", "header": {"accept-language": "en", "user-agent": "Mozilla"}}
WILD |= {"language": "English", "redacted": False, "state": None, "timestamp": WHEN, "toxic": False}
FLAGS = [{"categories": {"hate/threatening": False}, "category_scores": {"hate/threatening": 0.1}, "flagged": False}]
MIXTURES = {
    "mlabonne/open-perfectblend": ({"conversations": SHAREGPT, "source": "meta-math/MetaMathQA"}, "sharegpt", QA),
    "HuggingFaceH4/ultrachat_200k": ({"prompt": "q", "prompt_id": "f0e3", "messages": QA}, "messages", QA),
    "stingning/ultrachat": (
        {"id": "0", "data": ["q", "a", "and?", "b"]},
        "sharegpt",
        [*QA, user("and?"), assistant("b")],
    ),
    "anon8231489123/ShareGPT_Vicuna_unfiltered": ({"id": "QWJhYvA_0", "conversations": SHAREGPT}, "sharegpt", QA),
    "teknium/OpenHermes-2.5": (
        {
            **{"custom_instruction": None, "topic": None, "model_name": None, "model": None, "skip_prompt": None},
            **{"category": "orca", "views": None, "language": None, "id": None, "title": None, "idx": None},
            **{"conversations": [dict(turn, weight=None) for turn in SHAREGPT], "source": "airoboros2.2"},
            **{"system_prompt": "Be brief.", "avatarUrl": None, "hash": None},
        },
        "sharegpt",
        [system("Be brief."), *QA],
    ),
    "nvidia/Llama-Nemotron-Post-Training-Dataset": (
        {
            **{"input": [user("q")], "output": "a", "category": "chat", "license": "cc-by-4.0", "reasoning": "on"},
            **{"generator": "DeepSeek-R1", "used_in_training": "Ultra", "version": "v1.1"},
            **{"system_prompt": "detailed thinking on"},
        },
        "prompt_completion",
        [system("detailed thinking on"), *QA],
    ),
    "nvidia/Nemotron-Post-Training-Dataset-v1": (
        {
            **{"uuid": "5f5e", "license": "cc-by-4.0", "generator": "Qwen3", "version": "v1", "category": "chat"},
            **{"reasoning": "off", "messages": [{**turn, "tool_calls": []} for turn in QA], "metadata": "{}"},
        },
        "messages",
        QA,
    ),
    "Magpie-Align/Magpie-Llama-3.1-Pro-300K-Filtered": (
        {
            **{"uuid": "b1a2", "model": "llama", "gen_input_configs": {"temperature": 1.0, "top_p": 1.0}},
            **{"instruction": "q", "response": "a", "conversations": SHAREGPT, "task_category": "Math"},
            **{"difficulty": "easy", "llama_guard_2": "safe", "instruct_reward": -3.5},
        },
        "sharegpt",
        QA,
    ),
    "allenai/tulu-3-sft-mixture": (
        {"id": "oasst1_1", "messages": QA, "source": "ai2-adapt-dev"},
        "messages",
        QA,
    ),
    "HuggingFaceTB/smoltalk": ({"messages": QA, "source": "smol-magpie-ultra"}, "messages", QA),
    "allenai/WildChat-1M": (
        {
            **{"conversation_hash": "cf19", "model": "gpt-4", "timestamp": WHEN, "turn": 1, "language": "English"},
            "conversation": [{**turn, **WILD, "turn_identifier": 100} for turn in QA],
            **{"openai_moderation": FLAGS, "detoxify_moderation": [{"insult": 0.1}], "toxic": False, "redacted": False},
            **{"state": None, "country": "Canada", "hashed_ip": "22fd", "header": WILD["header"]},
        },
        "sharegpt",
        QA,
    ),
    "lmsys/lmsys-chat-1m": (
        {
            **{"conversation_id": "33f0", "model": "vicuna-33b", "conversation": QA, "turn": 1, "language": "English"},
            **{"openai_moderation": FLAGS, "redacted": False},
        },
        "sharegpt",
        QA,
    ),
    "Open-Orca/OpenOrca": (
        {"id": "niv.242684", "system_prompt": "", "question": "q", "response": "a"},
        "prompt_completion",
        QA,
    ),
    "Open-Orca/SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "s", "weight": None},
                {"from": "human", "value": "q", "weight": 0.0},
                {"from": "gpt", "value": "a", "weight": 1.0},
            ]
        },
        "sharegpt",
        [system("s"), *QA],
    ),
    "tatsu-lab/alpaca": ({"instruction": "q", "input": "", "output": "a", "text": "Below is ..."}, "alpaca", QA),
    "databricks/databricks-dolly-15k": (
        {"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"},
        "alpaca",
        [user("q\nc"), assistant("a")],
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {
            **{"prompt": "q", "prompt_id": "7b4f", "chosen": QA, "rejected": [user("q"), assistant("no")]},
            **{"messages": QA, "score_chosen": 9.0, "score_rejected": 2.0},
        },
        "preference",
        QA,
    ),
    "openai/gsm8k": ({"question": "q", "answer": "a"}, "prompt_completion", QA),
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_mixture_is_read_as_it_is_published(name, ending, tmp_path):
    record, form, messages = MIXTURES[name]
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        Dataset.from_list([record]).to_parquet(path)
    else:
        path.write_text(json.dumps(record, default=str) + "\n")
    [read] = load_records(path)
    assert recognise_form(read) == form
    assert to_messages(read) == messages


@pytest.mark.parametrize("name", MIXTURES)
def test_its_prompts_wait_for_an_answer(name, tmp_path):
    record, _, messages = MIXTURES[name]
    (tmp_path / "prompts.jsonl").write_text(json.dumps(record, default=str) + "\n")
    [prompt] = load_prompts(tmp_path / "prompts.jsonl")
    assert prompt.messages == messages[:-1]


def test_all_of_them_are_one_source_of_data(tmp_path):
    """Their columns have different types and come together as text."""
    for number, (record, _, _) in enumerate(MIXTURES.values()):
        (tmp_path / f"{number:02}.jsonl").write_text(json.dumps(record, default=str) + "\n")
    assert [to_messages(record) for record in load_records(tmp_path)] == [row[2] for row in MIXTURES.values()]


def test_the_page_has_each_of_them_with_its_form_and_its_columns():
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| [")]
    links = {re.search(r"huggingface\.co/datasets/([^)]+)\)", row[0])[1]: row for row in rows}
    assert list(links) == list(MIXTURES)
    for name, (record, form, _) in MIXTURES.items():
        _, _, columns, written = links[name]
        assert written == f"`{form}` |", name
        assert set(re.findall(r"`(\w+)`", columns)) <= set(record), name


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"data": '["q", "a"]'}, QA),  # UltraChat again, as tables carry it
        ({"input": "q", "output": "a"}, QA),
        ({"input": "q", "output": "a", "system": "s", "system_prompt": "t"}, [system("s"), *QA]),
        ({"messages": [system("s"), *QA], "system_prompt": "t"}, [system("s"), *QA]),
        ({"data": [{"x": 1}], "messages": QA}, QA),
        ({"data": ["x"], "conversations": SHAREGPT}, QA),
    ],
)
def test_neighbours_of_these_forms(record, messages):
    assert to_messages(record) == messages


@pytest.mark.parametrize("record", [{"data": "x"}, {"data": 3}, {"data": []}, {"data": [1, 2]}, {"input": "q"}])
def test_columns_of_such_names_alone_say_nothing(record):
    with pytest.raises(ValueError, match="no conversation in the columns"):
        to_messages(record)
