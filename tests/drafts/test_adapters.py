"""LoRA on a draft: it is the draft that its merged weights make, in loss, gradients, decoding and in the folder."""

import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from test_callbacks import PROMPTS, measure_folder
from tiny import VOCAB, pad_batch, random_chats, tiny_eagle1_pair, tiny_pair
from tiny_blocks import tiny_block_pair
from tiny_mla import tiny_mla_pair
from tiny_tokenizer import word_tokenizer

from hf_eagle import AcceptanceLengthCallback, AdaptedDraft, EagleTrainer, EagleTrainingArguments, load_draft
from hf_eagle.arguments.groups import AdapterArguments
from hf_eagle.drafts.adapters import head_operands
from hf_eagle.drafts.dflash.plan import BlockPlan
from hf_eagle.drafts.training_base import Draw
from hf_eagle.drafts.unroll_plan import UnrollPlan
from hf_eagle.training.checkpoints import why_incomplete


EVERYWHERE = {"target_modules": "all-linear"}
WITH_HEAD = {"target_modules": ["fc", "q_proj", "v_proj", "down_proj", "lm_head"], "modules_to_save": ["norm"]}
LATENT = {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "fc"]}
HEAD_WHOLE = {"target_modules": ["q_proj", "gate_proj"], "modules_to_save": ["lm_head"]}


def lora(**fields):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})


def stir(adapted, seed=5):
    """Give every trained tensor a value that does something: LoRA's B begins at zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


def make_trainer(tmp_path, pair, peft_config=None, **fields):
    target, draft = pair
    known = {"per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 3, "logging_steps": 1}
    if draft.kind.name == "eagle3":
        known["ttt_steps"] = 3
    known |= {"learning_rate": 2e-2, "lr_scheduler_type": "constant"}
    args = EagleTrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=True, **known | fields)
    data = Dataset.from_list(random_chats(16, seed=1))
    return EagleTrainer(draft, args, target, peft_config=peft_config, train_dataset=data, eval_dataset=data)


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


# ---- the same function ----


def loss_and_gradients(trainer):
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, pad_batch(random_chats(4, seed=3)))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("make_pair", "where", "fields"),
    [
        (tiny_pair, EVERYWHERE, {}),
        (tiny_pair, WITH_HEAD, {}),
        (tiny_pair, WITH_HEAD, {"loss": "lk_lambda"}),
        (tiny_pair, WITH_HEAD, {"gradient_checkpointing": True}),
        (tiny_pair, HEAD_WHOLE, {"loss": "lk_alpha"}),
        (tiny_mla_pair, LATENT, {}),
        (tiny_eagle1_pair, EVERYWHERE, {"feature_noise": "none"}),
        (tiny_block_pair, EVERYWHERE, {}),
        (tiny_block_pair, EVERYWHERE, {"gradient_checkpointing": True, "loss": "label"}),
    ],
)
def test_loss_and_gradients_are_those_of_the_merged_draft(make_pair, where, fields, tmp_path):
    """By the chain rule: where `W = base + s B A`, `dA = s B^T dW` and `dB = s dW A^T`."""
    adapted = make_trainer(tmp_path / "adapted", make_pair(), lora(**where), **fields)
    stir(adapted.model)
    _, merged = make_pair()
    merged.load_state_dict(adapted.model.merged_state_dict())
    plain = make_trainer(tmp_path / "plain", (make_pair()[0], merged), **fields)
    loss, gradients = loss_and_gradients(adapted)
    wanted_loss, of_merged = loss_and_gradients(plain)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)

    seen = 0
    for name, layer in adapted.model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        d_weight, scale = of_merged[f"{name}.weight"], layer.scaling["default"]
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert scale == 1.5 and up.any()
        torch.testing.assert_close(down.grad, scale * up.T @ d_weight, rtol=2e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(up.grad, scale * d_weight @ down.T, rtol=2e-4, atol=1e-6, msg=name)
        seen += 2
    for name, gradient in gradients.items():
        if ".modules_to_save.default" in name:
            own = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            torch.testing.assert_close(gradient, of_merged[own], rtol=2e-4, atol=1e-6, msg=name)
            seen += 1
    assert seen == len(gradients) and all(g is not None and g.any() for g in gradients.values())


def plan_of(draft, batch):
    """A plan for a draft of any kind."""
    if draft.kind.name == "dflash":
        return BlockPlan.of(batch, draft.config.block_size, 9, Draw())
    steps = 1 if draft.kind.name == "eagle1" else 3
    return UnrollPlan.of_rows(batch["input_ids"], num_steps=steps, attention_mask=batch["attention_mask"])


@pytest.mark.parametrize("make_pair", [tiny_pair, tiny_mla_pair, tiny_eagle1_pair, tiny_block_pair])
def test_the_saved_folder_is_the_adapted_draft(make_pair, tmp_path):
    """Its keys are a normal draft's, its logits the adapter's, and its weights those that PEFT itself merges."""
    target, draft = make_pair()
    draft.save_pretrained(tmp_path / "normal")
    where = {} if draft.kind.name == "eagle1" else {"modules_to_save": ["norm"]}
    adapted = stir(AdaptedDraft(draft, lora(**where))).eval()
    adapted.attach(target)
    before = copy.deepcopy(adapted.state_dict())
    adapted.save_pretrained(tmp_path / "merged")
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())

    normal, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("normal", "merged"))
    assert {n: (t.shape, t.dtype) for n, t in merged.items()} == {n: (t.shape, t.dtype) for n, t in normal.items()}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("normal", "merged")]
    assert configs[0] == configs[1]
    if draft.kind.name == "eagle3":
        assert torch.equal(merged["d2t"], normal["d2t"]) and torch.equal(merged["t2d"], normal["t2d"])
        assert not torch.equal(merged["norm.weight"], normal["norm.weight"])
    assert not torch.equal(merged["fc.weight"], normal["fc.weight"])

    served, batch = load_draft(tmp_path / "merged", target), pad_batch(random_chats(3, seed=2))
    seen = target(batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        plan = plan_of(draft, batch)
        hidden = [d(batch["input_ids"], seen, plan) for d in (adapted, served)]
        logits = [d.compute_logits(x.hidden_states) for d, x in zip((adapted, served), hidden, strict=True)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    by_peft = copy.deepcopy(adapted).merge_and_unload().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, by_peft[name], rtol=1e-6, atol=1e-6)


def test_a_half_precision_draft_is_rounded_once(tmp_path):
    _, draft = tiny_pair(40)
    adapted = stir(AdaptedDraft(draft.to(torch.bfloat16), lora()))
    fc = adapted.get_base_model().fc
    assert fc.lora_A["default"].weight.dtype == torch.float32
    wanted = fc.base_layer.weight.float() + fc.get_delta_weight("default")
    adapted.save_pretrained(tmp_path)
    assert torch.equal(load_draft(tmp_path).fc.weight, wanted.to(torch.bfloat16))


def test_dropout_inside_the_fused_head():
    _, draft = tiny_pair(40)
    adapted = stir(AdaptedDraft(draft, lora(target_modules=["lm_head"], lora_dropout=0.5)))
    head, hidden = adapted.get_base_model().lm_head, torch.randn(7, 32)
    torch.manual_seed(3)
    wanted = head(hidden)
    torch.manual_seed(3)
    x, weight = head_operands(head, hidden)
    torch.testing.assert_close(x @ weight.T, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(head.eval()(hidden), wanted)


# ---- training ----


def test_only_the_adapter_is_trained(tmp_path):
    base = tiny_pair(40)[1].state_dict()
    trainer = make_trainer(tmp_path, tiny_pair(40), lora(r=2))
    trainer.train()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    draft = trainer.model.get_base_model()
    projections = [m for m in draft.modules() if hasattr(m, "lora_A")]
    assert len(projections) == 8  # q, k, v, o, gate, up, down and fc; not the head
    wanted = sum(2 * (m.in_features + m.out_features) for m in projections)
    assert wanted == trainer.model.get_nb_trainable_parameters()[0]
    assert wanted == sum(p.numel() for p in trainer.model.parameters() if id(p) in trained)
    after = trainer.model.state_dict()
    for name, tensor in base.items():
        module, _, parameter = name.rpartition(".")
        wrapped = f"base_model.model.{module}.base_layer.{parameter}"
        assert torch.equal(after.get(wrapped, after.get(f"base_model.model.{name}")), tensor), name
    assert all(m.lora_B["default"].weight.any() for m in projections)
    curve = losses(trainer)
    assert curve[6] < curve[1]


@pytest.mark.parametrize("where", [{}, {**WITH_HEAD, "lora_dropout": 0.1}])
def test_a_resumed_run_is_the_uninterrupted_one(where, tmp_path):
    whole = make_trainer(tmp_path / "whole", tiny_pair(40), lora(**where))
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert why_incomplete(checkpoint) is None
    with safe_open(checkpoint / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert not any("base_layer" in name for name in file.keys())  # nothing of the base, not of its head either
    files = json.loads((checkpoint / "checkpoint_manifest.json").read_text())["files"]
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= set(files)
    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoint-3")
    torch.manual_seed(77)  # the adapter's own start must not matter
    resumed = make_trainer(tmp_path / "resumed", tiny_pair(40), lora(**where))
    resumed.train(resume_from_checkpoint="last")
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6) and sorted(losses(resumed)) == [1, 2, 3, 4, 5, 6]
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=0, atol=1e-7, msg=name)
    ends = (load_file(tmp_path / name / "checkpoint-6" / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.allclose(x, y, rtol=0, atol=1e-7) for x, y in zip(*(e.values() for e in ends), strict=True))

    (checkpoint / "adapter" / "adapter_model.safetensors").unlink()
    assert "adapter/adapter_model.safetensors is missing" in why_incomplete(checkpoint)


def test_acceptance_measured_in_training_is_that_of_the_merged_folder(tmp_path):
    """And the best model goes by it and is in the trainer again, although the base has never changed."""
    fields = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    fields["metric_for_best_model"] = "acceptance_length"
    trainer = make_trainer(tmp_path / "run", tiny_pair(40), lora(), **fields)
    options = {"every_steps": 3, "max_new_tokens": 24, "batch_size": 2}
    callback = AcceptanceLengthCallback(trainer, word_tokenizer(VOCAB, 2), PROMPTS, **options)
    trainer.add_callback(callback)
    trainer.train()
    history = trainer.state.log_history
    found = {entry["step"]: entry["eval_acceptance_length"] for entry in history if "eval_acceptance_length" in entry}
    for step, length in found.items():
        assert length == pytest.approx(measure_folder(tmp_path / "run" / f"checkpoint-{step}"), abs=1e-4)
    best = trainer.state.best_model_checkpoint
    trainer.save_model(tmp_path / "best")
    again, kept = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path / "best", best))
    assert sorted(found) == [3, 6] and all(torch.equal(again[name], kept[name]) for name in kept)


def test_bf16_training_follows_float32(tmp_path):
    curves = {}
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path / str(bf16), tiny_pair(40), lora(**WITH_HEAD), bf16=bf16)
        trainer.train()
        curves[bf16] = losses(trainer)
    assert curves[True] == pytest.approx(curves[False], rel=0.03) and curves[True] != curves[False]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(target_modules=["q_proj", "c_attn"]), "`lora_target_modules` holds 'c_attn', which this draft does not"),
        (lora(target_modules=["embed_tokens"]), "'embed_tokens', which is the target's and frozen: choose among fc,"),
        (lora(modules_to_save=["embed_tokens"]), "`lora_modules_to_save` holds 'embed_tokens', which is the target's"),
        (lora(modules_to_save=["score"]), "`lora_modules_to_save` holds 'score', which this draft does not have"),
        (lora(target_modules=["fc"], modules_to_save=["fc"]), "both hold fc: a module is trained whole or by an"),
        (lora(use_dora=True), "`use_dora` of `peft_config` is True"),
        (lora(bias="all"), "`bias` of `peft_config` is all"),
        (IA3Config(target_modules=["fc"], feedforward_modules=[]), "must be a `LoraConfig`, .* got IA3"),
    ],
)
def test_what_cannot_be_adapted_is_refused(config, message):
    _, draft = tiny_pair(40)
    with pytest.raises(ValueError, match=message):
        AdaptedDraft(draft, config)


def test_eagle1s_lent_head_and_zero_bias_are_not_trained(tmp_path):
    target, draft = tiny_eagle1_pair()
    with pytest.raises(ValueError, match="holds 'lm_head', which is the target's and frozen: choose among fc, layers"):
        AdaptedDraft(draft, lora(target_modules=["lm_head"]))
    adapted = AdaptedDraft(draft, lora(modules_to_save=["fc"]))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {"base_model.model.fc.modules_to_save.default.weight"}
    stir(adapted).save_pretrained(tmp_path)
    load_draft(tmp_path, target)  # refuses a bias that is not zero


def test_another_peft_model_is_refused(tmp_path):
    target, draft = tiny_pair(40)
    with pytest.raises(ValueError, match="`model` has an adapter already: pass the draft itself"):
        make_trainer(tmp_path, (target, get_peft_model(draft, lora(target_modules=["fc"]))))


def test_a_sharded_draft_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`use_peft` cannot train a sharded draft: leave out `fsdp`"):
        make_trainer(tmp_path, tiny_pair(40), lora(), fsdp=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` says it
    with pytest.raises(ValueError, match="`use_peft` cannot train a sharded draft"):
        make_trainer(tmp_path, tiny_pair(40), lora())


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    make_trainer(tmp_path, tiny_pair(40), lora()).train()

    def resume(config, seed=0, folder=tmp_path):
        make_trainer(folder, tiny_pair(40, seed=seed), config, max_steps=8).train(resume_from_checkpoint="last")

    with pytest.raises(ValueError, match="holds an adapter, so it was trained with `use_peft`: set it, or"):
        resume(None)
    with pytest.raises(ValueError, match="was trained on another draft .*: name with `init_from` the draft"):
        resume(lora(), seed=4)
    with pytest.raises(ValueError, match="`lora_r` is 8 but the adapter in .*checkpoint-6 was trained with 4: keep"):
        resume(lora(r=8))
    with pytest.raises(ValueError, match=r"`lora_target_modules` is \['fc'\] but the adapter in"):
        resume(lora(target_modules=["fc"]))
    make_trainer(tmp_path / "plain", tiny_pair(40)).train()
    with pytest.raises(ValueError, match="holds no adapter, so it was trained without `use_peft`"):
        resume(lora(), folder=tmp_path / "plain")


def test_arguments_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="`lora_r` is 8, but `use_peft` is not set: set it, or leave out `lora_r`"):
        AdapterArguments(lora_r=8)
    with pytest.raises(ValueError, match="`lora_r` must be at least 1 and at most 131,072, got 0"):
        AdapterArguments(use_peft=True, lora_r=0)
    with pytest.raises(ValueError, match="`lora_dropout` must be at least 0 and below 1, got 1.5"):
        AdapterArguments(use_peft=True, lora_dropout=1.5)
    assert AdapterArguments().peft_config() is None
