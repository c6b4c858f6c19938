"""From records to the data set that is trained on."""

import json
import logging
import os

import pyarrow as pa
import pytest
from datasets import Dataset
from template_families import family_tokenizer
from tiny_tokenizer import (
    CHATML,
    LLAMA3,
    MARKED,
    MARKED_WIDELY,
    assistant,
    encode_conversation,
    supervised_texts,
    tiny_tokenizer,
    user,
)

from hf_eagle.data.conversations import MaskOptions, build_dataset, build_stream, load_records


RECORDS = [
    {"prompt": "hello", "completion": "how are you"},
    {"messages": [user("a"), assistant("b"), user("c")]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "the cat"}]},
]


def test_a_conversation_is_cut_at_max_length():
    tokenizer = tiny_tokenizer(CHATML)
    messages = [user("a"), assistant("the answer is four")]
    whole = encode_conversation(messages, tokenizer)
    (cut,) = build_dataset([{"messages": messages}], tokenizer, max_length=len(whole["input_ids"]) - 3)
    assert cut == {name: values[:-3] for name, values in whole.items()}
    assert sum(cut["loss_mask"]) == sum(whole["loss_mask"]) - 2  # the end of the turn, a token before it, a newline

    (unfinished,) = build_dataset([{"messages": messages, "finish_reason": ["length"]}], tokenizer)
    assert supervised_texts(tokenizer, *unfinished.values()) == ["the answer is four"]


def test_rows_equal_single_conversations(caplog):
    tokenizer = tiny_tokenizer(CHATML)
    with caplog.at_level(logging.INFO):
        dataset = build_dataset(RECORDS, tokenizer)
    assert dataset.column_names == ["input_ids", "loss_mask"]
    expected = [
        encode_conversation(messages, tokenizer)
        for messages in (
            [user("hello"), assistant("how are you")],
            [user("a"), assistant("b"), user("c")],
            [user("q"), assistant("the cat")],
        )
    ]
    assert list(dataset) == expected
    tokens = sum(len(row["input_ids"]) for row in expected)
    share = 100 * sum(sum(row["loss_mask"]) for row in expected) / tokens
    ours = [record.getMessage() for record in caplog.records if record.name == "hf_eagle.data.conversations"]
    assert ours[0].startswith("Tokenised in ") and ours[1:] == [
        f"3 conversations, {tokens} tokens, {share:.1f}% of them supervised"
    ]


def test_long_and_unanswered_conversations_are_counted(caplog):
    tokenizer = tiny_tokenizer(CHATML)
    long_answer = {"prompt": "a", "completion": "the cat " * 20}
    long_question = {"prompt": "the cat " * 40, "completion": "b"}
    with caplog.at_level(logging.WARNING):
        dataset = build_dataset([*RECORDS, long_answer, long_question, {"prompt": "x"}], tokenizer, max_length=40)
    cut, unanswered = [record.getMessage() for record in caplog.records[-2:]]
    assert "2 of 6 conversations are longer than `max_length`=40 tokens and were cut; 1 of those kept no" in cut
    assert unanswered == "1 of 6 conversations have no answer and were dropped."
    assert len(dataset) == 4 and len(dataset[3]["input_ids"]) == 40
    assert all(any(mask) for mask in dataset["loss_mask"])


@pytest.mark.parametrize("template", [CHATML, MARKED, MARKED_WIDELY])
@pytest.mark.parametrize("blank", ["", " ", "\n\n", "\t \n", "\u00a0", "\u3000\u2003"])
def test_answers_of_white_space_only_are_counted_and_not_supervised(template, blank, caplog):
    """Those of a conversation with others, and those that leave none; also when rows are read back from the cache."""
    tokenizer = tiny_tokenizer(template)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    chats = [
        [user("a"), assistant(blank), user("b"), assistant("the cat")],
        [user("a"), assistant(blank)],
        [user("a"), {**assistant(blank), "tool_calls": [call]}, user("b"), assistant("the cat")],
    ]
    records = Dataset.from_list([{"messages": json.dumps(messages)} for messages in chats])
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            rows = build_dataset(records, tokenizer)
        texts = [supervised_texts(tokenizer, row["input_ids"], row["loss_mask"]) for row in rows]
        assert len(texts) == 2 and texts[0] == ["the cat<|im_end|>"]
        assert "1 of 3 conversations have no answer and were dropped." in caplog.text
        assert "2 answers are empty or white space only, which is no answer: they are not supervised." in caplog.text


def test_finish_reason_reaches_the_mask():
    tokenizer = tiny_tokenizer(CHATML)
    row = build_dataset([{"messages": [user("a"), assistant("b c")], "finish_reason": ["length"]}], tokenizer)[0]
    assert supervised_texts(tokenizer, row["input_ids"], row["loss_mask"]) == ["b c"]


def write_chats(path, number):
    path.write_text("".join(json.dumps({"prompt": f"q {n}", "completion": f"a {n}"}) + "\n" for n in range(number)))
    return load_records(path)


def test_rows_do_not_depend_on_the_number_of_processes(tmp_path):
    records, tokenizer = write_chats(tmp_path / "chats.jsonl", 40), tiny_tokenizer(CHATML)
    one = build_dataset(records, tokenizer)
    assert list(build_dataset(Dataset.from_list(records.to_list()), tokenizer, num_proc=2)) == list(one)


def test_cache_is_hit_by_the_same_and_missed_by_anything_else(tmp_path, caplog, monkeypatch):
    """What is tokenised once is read back: by other objects, and for the same content only."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    records = write_chats(tmp_path / "chats.jsonl", 10)
    options = {"records": records, "tokenizer": tiny_tokenizer(CHATML), "max_length": 64}

    def read_back(**changed):
        caplog.clear()
        with caplog.at_level(logging.INFO, "hf_eagle.data.conversations"):
            build_dataset(**{**options, **changed})
        first = caplog.messages[0]
        assert first.startswith(("Read back from the cache", "Tokenised in"))
        return first.startswith("Read back")

    assert not read_back()
    assert read_back() and read_back(tokenizer=tiny_tokenizer(CHATML), records=load_records(tmp_path / "chats.jsonl"))
    other_end = tiny_tokenizer(CHATML)
    other_end.add_tokens("q ")
    changes = [
        {"tokenizer": tiny_tokenizer(LLAMA3)},
        {"tokenizer": tiny_tokenizer(CHATML + " ")},
        {"tokenizer": other_end},
        {"max_length": 30},
        {"options": MaskOptions(last_turn_only=True)},
        {"options": MaskOptions(thoughts=False)},
        {"options": MaskOptions(tool_calls=False)},
        {"template_kwargs": {"enable_thinking": False}},
        {"records": write_chats(tmp_path / "others.jsonl", 11)},
        {"skip_bad_records": True},
    ]
    for change in changes:
        assert not read_back(**change), change
        assert read_back(**change), change


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_the_cache_follows_content_not_time_or_place(kind, tmp_path, caplog, monkeypatch):
    """A file that is written anew with its old time and size is read anew; the same content elsewhere is not."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = tiny_tokenizer(CHATML)

    def read(path, answer):
        rows = Dataset.from_list([{"prompt": "one", "completion": answer}])
        if kind in ("json", "jsonl"):
            path.write_text(json.dumps([rows[0]]) if kind == "json" else json.dumps(rows[0]) + "\n")
        elif kind == "csv":
            path.write_text(f"prompt,completion\none,{answer}\n")
        elif kind == "parquet":
            rows.to_parquet(path)
        else:
            with pa.ipc.new_stream(path, rows.data.schema) as writer:
                writer.write_table(rows.data.table)
        os.utime(path, (10**9, 10**9))
        caplog.clear()
        with caplog.at_level(logging.INFO, "hf_eagle.data.conversations"):
            row = build_dataset(load_records(path), tokenizer)[0]
        return tokenizer.decode(row["input_ids"]), caplog.messages[0].startswith("Read back")

    first, again = read(tmp_path / f"a.{kind}", "red"), read(tmp_path / f"a.{kind}", "sun")
    assert "red" in first[0] and "sun" in again[0] and not first[1] and not again[1]
    assert read(tmp_path / f"b.{kind}", "red") == (first[0], True)


def test_options_tools_and_template_arguments_reach_the_rows():
    tokenizer = family_tokenizer("qwen3")
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    tool = {"type": "function", "function": {"name": "add", "description": "sums", "parameters": {}}}
    thinking = {"role": "assistant", "content": "four", "reasoning_content": "hm"}
    chat = [user("a"), {"role": "assistant", "content": "", "tool_calls": [call]}, user("b"), thinking]
    record = {"messages": chat, "tools": [tool]}

    def supervised(**kwargs):
        row = build_dataset([record], tokenizer, **kwargs)[0]
        assert "sums" in tokenizer.decode(row["input_ids"])
        return supervised_texts(tokenizer, row["input_ids"], row["loss_mask"])

    said = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    assert supervised() == [said, "<think>\nhm\n</think>\n\nfour<|im_end|>"]
    assert supervised(options=MaskOptions(thoughts=False)) == [said, "four<|im_end|>"]
    assert supervised(options=MaskOptions(tool_calls=False, last_turn_only=True)) == [
        "<think>\nhm\n</think>\n\nfour<|im_end|>"
    ]
    record = {"messages": [user("b"), assistant("four")], "tools": [tool]}
    assert supervised(template_kwargs={"enable_thinking": False}) == ["four<|im_end|>"]


def test_what_the_template_leaves_out_is_told(caplog):
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    answer = {"role": "assistant", "content": "four", "reasoning_content": "hm", "tool_calls": [call]}
    build_dataset([{"messages": [user("a"), answer]}], tiny_tokenizer(CHATML))
    assert "writes no thoughts: those in the records are left out" in caplog.text
    assert "writes no tool calls: they become JSON in the answers' text" in caplog.text


def test_a_stream_gives_the_rows_of_the_data_set(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [*({"prompt": f"q {n}", "completion": f"a {n}"} for n in range(150)), {"prompt": "x", "completion": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer(CHATML)
    stream = build_stream(load_records(path, streaming=True), tokenizer, max_length=64)
    assert (
        list(stream) == list(build_dataset(load_records(path), tokenizer, max_length=64)) and len(list(stream)) == 150
    )


@pytest.mark.parametrize(
    "records, message",
    [
        ([], "`records` is empty"),
        ([*RECORDS, {"messages": []}], "Record 3: the conversation is empty"),
        (
            Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": None}]),
            "Record 1: the conv",
        ),
        ([{"messages": [{"role": "narrator", "content": "x"}]}], "Record 0: message 0 has the unknown role 'narrator'"),
        (
            [{"prompt": "the cat"}],
            r"No conversation has a supervised token(?s:.)*Record 0 is '<.im_start.>user\\nthe cat",
        ),
        ([{"prompt": "a", "completion": ""}], "No conversation has a supervised token"),
        ([{"prompt": "a" * 99, "completion": "b"}], "or `max_length` cuts every one"),
    ],
)
def test_bad_records(records, message):
    with pytest.raises(ValueError, match=message):
        build_dataset(records, tiny_tokenizer(CHATML), max_length=40)


def test_bad_arguments_and_templates():
    with pytest.raises(ValueError, match="`max_length` must be at least 1 token, got 0"):
        build_dataset(RECORDS, tiny_tokenizer(CHATML), max_length=0)
    with pytest.raises(ValueError, match="has no chat template"):
        build_dataset(RECORDS, tiny_tokenizer(None))
    with pytest.raises(ValueError, match="marks no token as the assistant's"):
        build_dataset(RECORDS, tiny_tokenizer(MARKED.replace("== 'assistant'", "== 'bot'")))
