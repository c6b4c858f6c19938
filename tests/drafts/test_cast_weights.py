"""Under autocast each weight of a product is cast once a batch: counted in steps of every form, and their gradients."""

from collections import Counter

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from hf_eagle.benchmark.shapes import Shapes
from hf_eagle.benchmark.workload import Step, build_draft, chat_batch
from hf_eagle.drafts.adapters import AdaptedDraft
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.cast_weights import CastWeights
from hf_eagle.drafts.eagle1.configuration import Eagle1Config
from hf_eagle.drafts.eagle1.training import FeatureObjective
from hf_eagle.drafts.training_base import HeadTeacher
from hf_eagle.drafts.unroll_plan import UnrollPlan
from hf_eagle.targets.features import TargetFeatures


LLAMA = Shapes(48, 112, 3, 1, 16, 200, 150, 8)
LATENT = Shapes(48, 112, 4, 4, 8, 200, 150, 8, 24, 40, 12, 4, 12)
ADAPTERS = {None: None, "layer": LoraConfig(r=4), "head": LoraConfig(r=4, target_modules=["lm_head", "q_proj"])}
LENGTH = 64


class Casts(TorchDispatchMode):
    """How often each parameter was cast."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
        self.of = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype:
            name = self.names.get(args[0].untyped_storage()._cdata)
            self.of.update([] if name is None else [name])
        return out


def step_of(sizes, checkpointing, adapter, loss, autocast=torch.bfloat16):
    """A step's draft and its loss, in training."""
    torch.manual_seed(0)
    draft = build_draft(sizes, torch.device("cpu"))
    if checkpointing:
        draft.gradient_checkpointing_enable()
    step = Step(draft, None, 4, autocast)
    step.training_step.training.objective.loss = loss
    if ADAPTERS[adapter] is not None:
        step.draft = AdaptedDraft(draft, ADAPTERS[adapter])
        step.draft.set_attn_implementation = draft.set_attn_implementation

    batch = step.planned(chat_batch(sizes, 1, LENGTH, 0.5, 1, torch.device("cpu")))
    step.run_target(batch)
    if loss != "ce":
        step.target.teacher.mass = torch.rand(len(step.target.teacher.probs))
    return step.draft, lambda: step.forward(batch)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize(
    ("sizes", "adapter", "loss"),
    [
        (LLAMA, None, "ce"),
        (LLAMA, None, "lk_alpha"),
        (LLAMA, None, "lk_lambda"),
        (LLAMA, "layer", "ce"),
        (LLAMA, "head", "lk_lambda"),
        (LATENT, None, "ce"),
        (LATENT, "layer", "lk_lambda"),
    ],
)
def test_each_weight_is_cast_once_a_batch(sizes, adapter, loss, checkpointing):
    draft, run = step_of(sizes, checkpointing, adapter, loss)
    with Casts(draft) as casts:
        run().backward()
    assert max(casts.of.values()) == 1, casts.of
    assert all(parameter.grad is not None for parameter in draft.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_each_weight_of_eagle1_is_cast_once_a_batch(checkpointing):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 112, "num_attention_heads": 3, "num_key_value_heads": 1}
    config, head = Eagle1Config(vocab_size=200, head_dim=16, **sizes), torch.randn(200, 48)
    draft = new_draft(config, torch.randn(200, 48), head_weight=head).train()
    if checkpointing:
        draft.gradient_checkpointing_enable()
    ids, features = torch.randint(0, 200, (1, LENGTH)), torch.randn(1, LENGTH, 48)
    plan = UnrollPlan.of({"input_ids": ids, "loss_mask": torch.ones_like(ids)}, 1)
    teacher = HeadTeacher(features[0, plan.supervised.positions], lambda hidden: hidden @ head.T, torch.float32)
    objective = FeatureObjective().bind(plan.supervised, teacher, torch.ones(1))
    with Casts(draft) as casts, torch.autocast("cpu", torch.bfloat16):
        draft(ids, TargetFeatures(taps=None, last_hidden=features), plan, objective).loss.backward()
    assert max(casts.of.values()) == 1, casts.of


@pytest.mark.parametrize("sizes", [LLAMA, LATENT], ids=["llama", "latent"])
def test_gradients_reach_the_weights_themselves(sizes):
    """Those of mixed precision are near those of float32, kept or made again, and in float32."""
    found = []
    for autocast, checkpointing in ((None, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        draft, run = step_of(sizes, checkpointing, None, "ce", autocast)
        run().backward()
        found.append({name: p.grad for name, p in draft.named_parameters() if p.requires_grad})

    exact, near, again = found
    for name, gradient in exact.items():
        assert near[name].dtype == torch.float32
        assert (near[name] - gradient).norm() < 0.03 * gradient.norm(), name
        torch.testing.assert_close(again[name], near[name], rtol=0.02, atol=1e-5)


def test_modules_are_as_before_behind_it():
    linear = torch.nn.Linear(3, 4)
    weight = linear.weight
    with torch.autocast("cpu", torch.bfloat16):
        casts = CastWeights(linear)
        with casts:
            assert linear.weight.dtype == torch.bfloat16
        inside = casts.around(lambda: linear.weight.dtype)
        assert (inside(), linear.weight) == (torch.bfloat16, weight)
    assert linear.weight is weight and list(linear.state_dict()) == ["weight", "bias"]
    with pytest.raises(ZeroDivisionError):
        casts.around(lambda: 1 / 0)()
    assert linear.weight is weight
    assert CastWeights(linear).around(lambda: linear.weight)() is weight
