"""CSV as text, and tables with the types they have."""

import csv
import gzip
import io
import json
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
        (b"prompt,completion\nq,caf\xe9\n", "Line 2 of .*bad.csv is not UTF-8: byte 0xe9 at position 6"),
        (b'prompt,completion\nq,"a\n', "bad.csv cannot be read as CSV \\(line 2: unexpected end of data\\)"),
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


def of_bytes(kind, rows, path):
    """A table whose texts are bytes, as a file or a folder of its kind."""
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, path := path.with_suffix(".parquet"))
    elif kind == "arrow":
        with pa.ipc.new_stream(path := path.with_suffix(".arrow"), table.schema) as writer:
            writer.write_table(table)
    else:
        Dataset(table).save_to_disk(path)
    return path


KINDS_OF_TABLES = ["parquet", "arrow", "saved"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS_OF_TABLES)
def test_bytes_of_a_text_are_the_text(kind, streaming, tmp_path):
    """At any depth, of any alphabet, whichever form the chat has."""
    said = "Grün ist 緑 🌳"
    forms = {
        "texts": [{"prompt": said.encode(), "completion": said}],
        "messages": [{"messages": [{"role": r, "content": said.encode()} for r in ("user", "assistant")], "n": b"1"}],
        "text": [{"text": said.encode()}],
    }
    for form, rows in forms.items():
        path = of_bytes(kind, rows, tmp_path / form)
        (record,) = load_records(path, streaming=streaming)
        assert {message["content"] for message in to_messages(record)} == {said}, form


@pytest.mark.parametrize("kind", KINDS_OF_TABLES)
@pytest.mark.parametrize(
    "row, column",
    [
        ({"prompt": b"caf\xe9", "completion": b"a"}, "prompt"),
        ({"prompt": "q", "completion": b"\xff\xd8\xff\xe0"}, "completion"),
        ({"messages": [{"role": "user", "content": b"x\x80"}]}, "messages"),
        ({"instruction": "q", "output": "a", "system": b"\x80"}, "system"),
    ],
)
def test_bytes_that_are_no_text_are_named(kind, row, column, tmp_path):
    path = of_bytes(kind, [row], tmp_path / "some")
    with pytest.raises(ValueError, match=f"{path}: Record 0: the column `{column}` holds bytes that are not UTF"):
        load_records(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS_OF_TABLES)
def test_bytes_of_pictures_stay_pictures(kind, streaming, tmp_path):
    """As `datasets` writes them or alone, in a column or in a part, beside texts that are bytes."""
    held = io.BytesIO()
    Image.new("RGB", (3, 2), (250, 3, 7)).save(held, format="PNG")
    file = {"bytes": held.getvalue(), "path": "a.png"}
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    inside = [{"type": "image", "image": file}, {"type": "text", "text": "What?"}]
    rows = {
        "struct": {"messages": [user(parts), assistant([{"type": "text", "text": "Red."}])], "images": [file]},
        "alone": {"messages": [user(parts)], "images": [held.getvalue()], "hash": b"\xff\x00"},
        "part": {"messages": [user(inside)], "name": b"caf\xc3\xa9"},
    }
    for name, row in rows.items():
        (record,) = load_records(of_bytes(kind, [row], tmp_path / name), streaming=streaming, content_parts=True)
        _, media, _ = read_media_record(record, 0)
        (loaded,) = from_text(as_text(media))["image"]
        assert loaded.size == (3, 2) and loaded.convert("RGB").getpixel((2, 1)) == (250, 3, 7), name
    assert record["name"] == "café"


@pytest.mark.parametrize("mark", ["\t", ";", "|"])
def test_other_marks_between_cells_are_told(mark, tmp_path):
    """Whatever the cells hold; a header of one column that has no such mark is a table of one column."""
    path = tmp_path / "some.csv"
    path.write_text(mark.join(("prompt", "completion")) + "\n" + mark.join(("a, b", "c, d")) + "\n")
    with pytest.raises(ValueError, match="Line 1 of .*some.csv has no comma but 1 .*separate its cells by commas"):
        load_records(path)
    path.write_text(f"text\nwhat{mark}ever\n")
    assert read(path) == [[{"role": "text", "content": f"what{mark}ever"}]]


COMPRESS = {"gz": gzip.compress, "zst": lambda content: pa.compress(content, "zstd", asbytes=True)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_texts_are_read_as_they_are_without(ending, streaming, tmp_path):
    rows = [{"prompt": f"{n} {'word ' * 3000}", "completion": "007"} for n in range(300)]  # more than a chunk
    contents = {
        "a.jsonl": "\ufeff \n" + "".join(json.dumps(row) + "\n" for row in rows),
        "b.json": json.dumps(rows, indent=1),
        "c.csv": "prompt,completion\n" + "".join(f"{row['prompt']},007\n" for row in rows),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.{ending}").write_bytes(COMPRESS[ending](content.encode()))
        found = [to_messages(record) for record in load_records(tmp_path / f"{name}.{ending}", streaming=streaming)]
        assert found == [[user(row["prompt"]), assistant("007")] for row in rows], name
    assert len(list(load_records(tmp_path, streaming=streaming))) == 900


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize(
    "spoil", [lambda c: c[: len(c) // 2], lambda c: b"{}\n" + c, lambda c: c[:20] + b"xxxx" + c[24:]]
)
def test_a_compressed_file_that_is_broken_is_named(ending, spoil, tmp_path):
    content = "".join(json.dumps({"prompt": str(hash((n, 1))), "completion": "a"}) + "\n" for n in range(500))
    path = tmp_path / f"some.jsonl.{ending}"
    path.write_bytes(spoil(COMPRESS[ending](content.encode())))
    with pytest.raises(ValueError, match=f"{path}.* (cannot be read|is not)") as caught:
        load_records(path)
    assert "\n" not in str(caught.value)
