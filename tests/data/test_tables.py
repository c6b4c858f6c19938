"""CSV as text, and tables with the types they have."""

import csv
from datetime import date, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import TEXTS
from PIL import Image
from tiny_tokenizer import assistant, user

from hf_eagle.data.media import as_text, from_text, read_media_record
from hf_eagle.data.records import load_records, to_messages
from hf_eagle.data.tables import read_texts


def read(path):
    return [to_messages(record) for record in load_records(path)]


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(TEXTS.filter(str.strip), TEXTS), min_size=1, max_size=5))
def test_cells_are_texts(rows, tmp_path_factory):
    """Words for nothing, numbers, dates, line ends and quotes inside: all are what they look like."""
    path = tmp_path_factory.getbasetemp() / "any.csv"
    with path.open("w", newline="", encoding="utf-8-sig" if len(rows) % 2 else "utf-8") as file:
        csv.writer(file).writerows([("prompt", "completion"), *rows])
    rows = [[user(q)] + ([assistant(a)] if a else []) for q, a in rows]
    assert read(path) == rows


def test_an_empty_cell_and_a_missing_one_are_absent(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text("instruction,input,output\nWho?,007,James\nSay hello.,,Hello.\n\nAnd?\n")
    assert read(path) == [
        [user("Who?\n007"), assistant("James")],
        [user("Say hello."), assistant("Hello.")],
        [user("And?")],
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"prompt,completion\nq,a,b\n", "Line 2 of .*bad.csv has 3 cells for 2 columns"),
        (b"prompt,prompt\nq,a\n", "Line 1 of .*bad.csv names a column twice"),
        (b"prompt,completion\nq,caf\xe9\n", "Line 2 of .*bad.csv is not UTF-8: byte 0xe9 at place 6"),
        (b'prompt,completion\nq,"a\n', "bad.csv cannot be read as csv: line 2: unexpected end of data"),
        (b"", "bad.csv holds no record"),
    ],
)
def test_what_is_no_table_is_named(content, message, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_records(path)


def test_bad_rows_can_be_left_out(tmp_path):
    path, bad = tmp_path / "some.csv", []
    path.write_text('prompt,completion\nq,a,b\nr,b\ns,"c\n')
    assert [number for number, _ in read_texts(path, bad.append)] == [1]
    assert len(bad) == 2


def test_cells_of_tables_are_written_as_json_has_them(tmp_path):
    """Integers stay whole beside nulls, dates and decimals are written out, objects keep their own keys."""
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "completion": pa.array([7, None], pa.int64()),
            "more": pa.array([{"day": date(2024, 5, 6), "x": None}, {"day": None, "x": Decimal("1.50")}]),
            "at": pa.array([datetime(2024, 5, 6, 7), None]),
        }
    )
    pq.write_table(table, tmp_path / "some.parquet")
    with pa.ipc.new_file(tmp_path / "some.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("some.parquet", "some.arrow"):
        first, second = load_records(tmp_path / name)
        assert (
            first["completion"] == 7 and first["more"] == {"day": "2024-05-06"} and first["at"] == "2024-05-06 07:00:00"
        )
        assert second["more"] == {"x": "1.50"} and to_messages(second) == [user("b")]
        assert to_messages(first) == [user("a"), assistant("7")]
        texts = [text for _, text in read_texts(tmp_path / name)]
        assert '"completion": 7' in texts[0] and "completion" not in texts[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_in_tables_survive(streaming, tmp_path):
    """Pictures of `datasets`, beside a chat of text in another file, alone and in a mixture."""
    picture = Image.new("RGB", (3, 2), (250, 3, 7))
    said = assistant([{"type": "text", "text": "Red."}])
    chat = [user([{"type": "image", "text": None}, {"type": "text", "text": "What?"}]), said]
    Dataset.from_list([{"messages": chat, "images": [picture]}]).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    for sources in (tmp_path, [tmp_path / "a.jsonl", tmp_path / "b.parquet"]):
        records = list(load_records(sources, streaming=streaming))
        record = next(record for record in records if "images" in record and record["images"])
        messages, media, _ = read_media_record(record, 0)
        assert messages == [user([{"type": "image"}, {"type": "text", "text": "What?"}]), assistant("Red.")]
        (loaded,) = from_text(as_text(media))["image"]
        assert loaded.size == (3, 2) and loaded.getpixel((2, 1)) == (250, 3, 7)
