"""From records to the data set that is trained on."""

import json
import logging

import pytest
from datasets import Dataset
from tiny_tokenizer import CHATML, LLAMA3, MARKED, assistant, supervised_texts, tiny_tokenizer, user

from hf_eagle.data.conversations import build_dataset, encode_conversation, load_records


RECORDS = [
    {"prompt": "hello", "completion": "how are you"},
    {"messages": [user("a"), assistant("b"), user("c")]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "the cat"}]},
]


def test_encode_conversation_cuts_at_max_length():
    tokenizer = tiny_tokenizer(CHATML)
    messages = [user("a"), assistant("the answer is four")]
    whole = encode_conversation(messages, tokenizer)
    cut = encode_conversation(messages, tokenizer, max_length=len(whole["input_ids"]) - 3)
    assert cut == {name: values[:-3] for name, values in whole.items()}
    assert sum(cut["loss_mask"]) == sum(whole["loss_mask"]) - 2  # the end of the turn, a token before it, a newline
    unfinished = encode_conversation(messages, tokenizer, finish_reason=["length"])
    assert supervised_texts(tokenizer, *unfinished.values()) == ["the answer is four"]
    with pytest.raises(ValueError, match="`messages` is empty"):
        encode_conversation([], tokenizer)


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
    warning = caplog.records[-1].getMessage()
    assert "2 of 6 conversations are longer than `max_length`=40 tokens and were cut; 1 of those kept no" in warning
    assert warning.endswith("as were 1 without any answer.")
    assert len(dataset) == 4 and len(dataset[3]["input_ids"]) == 40
    assert all(any(mask) for mask in dataset["loss_mask"])


def test_finish_reason_reaches_the_mask():
    tokenizer = tiny_tokenizer(CHATML)
    row = build_dataset([{"messages": [user("a"), assistant("b c")], "finish_reason": ["length"]}], tokenizer)[0]
    assert supervised_texts(tokenizer, row["input_ids"], row["loss_mask"]) == ["b c"]


def test_cache_and_processes(tmp_path):
    """Rows do not depend on the number of processes; what is tokenised once is read back."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q {n}", "completion": f"a {n}"}) + "\n" for n in range(40)))
    records = load_records(path)
    tokenizer = tiny_tokenizer(CHATML)
    one = build_dataset(records, tokenizer)
    two = build_dataset(records, tiny_tokenizer(CHATML))
    assert one.cache_files == two.cache_files and one.cache_files
    assert build_dataset(records, tiny_tokenizer(LLAMA3)).cache_files != one.cache_files
    assert build_dataset(records, tokenizer, max_length=30).cache_files != one.cache_files
    assert list(build_dataset(Dataset.from_list(records.to_list()), tokenizer, num_proc=2)) == list(one)


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
