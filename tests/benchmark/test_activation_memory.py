"""The bytes predicted for an unroll, compared with those of real steps."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workers import run_worker

from hf_eagle.benchmark.shapes import Shapes
from hf_eagle.benchmark.workload import Step, build_block_draft, build_draft, chat_batch
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.costs_base import RunShapes
from hf_eagle.drafts.eagle1.configuration import Eagle1Config
from hf_eagle.drafts.eagle1.training import FeatureObjective
from hf_eagle.drafts.training_base import HeadTeacher
from hf_eagle.drafts.unroll_plan import UnrollPlan
from hf_eagle.targets.features import TargetFeatures


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at one time, without those that were there before."""

    def __init__(self, known):
        super().__init__()
        self.known, self.live, self.peak = {x.untyped_storage()._cdata for x in known}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for x in (x for x in tree_leaves(output) if isinstance(x, torch.Tensor)):
            storage = x.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return output

    def forget(self, key, size):
        self.known.discard(key)
        self.live -= size


# half the width of SmolLM2, its proportions, and a latent draft of the same size
LLAMA = Shapes(288, 768, 9, 3, 32, 2000, 1500, 8)
LATENT = Shapes(288, 768, 8, 8, 32, 2000, 1500, 8, 96, 64, 24, 8, 24)
LENGTH = 768


def shapes_of_step(steps, share, autocast, checkpointing):
    half = autocast is not None
    return RunShapes(1, 1, LENGTH, steps, share, half, checkpointing, accelerator=False)


def costs_of(draft):
    return draft.kind.part("costs").costs_of(draft.config)


def peak_of(step, batch):
    """Of forward and backward of a draft that was given random features and distributions."""
    step.run_target(batch)
    features, teacher, draft = step.target.features, step.target.teacher, step.draft
    before = [*draft.parameters(), *draft.buffers(), features.taps, teacher.probs, teacher.argmax]
    with LiveBytes(before) as seen:
        step.forward(batch).backward()
    return seen.peak


def said_of(draft, shapes):
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    copies = 2 * trained if shapes.bf16 else 0
    return costs_of(draft).kept_by_unroll(shapes) + costs_of(draft).beside_unroll(shapes) + copies


@pytest.mark.parametrize(
    ("sizes", "checkpointing", "autocast", "share"),
    [
        (LLAMA, False, None, 1.0),
        (LLAMA, False, torch.bfloat16, 0.5),
        (LLAMA, True, torch.bfloat16, 1.0),
        (LATENT, False, torch.bfloat16, 1.0),
        (LATENT, True, None, 1.0),
    ],
)
def test_activations_are_those_of_a_real_step(sizes, checkpointing, autocast, share):
    """Forward and backward of the draft at their peak, counted tensor by tensor on a CPU."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    draft = build_draft(sizes, device)
    if checkpointing:
        draft.gradient_checkpointing_enable()
    step = Step(draft, None, 4, autocast)
    batch = chat_batch(sizes, 1, LENGTH, share, 1, device)
    said = said_of(draft, shapes_of_step(4, share, autocast, checkpointing))
    assert said == pytest.approx(peak_of(step, batch), rel=0.1)


@pytest.mark.parametrize("sizes", [LLAMA, LATENT], ids=["llama", "latent"])
def test_what_an_accelerators_attention_keeps(sizes, monkeypatch):
    """The uncompiled form of it keeps the same tensors on any device; PyTorch merely refuses its backward on a CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    torch.manual_seed(0)
    draft = build_draft(sizes, torch.device("cpu"))
    step = Step(draft, None, 4)
    step.attention = "flex_attention"
    batch = chat_batch(sizes, 1, 300, 1.0, 1, torch.device("cpu"))
    step.run_target(batch)
    weights, kept = {p.untyped_storage().data_ptr() for p in draft.parameters()}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step.forward(batch)
    said = costs_of(draft).kept_by_unroll(RunShapes(length=300, ttt_steps=4, bf16=False))
    assert said == pytest.approx(sum(kept.values()), rel=0.05)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_activations_of_eagle1_are_those_of_a_real_step(autocast):
    torch.manual_seed(0)
    sizes = {"hidden_size": 288, "intermediate_size": 768, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = Eagle1Config(vocab_size=2000, head_dim=32, **sizes)
    draft = new_draft(config, torch.randn(2000, 288), head_weight=torch.randn(2000, 288)).train()
    ids = torch.randint(0, 2000, (1, LENGTH))
    plan = UnrollPlan.of({"input_ids": ids, "loss_mask": torch.ones_like(ids)}, 1)
    features, dtype = torch.randn(1, LENGTH, 288), autocast or torch.float32
    head, rows = draft.lm_head.weight.to(dtype), plan.supervised
    teacher = HeadTeacher(features[0, rows.positions], lambda hidden: hidden.to(dtype) @ head.T, dtype)
    objective = FeatureObjective().bind(rows, teacher, torch.ones(1) / len(rows.rows))
    seen_by_draft = TargetFeatures(taps=None, last_hidden=features)
    known = [*draft.parameters(), *draft.buffers(), ids, features, head, teacher.hidden]
    with LiveBytes(known) as seen, torch.autocast("cpu", autocast, enabled=autocast is not None):
        draft(ids, seen_by_draft, plan, objective).loss.backward()
    assert said_of(draft, shapes_of_step(1, 1.0, autocast, False)) == pytest.approx(seen.peak, rel=0.15)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("window", "loss_window"), [(96, 200), (96, None), (None, 200)])
def test_activations_behind_a_window_and_of_a_run_of_rows_are_those_of_a_real_step(window, loss_window, autocast):
    torch.manual_seed(0)
    draft = build_draft(LLAMA, torch.device("cpu"), window=window)
    step = Step(draft, None, 4, autocast)
    step.training_step.training.loss_window = loss_window
    batch = step.planned(chat_batch(LLAMA, 1, LENGTH, 1.0, 1, torch.device("cpu")))
    shapes = replace(shapes_of_step(4, 1.0, autocast, False), loss_window=loss_window)
    assert said_of(draft, shapes) == pytest.approx(peak_of(step, batch), rel=0.1)


@pytest.mark.parametrize("loss", ["ce", "label", "dpace"])
@pytest.mark.parametrize(
    ("layers", "size", "anchors", "checkpointing", "autocast"),
    [
        (1, 8, 60, False, None),
        (1, 4, 60, False, None),
        (1, 16, 200, False, torch.bfloat16),  # slots share the distributions of tokens that several blocks predict
        (2, 8, 60, False, torch.bfloat16),
        (3, 8, 60, True, None),
        (3, 8, 60, True, torch.bfloat16),
    ],
)
def test_activations_of_blocks_are_those_of_a_real_step(layers, size, anchors, checkpointing, autocast, loss):
    torch.manual_seed(0)
    draft = build_block_draft(LLAMA, torch.device("cpu"), layers, size)
    if checkpointing:
        draft.activation_checkpointing_enable()
    step = Step(draft, None, 1, autocast, num_anchors=anchors)
    step.training_step.training.objective.loss = loss
    batch = chat_batch(LLAMA, 1, LENGTH, 0.999, 1, torch.device("cpu"))
    step.run_target(batch)
    trained = [p for p in draft.parameters() if p.requires_grad]
    for parameter in trained:  # as from the second step on: a run holds them all the time
        parameter.grad = torch.zeros_like(parameter)
    before = [*draft.parameters(), *draft.buffers(), step.target.features.taps, *(p.grad for p in trained)]
    with LiveBytes(before) as seen:
        step.forward(batch).backward()
    shapes = replace(shapes_of_step(1, 1.0, autocast, checkpointing), num_anchors=anchors, loss=loss)
    assert said_of(draft, shapes) == pytest.approx(seen.peak, rel=0.08)


def test_a_sharded_draft_holds_what_its_ranks_gather(tmp_path):
    """Forward and backward of a draft under FSDP2 on two ranks, where gradients are most, and where activations are."""
    run_worker(tmp_path, 2, worker="gathered_worker.py", lengths=[16, 768])
    for found in json.loads((tmp_path / "found.json").read_text()):
        assert found["said"] == pytest.approx(found["seen"], rel=0.07), found
