"""Training and decoding on a pretended device beside the same on the CPU; for `test_pretended_training.py`.

    pretended_training_worker.py SPEC.json      {"out": DIR, "forms": [NAME, ...], "decodings": [NAME, ...],
                                                 "broken": [NAME, ...]}

Leaves `results.json` in `out`: of each form of training how far its losses and gradients are from the CPU's, and what a
step asked the device for; of each way to decode whether it gives the CPU's tokens, and where a round waits; of each run
that breaks how it ends; of single operations what is recorded.
"""

import json
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch


torch.set_num_threads(1)
sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:3]]

from accelerate import PartialState  # noqa: E402
from ends_worker import breaking_trainer  # noqa: E402
from plain_varlen import plain_varlen  # noqa: E402
from pretended_device import NAME, PretendedTensor, pretend, recorded  # noqa: E402
from pretended_forms import FORMS, NARROWEST, ONE_KERNEL, ROWS, STEPS  # noqa: E402
from tiny import pad_batch, random_chats, tiny_eagle1_pair, tiny_pair  # noqa: E402
from tiny_blocks import tiny_block_pair  # noqa: E402
from tiny_mla import tiny_mla_pair  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from transformers.trainer_utils import IntervalStrategy  # noqa: E402

import hf_eagle.drafts.flex_context  # noqa: E402
import hf_eagle.targets.head  # noqa: E402
from hf_eagle import EagleTrainer, EagleTrainingArguments  # noqa: E402
from hf_eagle.decoding.generate import speculative_generate  # noqa: E402
from hf_eagle.targets import document_kernels  # noqa: E402


def dense_flex(query, key, value, ids, blocks, scaling, options):
    """What `flex_attention` computes, which does not compile for a device in Python."""
    rows, row_documents, keys, key_documents, *first_keys = ids
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1, output_size=query.shape[1]) for x in (key, value))
    seen = (row_documents[:, None] == key_documents) & (keys <= rows[:, None])
    seen = seen & (keys >= first_keys[0][:, None]) if first_keys else seen

    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    scores = ((query @ key.transpose(-1, -2)).float() * scaling).masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp().to(value.dtype) @ value).transpose(0, 1), lse.transpose(0, 1)


# ---- one run ----


class Watched(TrainerCallback):
    """Keeps the gradients of the first step, and what is asked of the device in the steps behind it."""

    def __init__(self, trainer, record):
        self.trainer, self.record = trainer, record
        self.gradients, self.kept, self.batches = {}, None, 0
        self._part_of("before the target", trainer, "compute_loss")
        self._part_of("within", trainer.step, "target_features")
        self._part_of("within", trainer.accelerator, "backward")

    def _part_of(self, part: str, owner, name: str):
        """From the beginning of this method on; behind its end is behind the backward pass."""
        method = getattr(owner, name)

        def watched(*args, **kwargs):
            self._enter(part)
            result = method(*args, **kwargs)
            if name == "backward":
                self._enter("between")
                self.batches += 1
            return result

        setattr(owner, name, watched)

    def _enter(self, part: str):
        if self.record is not None:
            self.record.part = part

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            named = self.trainer.model.named_parameters()
            self.gradients = {name: here(p.grad).clone() for name, p in named if p.grad is not None}

    def on_step_end(self, args, state, control, **kwargs):
        if self.record is None:
            return
        if state.global_step == 1:
            self.record.waits, self.record.operations, self.record.casts = Counter(), Counter(), 0
            self.batches = 0
        if state.global_step == state.max_steps:
            asked = (dict(self.record.waits), sum(self.record.operations.values()), self.record.casts)
            self.kept = (self.batches, *asked)


def get_device() -> None:
    """From now on this process has the device, on which drafts can be trained and decode."""
    pretend()
    hf_eagle.drafts.flex_context._kernel = lambda device_type: dense_flex
    hf_eagle.drafts.flex_context._NARROWEST = NARROWEST
    document_kernels._varlen, document_kernels._HALF = (lambda: plain_varlen), (torch.float32,)
    # a head of pretended tensors is one of plain numbers
    hf_eagle.targets.head.DTensor = (hf_eagle.targets.head.DTensor, PretendedTensor)


def take_device(device: str) -> None:
    """Let trainers run there from now on."""
    state = PartialState(cpu=True)
    state.device = torch.device(device)

    def set_up(args: EagleTrainingArguments) -> torch.device:
        args.distributed_state, args._n_gpu = state, 1
        return state.device

    EagleTrainingArguments._setup_devices = property(set_up)


def here(x: torch.Tensor) -> torch.Tensor:
    return x.held if isinstance(x, PretendedTensor) else x


def trained(form: str, folder: Path, device: str) -> dict:
    """The losses, the first gradients and what the steps asked for, on one device."""
    make, fields = FORMS[form]
    folder.mkdir(parents=True)
    parts = make(folder)
    (target, draft), data = parts.pop("pair"), parts.pop("data")

    fields = {"per_device_train_batch_size": ROWS, "max_steps": STEPS, "logging_steps": STEPS, **fields}
    fields |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    take_device(device)
    document_kernels._WITH_VARLEN = (NAME,) if form in ONE_KERNEL else ()
    args = EagleTrainingArguments(output_dir=str(folder / "run"), learning_rate=1e-3, **fields)
    args.dataloader_pin_memory = device != "cpu"  # `use_cpu` has set it to false

    trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=data, **parts)
    torch.manual_seed(3)
    with nullcontext() if device == "cpu" else recorded() as record:
        watched = Watched(trainer, record)
        trainer.add_callback(watched)
        trainer.train()

    places = {p.device.type for p in (*trainer.model.parameters(), *target.model.parameters())}
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    return {"places": places, "losses": losses, "gradients": watched.gradients, "kept": watched.kept}


def compared(form: str, folder: Path) -> dict:
    """A form on the device beside the same on the CPU."""
    wanted, found = (trained(form, folder / device, device) for device in ("cpu", f"{NAME}:0"))
    assert wanted["gradients"].keys() == found["gradients"].keys() and found["places"] == {NAME}

    def apart(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x - y).norm() / y.norm().clamp_min(1e-12))

    batches, waits, operations, casts = found["kept"]
    return {
        "loss": apart(torch.tensor(found["losses"]), torch.tensor(wanted["losses"])),
        "gradients": {name: apart(x, wanted["gradients"][name]) for name, x in found["gradients"].items()},
        "waits": sorted([count / batches, *where] for where, count in waits.items()),
        "operations": operations / batches,
        "casts": casts / batches,
    }


# ---- runs that break ----

BROKEN = {
    "the next batch": ("loss", 1, {}),
    "the next batch, accumulated": ("loss", 1, {"gradient_accumulation_steps": 2, "num_train_epochs": 3}),
    "a log": ("loss", 1, {"logging_steps": 2}),
    "a save": ("loss", 1, {"save_strategy": "steps", "save_steps": 2}),
    "an evaluation": ("loss", 1, {"eval_steps": 2}),
    "the end": ("loss", 3, {}),
    "the next but one, a gradient": ("gradient", 1, {}),
    "a log, a gradient": ("gradient", 1, {"logging_steps": 2}),
}


def broken(name: str, folder: Path) -> dict:
    """What is said of a number that is none, after which step, and which records are left."""
    what, step, fields = BROKEN[name]
    fields = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 100, "save_strategy": "no", **fields}
    take_device(f"{NAME}:0")
    trainer = breaking_trainer({"out": str(folder), "args": fields, "break": {"what": what, "step": step}})
    if "eval_steps" in fields:
        trainer.eval_dataset, trainer.args.eval_strategy = trainer.train_dataset, IntervalStrategy.STEPS
    try:
        trainer.train()
        said = "nothing"
    except FloatingPointError as problem:
        said = str(problem)

    left = {path.name: len(path.read_text().splitlines()) for path in (folder / "run").glob("broken-*.jsonl")}
    kept = sorted(path.name for path in (folder / "run").glob("*") if path.name not in left)
    return {"said": said, "steps": trainer.state.global_step, "left": left, "kept": kept}


# ---- decoding ----

DECODINGS = {
    "chain": {"num_speculative_tokens": 3},
    "tree": {"method": "tree", "depth": 3, "top_k": 3, "total_tokens": 8},
    "chains, a batch": {"rows": 3},
    "trees, a batch": {"rows": 3, "method": "tree", "depth": 3, "top_k": 2, "total_tokens": 6},
    "chain, sampled": {"temperature": 0.8, "top_p": 0.9, "sampling_top_k": 20},
    "trees, a batch, sampled": {"rows": 3, "method": "tree", "depth": 2, "top_k": 2, "total_tokens": 4}
    | {"temperature": 1.0},
    "EAGLE-1, chain": {"make": tiny_eagle1_pair},
    "latent attention, tree": {"make": tiny_mla_pair, "method": "tree", "depth": 3, "top_k": 2, "total_tokens": 6},
    "DFlash, chain": {"make": tiny_block_pair, "num_speculative_tokens": 4},
    "DFlash, chains, a batch": {"make": tiny_block_pair, "rows": 3, "num_speculative_tokens": 4},
    "DFlash, chain, sampled": {"make": tiny_block_pair, "num_speculative_tokens": 4, "temperature": 0.8},
}


def decoded(name: str) -> dict:
    """A way to decode, on the device beside the same on the CPU."""
    asked = dict(DECODINGS[name])
    make, rows, answers = asked.pop("make", tiny_pair), asked.pop("rows", 1), []
    batch = pad_batch(random_chats(rows, seed=5), side="left")

    for device in ("cpu", NAME):
        target, draft = make()
        draft.attach(target.to(device))
        draft.to(device).eval()
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        torch.manual_seed(7)
        with nullcontext() if device == "cpu" else recorded() as record:
            output = speculative_generate(target, draft, **inputs, max_new_tokens=12, **asked)
        answers.append(output.answers)

    waits = sorted([count, *where[1:]] for where, count in record.waits.items())
    return {"same": answers[0] == answers[1], "rounds": output.rounds, "waits": waits}


# ---- single operations ----


def operations() -> dict[str, list]:
    """Operation -> what is recorded of it: waits, operations and casts."""
    x, ids, mask, here = (
        torch.arange(4.0).to(NAME),
        torch.tensor([0, 1, 1], device=NAME),
        torch.tensor([True, False, True, False], device=NAME),
        torch.arange(4.0),
    )
    asked = {
        "item": lambda: x[1].item(),
        "bool": lambda: bool(x[1] > 0),
        "float": lambda: float(x[1]),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "copied to the host": lambda: torch.empty(4).copy_(x),
        "copied from the host": lambda: x.clone().copy_(here),
        "sent": lambda: here.to(NAME),
        "sent without waiting": lambda: here.to(NAME, non_blocking=True),
        "fetched without waiting": lambda: x.to("cpu", non_blocking=True),
        "made of a list": lambda: torch.tensor([1.0], device=NAME),
        "nonzero": lambda: mask.nonzero(),
        "where": lambda: torch.where(mask),
        "mask as an index": lambda: x[mask],
        "values put at a mask": lambda: x.clone().index_put_((mask,), x[:2]),
        "places as an index": lambda: x[ids],
        "places on the host": lambda: x[torch.tensor([0, 1])],
        "masked_select": lambda: x.masked_select(mask),
        "masked_fill": lambda: x.masked_fill(mask, 0),
        "unique": lambda: ids.unique(),
        "unique_consecutive": lambda: ids.unique_consecutive(),
        "bincount": lambda: ids.bincount(),
        "repeat_interleave": lambda: x[:3].repeat_interleave(ids),
        "repeat_interleave of a known size": lambda: x[:3].repeat_interleave(ids, output_size=2),
        "equal": lambda: torch.equal(x, x),
        "a cast": lambda: x.to(torch.bfloat16),
        "a view": lambda: x.view(2, 2),
        "a product": lambda: x @ x,
        "an event": lambda: torch.get_device_module(NAME).Event().synchronize(),
    }
    found = {}
    for name, operation in asked.items():
        with recorded() as record:
            operation()
        found[name] = [sum(record.waits.values()), sum(record.operations.values()), record.casts]
    return found


def main():
    spec = json.loads(Path(sys.argv[1]).read_text())
    out = Path(spec["out"])
    get_device()
    found = {"operations": operations(), "forms": {}}
    found["broken"] = {name: broken(name, out / name) for name in spec["broken"]}
    found["decodings"] = {name: decoded(name) for name in spec["decodings"]}
    for number, form in enumerate(spec["forms"]):
        found["forms"][form] = compared(form, out / str(number))
    (out / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
