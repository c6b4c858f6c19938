"""Short runs: training beside the CPU's, decoding, and the tests."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar

from hf_eagle import EagleTrainer, EagleTrainingArguments
from hf_eagle.benchmark import measures
from hf_eagle.benchmark.shapes import Shapes
from hf_eagle.benchmark.workload import build_draft, random_target
from hf_eagle.data.packing import pack_dataset
from hf_eagle.decoding.generate import speculative_generate, target_generate

from .sizes import Sizes


ROOT = Path(__file__).resolve().parents[3]
# of training: arguments, and whether chats are packed
FORMS = {"padded": ({}, False), "packed": ({}, True), "packed, bfloat16": ({"bf16": True}, True)}
LONGEST = 128  # tokens of a chat
TESTS_SECONDS = 45
DECODINGS = {
    "chain": {"num_speculative_tokens": 3},
    "tree": {"method": "tree", "depth": 4, "top_k": 4, "total_tokens": 24},
}


# ---- training ----


def chats(shapes: Shapes, number: int) -> Dataset:
    """Chats of random tokens, with an answer in the second half."""
    lengths = torch.randint(LONGEST // 2, LONGEST, (number,)).tolist()
    ids = [torch.randint(3, shapes.vocab_size, (n,)).tolist() for n in lengths]
    masks = [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "loss_mask": masks})


def train(sizes: Sizes, device: torch.device, form: str, steps: int, callbacks=()) -> list[float]:
    """Train a small draft on a small random target; the loss of each step."""
    arguments, packed = FORMS[form]
    disable_progress_bar()
    torch.manual_seed(0)
    draft = build_draft(sizes.small, torch.device("cpu"))
    says = draft.draft_ids
    target = random_target(sizes.small, torch.float32, torch.device("cpu"), draft.config.tap_ids, says=says)
    data = chats(sizes.small, 32)
    target.to(device)

    with tempfile.TemporaryDirectory() as folder:
        args = EagleTrainingArguments(
            output_dir=folder,
            ttt_steps=sizes.steps,
            per_device_train_batch_size=2,
            max_steps=steps,
            learning_rate=1e-3,
            logging_steps=1 if not callbacks else steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            **arguments,
        )
        data = pack_dataset(data, 2 * LONGEST) if packed else data
        trainer = EagleTrainer(draft, args, target, train_dataset=data, callbacks=list(callbacks))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def training(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """The losses of a run in float32 on the device, and of the same one on the CPU."""
    for form in ("padded", "packed"):
        here, there = (train(sizes, place, form, sizes.run_steps) for place in (device, torch.device("cpu")))
        apart = max(abs(a - b) / abs(b) for a, b in zip(here, there, strict=True))
        found = {"first_loss": here[0], "last_loss": here[-1], "farthest_from_cpu": apart}
        yield {"what": form, **found, "curves": {"device": here, "CPU": there}}


# ---- decoding ----


def decoding(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """What a round costs: of the draft, of the target, and of all that is neither, which is the overhead."""
    shapes = sizes.target
    draft = build_draft(shapes, device).eval().to(torch.bfloat16)
    target = random_target(shapes, torch.bfloat16, device, draft.config.tap_ids)
    draft.attach(target)
    prompt = torch.randint(3, shapes.vocab_size, (1, 64), device=device)

    def alone(tokens: int) -> float:
        return measures.seconds(lambda: target_generate(target, prompt, max_new_tokens=tokens), device)

    few, many = sizes.new_tokens
    alone(few)
    yield {"what": "target alone", "token_ms": 1000 * (alone(many) - alone(few)) / (many - few)}

    for way, asked in DECODINGS.items():
        speculative_generate(target, draft, prompt, max_new_tokens=few, **asked)
        seconds, outputs = zip(*(_decoded(target, draft, prompt, n, asked, device) for n in (few, many)), strict=True)
        rounds = max(1, outputs[1].rounds - outputs[0].rounds)
        whole, drafting, verifying = (
            1000 * (x[1] - x[0]) / rounds
            for x in (seconds, [x.draft_seconds for x in outputs], [x.target_seconds for x in outputs])
        )
        found = {"round_ms": whole, "draft_ms": drafting, "target_ms": verifying}
        yield {"what": way, **found, "overhead_ms": whole - drafting - verifying, "rounds": outputs[1].rounds}


def _decoded(target, draft, prompt, tokens: int, asked: dict, device: torch.device):
    measures.drain(device)
    begun = time.perf_counter()
    output = speculative_generate(target, draft, prompt, max_new_tokens=tokens, **asked)
    return time.perf_counter() - begun, output


# ---- tests ----


def tests(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """How many of the tests pass here, and the names of those that do not."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # it ends by itself before the part is stopped, so that what has run is told
        options = ["-q", "-p", "no:cacheprovider", "-n", str(sizes.workers), f"--session-timeout={TESTS_SECONDS}"]
        command = [sys.executable, "-m", "pytest", *sizes.tests, *options, f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))

    ends = {"failed": [], "error": [], "skipped": []}
    for case in cases:
        for end, tag in zip(ends, ("failure", "error", "skipped"), strict=True):
            if case.find(tag) is not None:
                ends[end].append(f"{case.get('classname')}::{case.get('name')}")

    counts = {end: len(names) for end, names in ends.items()}
    yield {"what": "all", "passed": len(cases) - sum(counts.values()), **counts}
    for name in ends["failed"] + ends["error"]:
        yield {"what": name, "note": "did not pass"}
