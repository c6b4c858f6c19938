"""What a draft is taught is what the target says: in every type of model, or the target is refused."""

import pytest
import torch
from tiny import VOCAB, pad_batch, random_chats, tiny_llama, tiny_pair
from tiny_families import CONFIGS, tiny_family
from tiny_model_types import FACTORS, MODEL_TYPES, tiny_model_type
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicInt8
from transformers import LlamaForCausalLM
from workers import run_worker

from hf_eagle import EagleTrainer, EagleTrainingArguments, FrozenTarget
from hf_eagle.arguments.groups import DraftArguments, TargetArguments
from hf_eagle.drafts.build import new_draft
from hf_eagle.targets.head import TargetHead
from hf_eagle.targets.teacher_check import check_teacher
from hf_eagle.training.parts import config_of_draft


IDS = torch.randint(3, VOCAB, (1, 14), generator=torch.Generator().manual_seed(0))


def own_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_the_teacher_is_the_model(name):
    """The distribution that training asks for, and the logits that decoding does; what follows a head shows."""
    model = tiny_model_type(name)
    target, own = FrozenTarget(model), own_logits(model, IDS)
    hidden = target(IDS).last_hidden
    taught = target.distribution(hidden[0], None)
    torch.testing.assert_close(taught.probs, own[0].float().softmax(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(target.logits(hidden), own, rtol=1e-4, atol=1e-4)

    given = [field for field in FACTORS if getattr(target.config, field, None) not in (None, 1)]
    with torch.no_grad():
        assert torch.allclose(target.parts.head(hidden), own, atol=1e-2) == (not given), given


# ---- a forward that does what nobody knows ----


class Changed(LlamaForCausalLM):
    """A Llama whose forward does something to its logits that its config does not tell of."""

    change = None

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = type(self).change(output.logits)
        return output


CHANGES = {
    "a factor": lambda logits: 1.02 * logits,
    "a soft cap": lambda logits: 10 * torch.tanh(logits / 10),
    "a bias": lambda logits: logits + 0.2 * torch.arange(logits.shape[-1]).remainder(2),
    "tokens that are never said": lambda logits: logits.index_fill(-1, torch.tensor([7, 8]), -torch.inf),
    "tokens that are hardly said": lambda logits: logits.index_fill(-1, torch.tensor([7]), -1e9),
}


def changed(change, dtype=torch.float32):
    model = Changed(tiny_llama().config).to(dtype).eval()
    model.load_state_dict(tiny_llama().state_dict())
    type(model).change = staticmethod(change)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHANGES)
def test_an_unknown_change_of_the_logits_is_refused(name, dtype):
    target = FrozenTarget(changed(CHANGES[name], dtype))
    with pytest.raises(
        ValueError, match="The target Changed returns other logits than its head: .* use another target"
    ):
        target(IDS)


def test_what_changes_no_distribution_is_taken():
    FrozenTarget(changed(lambda logits: logits - 3.0))(IDS)
    FrozenTarget(changed(lambda logits: logits.log_softmax(-1)))(IDS)


def test_a_target_of_nan_is_refused():
    model = tiny_llama()
    model.model.layers[3].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"`target` LlamaForCausalLM gives NaN .*: 1 of its .*\(model.layers.3.mlp.up_proj.weight\)"
    ):
        FrozenTarget(model)(IDS)


def test_it_is_refused_before_a_step_is_taken(tmp_path):
    from datasets import Dataset

    _, draft = tiny_pair()
    args = EagleTrainingArguments(str(tmp_path), report_to="none", max_steps=1)
    data = Dataset.from_list(random_chats(4))
    with pytest.raises(ValueError, match="returns other logits than its head"):
        EagleTrainer(model=draft, args=args, target=FrozenTarget(changed(CHANGES["a factor"])), train_dataset=data)


def test_a_model_is_compared_once():
    """Also by several targets of it, as `generate` makes one at every call."""
    model, calls = tiny_llama(), []
    model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        FrozenTarget(model)(IDS)
    assert len(calls) == 4


@pytest.mark.parametrize("sharding", ["fsdp2", "tensor"])
def test_all_ranks_of_a_spread_target_refuse(sharding, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    run_worker(tmp_path / "out", 2, worker="teacher_worker.py", model=str(tmp_path / "model"), sharding=sharding)
    told = [(tmp_path / "out" / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert all(text.count("returns other logits than its head") == 1 for text in told)
    assert all(text.endswith("sound: taken\n") for text in told)


# ---- heads that are no linear layer ----


class Int8Head(nn.Module):
    """Weights of eight bits and a factor a row; it has no `weight`."""

    def __init__(self, linear: nn.Linear, bias: bool = False):
        super().__init__()
        factor = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / factor).round().to(torch.int8))
        self.register_buffer("factor", factor)
        self.register_buffer("offset", torch.linspace(-1, 1, len(factor)) if bias else torch.zeros(len(factor)))

    def table(self):
        return self.packed.to(self.factor.dtype) * self.factor

    def forward(self, hidden):
        return hidden @ self.table().T + self.offset


class PackedWeight(Int8Head):
    """As bitsandbytes: `weight` is there, but of bytes."""

    def __init__(self, linear):
        super().__init__(linear)
        self.weight = nn.Parameter(self.packed.clone(), requires_grad=False)


class NormedHead(nn.Linear):
    """As Baichuan's: a plain weight, used in another way."""

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.table())

    def table(self):
        return 3 * nn.functional.normalize(self.weight)


def normed(linear):
    head = NormedHead(linear.in_features, linear.out_features, bias=False)
    head.load_state_dict(linear.state_dict())
    return head


HEADS = {
    "int8": Int8Head,
    "int8 with a bias": lambda linear: Int8Head(linear, bias=True),
    "bytes": PackedWeight,
    "normed": normed,
}


def with_head(make):
    model = tiny_llama()
    model.lm_head = make(model.lm_head)
    return model.eval()


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_no_linear_layer_teaches_what_it_says(name):
    model = with_head(HEADS[name])
    target, own = FrozenTarget(model), own_logits(model, IDS)[0]
    hidden = target(IDS).last_hidden[0]
    torch.testing.assert_close(target.logits(hidden), own)
    torch.testing.assert_close(target.distribution(hidden, None).probs, own.softmax(-1))

    ids = torch.tensor([3, 5, 40, 77])
    torch.testing.assert_close(target.distribution(hidden, ids).probs, own[:, ids].softmax(-1))
    known = target.distribution(hidden, ids, with_mass=True, head_summary=target.head_summary(hidden))
    torch.testing.assert_close(known.mass, own.softmax(-1)[:, ids].sum(-1))
    torch.testing.assert_close(target.head_weight(), model.lm_head.table())


def test_torchs_own_quantised_head_teaches_what_it_says():
    """Its `weight` is a method, and it rounds what comes in too."""
    plain = tiny_llama().lm_head

    def quantised(linear):
        linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
        return DynamicInt8.from_float(linear)

    model = with_head(quantised)
    target = FrozenTarget(model)
    hidden = target(IDS).last_hidden
    torch.testing.assert_close(target.teacher_head()(hidden), own_logits(model, IDS))
    torch.testing.assert_close(target.head_weight(), plain.weight.detach(), rtol=0, atol=0.01)


@pytest.mark.parametrize("method", ["eagle3", "eagle1", "dflash"])
def test_a_draft_is_trained_beside_a_quantised_head(method, tmp_path):
    from datasets import Dataset

    target = FrozenTarget(with_head(Int8Head))
    asked = {"dflash": {"mask_token_id": 1}}.get(method, {})
    config = config_of_draft(target.config, TargetArguments("t"), DraftArguments(method=method, **asked))
    draft = new_draft(config, target.embedding_weight(), head_weight=target.head_weight())
    args = EagleTrainingArguments(str(tmp_path), report_to="none", max_steps=1, disable_tqdm=True)
    data = Dataset.from_list(random_chats(4))
    trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=data)
    assert trainer.compute_loss(draft, pad_batch(random_chats(3))).isfinite()


def test_a_spread_head_must_be_linear():
    with pytest.raises(ValueError, match="head is a Int8Head.*`target_sharding` to none"):
        TargetHead(Int8Head(tiny_llama().lm_head), tiny_llama().config, sharded=True)


def test_a_quantised_embedding_is_not_lent():
    model = tiny_llama()
    table = model.model.embed_tokens
    table.weight = nn.Parameter((table.weight * 100).round().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="input embedding is a Embedding without a table of plain numbers"):
        FrozenTarget(model).embedding_weight()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plain_head_is_lent_as_it_is(name):
    target = FrozenTarget(tiny_family(name))
    assert target.head_weight() is target.model.get_output_embeddings().weight
    check_teacher(target)
