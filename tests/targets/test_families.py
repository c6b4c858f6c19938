"""Every family of targets: the draft that is made for it, two steps of its training, and what servers read of it."""

import json

import pytest
import tiny_vision
import torch
from datasets import Dataset
from tiny import pad_batch, random_chats
from tiny_blocks import tiny_block_pair
from tiny_families import CONFIGS, SMALL, tiny_family
from tiny_new_families import FIELDS as NEW
from tiny_new_families import new_family_config, tiny_new_family
from transformers import CohereConfig, Kimi_K25Config, LlamaConfig, LongcatFlashConfig, Qwen2Config

from hf_eagle import EagleMLAConfig, EagleTrainer, EagleTrainingArguments, FrozenTarget, load_draft
from hf_eagle.door.config_readings import scales_embeddings
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle1.configuration import Eagle1Config
from hf_eagle.drafts.eagle3.configuration import draft_config
from hf_eagle.drafts.eagle3.taps import describe_taps, sglang_counts_entries
from hf_eagle.targets.architectures import FAMILIES, family_of
from hf_eagle.targets.latent import has_latent_attention


TAPS = [2, 4, 5]
NAMES = [*CONFIGS, *NEW]
# families whose config names one expert's width, or two widths
MLP = {"gpt-oss": 6 * 32, "llama4": 56}
HEAD_DIM = {"qwen3": 16, "qwen3-moe": 16, "gpt-oss": 16, "gemma2": 16, "gemma3": 16, "glm": 16, "glm4": 16}
HEAD_DIM |= dict.fromkeys(("glm4-moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), 16)
OBJECTIVES = {"eagle3": {"ttt_steps": 2}, "eagle1": {"feature_noise": "none"}, "dflash": {"num_anchors": 4}}
LATENT = {"deepseek-v2", "deepseek-v3", "glm4-moe-lite", "deepseek_v32", "glm_moe_dsa", "kimi_linear"}


def config_of(name):
    return new_family_config(name) if name in NEW else CONFIGS[name]()


def make(name, method):
    """A frozen target and a fresh draft for it, as the script makes them."""
    target = FrozenTarget(tiny_new_family(name) if name in NEW else tiny_family(name))
    if method == "eagle1":
        config = Eagle1Config.from_target(target.config, initializer_range=0.2)
    elif method == "dflash":
        return tiny_block_pair(target, tap_ids=TAPS)
    else:
        config = draft_config(target.config, tap_ids=TAPS, initializer_range=0.2)
    torch.manual_seed(1)
    return target, new_draft(config, target.embedding_weight(), head_weight=target.head_weight())


# EAGLE-1's is one for all but what follows the head, the embedding and the attention of the target
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "eagle3") for name in NAMES),
        *((name, "eagle1") for name in ("gemma2", "gpt-oss", "deepseek-v3", "gemma4_text")),
        *((name, "dflash") for name in NAMES if not scales_embeddings(config_of(name))),
    ],
)
def test_a_draft_for_it_learns_and_is_read_back(name, method, tmp_path):
    target, draft = make(name, method)
    args = EagleTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        **OBJECTIVES[method],
    )
    chats = random_chats(4, seed=5)
    trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=Dataset.from_list(chats))
    batch = trainer._prepare_inputs(pad_batch(chats))

    first = trainer.compute_loss(draft, batch)
    first.backward()
    for parameter_name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), parameter_name
        else:
            assert parameter.grad is None and parameter_name in ("embed_tokens.weight", "lm_head.weight", "fc.bias")
    draft.zero_grad()
    trainer.train()
    with torch.no_grad():
        assert trainer.compute_loss(draft, batch) < first

    trainer.save_model()
    again = load_draft(tmp_path, target)
    assert draft.state_dict().keys() == again.state_dict().keys()
    plan = trainer.step.plan(batch)
    features = trainer.step.target_features(batch, plan)
    seen, wanted = (d.eval()(batch["input_ids"], features, plan).hidden_states for d in (again, draft))
    assert torch.equal(seen, wanted)


def captured_by_sglang(model_type, nested, layers):
    """Entry ids that SGLang 0.5.23 records for a list of ids, by the target's model."""
    if model_type in ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "kimi_k2", "glm4_moe_lite"):
        return [i + 1 for i in nested] if nested[0] == 1 else nested
    if model_type == "gpt_oss" and max(nested) == layers:
        return nested
    return [i + 1 for i in nested]


@pytest.mark.parametrize("taps", [TAPS, [3, 5, 8], [0, 4, 7]])
@pytest.mark.parametrize("name", NAMES)
def test_both_servers_tap_the_layers_that_were_trained(name, taps, tmp_path):
    target = config_of(name)
    draft_config(target, tap_ids=taps).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    nested = found["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert captured_by_sglang(target.model_type, nested, 8) == taps
    assert found["eagle_aux_hidden_state_layer_ids"] == taps
    assert type(draft_config(target, tap_ids=taps)).from_pretrained(tmp_path).sglang_counts_entries == (
        sglang_counts_entries(target) and taps[0] != 2
    )


@pytest.mark.parametrize("name", NAMES)
def test_its_draft_has_the_sizes_that_servers_make_a_llama_of(name, tmp_path):
    """Whatever the target's biases, activations, norms and windows are: the servers' layer has none of them."""
    target = config_of(name)
    config = draft_config(target, tap_ids=TAPS)
    config.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert isinstance(config, EagleMLAConfig) == (name in LATENT)
    assert found["model_type"] == ("kimi_k2" if name in LATENT else "llama")
    if name not in LATENT:
        assert found["head_dim"] == HEAD_DIM.get(name, 8)
        assert found["num_key_value_heads"] == 2 and found["mlp_bias"] is False
    assert found["intermediate_size"] == MLP.get(name, 48)
    # of gpt-oss's YaRN vLLM takes factor times original, whatever the target says
    assert found["max_position_embeddings"] == (32 * 4096 if name == "gpt-oss" else 64)
    assert found["hidden_act"] == "silu"
    assert found["attention_bias"] is False and found["tie_word_embeddings"] is False
    slides = {"layer_types": ["sliding_attention"], "sliding_window": 64} if name == "mistral" else {}  # see `serving`
    unread = ("layer_types", "sliding_window", "partial_rotary_factor")
    assert {field: found[field] for field in unread if field in found} == slides


def test_gemmas_embeddings_are_lent_as_they_are_stored():
    """Gemma multiplies them by sqrt(hidden) in its own forward; both servers give a draft the table alone."""
    for name in ("gemma2", "gemma3"):
        target, draft = make(name, "eagle3")
        table = target.model.get_input_embeddings().weight
        assert torch.equal(draft.embed_tokens(torch.tensor([5])), table[5:6])


def test_the_taps_of_llama4_are_found():
    target = FrozenTarget(tiny_family("llama4"), TAPS)
    assert set(target.config.layer_types) == {"chunked_attention", "full_attention"}
    assert target(torch.ones(1, 3, dtype=torch.long)).taps.shape == (1, 3, 96)


def test_every_row_of_the_table_is_tested():
    # those that take images have their own tests, test_vision_*.py
    tested = {config_of(name).model_type for name in NAMES}
    tested |= {make(10).get_text_config().model_type for make in tiny_vision.CONFIGS.values()}
    assert tested | {"kimi_k2"} == {model_type for family in FAMILIES for model_type in family.model_types}
    assert len({model_type for family in FAMILIES for model_type in family.model_types}) == len(tested) + 1
    assert family_of(Kimi_K25Config()).name == "DeepSeek-V2/V3, Kimi"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlamaConfig(num_hidden_layers=32), "Taps: entry ids 2, 16, 29 of 32 layers (Llama)."),
        (
            CONFIGS["glm4-moe"](),
            "Taps: entry ids 2, 16, 29 of 8 layers (GLM-4.5). vLLM 0.32 takes them from this family only with "
            "`--model-impl transformers`.",
        ),
        (
            new_family_config("lfm2"),
            "Taps: entry ids 2, 16, 29 of 8 layers (LFM2). vLLM 0.32 takes none from this family. SGLang 0.5.23 takes "
            "none from this family.",
        ),
        (
            CohereConfig(num_hidden_layers=40),
            "Taps: entry ids 2, 16, 29 of 40 layers (layers found by discovery). This family is not tested: check that "
            "your server takes taps from a cohere model.",
        ),
    ],
)
def test_the_log_says_what_is_tapped(config, said):
    assert describe_taps(config, [2, 16, 29]) == said


def test_a_family_that_nobody_named_is_tapped_by_discovery():
    from transformers import AutoModelForCausalLM

    fields = {name: x for name, x in SMALL.items() if name != "pad_token_id"}
    model = AutoModelForCausalLM.from_config(CohereConfig(**fields, logit_scale=0.5)).eval()
    assert family_of(model.config) is None
    target = FrozenTarget(model, TAPS)
    ids = torch.randint(3, 96, (2, 9))
    with torch.no_grad():
        alone = model(ids, output_hidden_states=True)
    seen = target(ids)
    assert torch.equal(seen.taps, torch.cat([alone.hidden_states[i] for i in TAPS], -1))
    torch.testing.assert_close(target.logits(seen.last_hidden), alone.logits)


def test_a_shallow_target_is_told_which_taps_would_do():
    with pytest.raises(ValueError, match="at least 7 layers, this one has 4: pass `tap_ids`, for example 0,2,4"):
        draft_config(Qwen2Config(**{**SMALL, "num_hidden_layers": 4}))


def test_latent_attention_alone_does_not_make_sglang_count_entries():
    """LongCat's class there is not made from DeepSeek's, and adds 1 as all others do."""
    assert has_latent_attention(LongcatFlashConfig()) and not sglang_counts_entries(LongcatFlashConfig())
