"""Data sets on a Hub, read through the real clients of it, against a server on this machine."""

import gzip
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forks import Forks
from local_hub import TOKEN, LocalHub


WORKER = Path(__file__).parents[1] / "hub_reading_worker.py"


def chat(question: str, answer="a") -> dict:
    return {"prompt": question, "completion": answer}


def jsonl(*questions: str) -> bytes:
    return "".join(json.dumps(chat(question)) + "\n" for question in questions).encode()


def parquet(*questions: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([chat(question) for question in questions]), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def read(hub, tmp_path_factory):
    """What the reader makes of a data set: its records and warnings, or the error."""
    folder = tmp_path_factory.mktemp("hub")
    wanted = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}
    wanted |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_DATASETS_OFFLINE"):
            patch.delenv(name, raising=False)
        for name, value in wanted.items():
            patch.setenv(name, value)
        worker = Forks(WORKER)

    def read(source, token="", offline=False, **options):
        output = folder / "found.json"
        output.unlink(missing_ok=True)
        worker.start(output, token, "yes" if offline else "", source, json.dumps(options))
        assert worker.wait() == 0
        return json.loads(output.read_text())

    yield read
    worker.close()


def asked(found: dict) -> list[str]:
    assert "error" not in found, found
    return [record["prompt"] for record in found["records"]]


FORMS = {
    "jsonl": lambda name, *questions: {f"{name}.jsonl": jsonl(*questions)},
    "parquet": lambda name, *questions: {f"data/{name}-00000-of-00001.parquet": parquet(*questions)},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_splits(hub, read, form, streaming):
    files = FORMS[form]("train", "one", "two") | FORMS[form]("test", "held out")
    hub.add_data("me/chats", {**files, "README.md": b"---\nlicense: mit\n---\n# Chats\n"})
    assert asked(read("me/chats", streaming=streaming)) == ["one", "two"]
    assert asked(read("me/chats:test", streaming=streaming)) == ["held out"]
    assert asked(read("me/chats", split="test", streaming=streaming)) == ["held out"]
    if form == "jsonl":
        assert (
            "The Hub data set me/chats has the splits train, test, but no 'dev'."
            in read("me/chats:dev", streaming=streaming)["error"]
        )
    assert asked(read("me/chats:train[:1]")) == ["one"]


@pytest.mark.parametrize("streaming", [False, True])
def test_no_types_are_inferred(hub, read, streaming):
    """A date, a number, an answer of another type, a list of parts and a field behind the first record."""
    lines = [
        {"messages": [{"role": "user", "content": "when"}, {"role": "assistant", "content": "2024-05-06"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "no"}]},
                {"role": "assistant", "content": 7},
            ]
        },
        {"prompt": "007", "completion": "NA", "more": {"b": 1, "a": None}},
    ]
    hub.add_data("me/types", {"train.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()})
    hub.add_data("me/cells", {"train.csv": b"prompt,completion\n007,NA\n2024-05-06,1.50\n"})
    found = read("me/types", streaming=streaming)["records"]
    assert [{name: record[name] for name in line} for record, line in zip(found, lines, strict=True)] == lines
    assert all(
        name in line or name == "record_origin" for record, line in zip(found, lines, strict=True) for name in record
    )
    cells = read("me/cells", streaming=streaming)["records"]
    assert [(cell["prompt"], cell["completion"]) for cell in cells] == [("007", "NA"), ("2024-05-06", "1.50")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending, written", [("jsonl", jsonl), ("parquet", parquet)])
def test_subsets(hub, read, ending, written, streaming):
    card = f"""---
configs:
- config_name: en
  data_files: en/*.{ending}
- config_name: de
  data_files:
  - {{split: train, path: de/a.{ending}}}
  - {{split: test, path: de/b.{ending}}}
---
"""
    said = {"en/x": "hello", "de/a": "hallo", "de/b": "pr\u00fcfung"}
    files = {f"{name}.{ending}": written(question) for name, question in said.items()}
    both = f"me/both-{ending}"
    hub.add_data(both, {"README.md": card.encode(), **files})
    assert asked(read(f"{both}:en:train", streaming=streaming)) == ["hello"]
    assert asked(read(f"{both}:de:", streaming=streaming)) == ["hallo"]
    assert asked(read(f"{both}:de:test", streaming=streaming)) == ["pr\u00fcfung"]
    for source in (both, f"{both}:train", f"{both}:fr:train"):
        error = read(source, streaming=streaming)["error"]
        assert error.endswith(f"name one of its subsets en, de, as {both}:en:train.") and "\n" not in error


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_private_one_takes_a_token(hub, read, form, streaming):
    hub.add_data(f"me/private-{form}-{streaming}", FORMS[form]("train", "secret"), private=True)
    source = f"me/private-{form}-{streaming}"
    assert asked(read(source, token=TOKEN, streaming=streaming)) == ["secret"]
    if streaming:  # nothing of it is here
        for token in ("", "hf_wrong"):
            error = read(source, token=token, streaming=streaming)["error"]
            assert f"{source} is neither a file nor a Hub data set that can be read" in error and "\n" not in error


@pytest.mark.parametrize(("form", "streaming"), [("jsonl", False), ("jsonl", True), ("parquet", False)])
def test_a_revision(hub, read, form, streaming):
    """A branch, a tag or a commit behind `@`, with a split or a subset behind it; nothing of another one is read."""
    source, card = f"me/versions-{form}", b"---\nconfigs:\n- config_name: en\n  data_files: en/*\n---\n"
    hub.add_data(source, FORMS[form]("train", "old") | FORMS[form]("test", "held out"))
    repo = hub.repos[f"datasets/{source}"]["branches"]
    repo["v1"] = repo["main"]
    files = {f"en/{name.rpartition('/')[2]}": content for name, content in FORMS[form]("train", "new").items()}
    hub.add_data(source, {**files, "README.md": card})
    hub.repos[f"datasets/{source}"]["branches"]["v1"] = repo["v1"]
    commit = repo["v1"]["sha"]

    assert asked(read(source, streaming=streaming)) == ["new"]
    assert asked(read(f"{source}@v1", streaming=streaming)) == ["old"]
    assert asked(read(f"{source}@{commit}:test", streaming=streaming)) == ["held out"]
    assert asked(read(f"{source}@main:en:train", streaming=streaming)) == ["new"]
    error = read(f"{source}@v9", streaming=streaming)["error"]
    assert f"{source}@v9 is neither a file nor a Hub data set that can be read" in error and "\n" not in error
    if not streaming:
        assert asked(read(f"{source}@{commit}", offline=True)) == ["old"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_compressed_texts_are_read_as_they_are(hub, read, ending, compression, streaming):
    """Nothing infers a type of them: `007` stays, and a field may change its type."""
    rows = [{"prompt": "007", "completion": "2024-05-06"}, {"prompt": "1.50", "completion": "NA"}]
    text = "prompt,completion\n007,2024-05-06\n1.50,NA\n"
    if ending != "csv":
        rows.append({"prompt": [{"role": "user", "content": 7}], "completion": 8, "late": {"b": None}})
        text = json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    compress = {"gz": gzip.compress, "zst": lambda content: pa.compress(content, "zstd", asbytes=True)}[compression]
    hub.add_data(f"me/small-{ending}-{compression}", {f"train.{ending}.{compression}": compress(text.encode())})
    found = read(f"me/small-{ending}-{compression}", streaming=streaming)["records"]
    assert [{name: record[name] for name in row} for record, row in zip(found, rows, strict=True)] == rows


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_one_is_one_sentence(read, streaming):
    error = read("me/none", streaming=streaming)["error"]
    assert "me/none is neither a file nor a Hub data set that can be read (split 'train'): " in error
    assert "doesn't exist on the Hub or cannot be accessed" in error and "\n" not in error


@pytest.mark.parametrize("form", FORMS)
def test_a_new_commit_is_read_anew_and_without_a_network_the_last_one(hub, read, form):
    source = f"me/changed-{form}"
    for question in ("old", "new"):
        hub.add_data(source, FORMS[form]("train", question) | FORMS[form]("test", "held out"))
        assert asked(read(source)) == [question]
    assert asked(read(source, offline=True)) == ["new"]
    assert "neither a file nor a Hub data set" in read("me/never-read", offline=True)["error"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_record_that_cannot_be_read_names_its_file(hub, read, streaming):
    hub.add_data("me/bad", {"train.jsonl": jsonl("one") + b"[1]\n" + jsonl("two")})
    assert re.search(r"Line 2 of .*train\.jsonl must be an object", read("me/bad", streaming=streaming)["error"])
    skipped = read("me/bad", streaming=streaming, skip_bad_records=True)
    assert asked(skipped) == ["one", "two"] and any("1 record cannot be read" in line for line in skipped["warnings"])


def test_a_large_stream_comes_in_pieces(hub, read):
    questions = [f"{n} {'x' * 2000}" for n in range(4000)]
    hub.add_data("me/large", {"train.jsonl": jsonl(*questions)})
    assert asked(read("me/large", streaming=True)) == questions
