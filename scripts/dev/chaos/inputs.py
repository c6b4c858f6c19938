"""What all trials share on the disk: a tiny target, chats that can be told apart, prompts, stored features."""

import json
import random
from pathlib import Path


MAX_LENGTH = {False: 64, True: 128}  # tokens of a padded and of a packed row, which holds two or three records
RECORDS = {False: 26, True: 70}  # in padded and in packed batches: two passes and a bit, with a last step that is short
_WORDS = "red green blue one two three four five six seven eight nine ten sun moon star tree bird fish stone".split()


def write_inputs(folder: Path) -> None:
    """Write all but the stored features; in a process of its own, since it computes with torch."""
    from tiny_files import write_tiny_target

    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_target(folder / "target")
    (folder / "prompts.txt").write_text("red green\nstone fish\nbird\n")
    for packing in RECORDS:
        write_chats(data_file(folder, packing), RECORDS[packing])


def data_file(folder: Path, packing: bool) -> Path:
    """The chats to train on."""
    return folder / ("packed.jsonl" if packing else "chats.jsonl")


def write_chats(path: Path, number: int) -> None:
    """Chats of one question and one answer; the question says the record's number."""
    rng = random.Random(number)
    with path.open("w") as file:
        for record in range(number):
            asked = " ".join([f"n{record}.", *rng.choices(_WORDS, k=rng.randint(1, 3))])
            answer = " ".join(rng.choices(_WORDS, k=rng.randint(2, 6)))
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def cut_data(path: Path, share: float) -> None:
    """End a file in the middle of a record, as a copy does that was broken off."""
    lines = path.read_bytes().splitlines(keepends=True)
    last = min(int(share * len(lines)), len(lines) - 1)
    path.write_bytes(b"".join(lines[:last]) + lines[last][: len(lines[last]) // 2])
