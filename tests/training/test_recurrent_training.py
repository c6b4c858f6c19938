"""Training a draft for a target with recurrent layers or sparse attention: packed, and with measured acceptance."""

import pytest
import torch
from datasets import Dataset
from test_packed_attention import assert_same_step, packed_batch
from tiny import VOCAB, pad_batch, random_chats
from tiny_model_types import tiny_model_type
from tiny_tokenizer import word_tokenizer

from hf_eagle import EagleTrainer, EagleTrainingArguments, FrozenTarget, load_draft, pack_dataset
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle3.configuration import draft_config
from hf_eagle.evaluation.acceptance import measure_acceptance
from hf_eagle.evaluation.prompts import Prompt
from hf_eagle.training.acceptance import AcceptanceLengthCallback


CHATS = random_chats(9, seed=5)  # those of `packed_batch`
PROMPTS = [Prompt([{"role": "user", "content": f"w{10 + i} w{20 + i} w{30 + 2 * i}"}], None, i) for i in range(3)]
MEASURED = {"num_speculative_tokens": 3, "max_new_tokens": 8, "batch_size": 2}


def trainer_of(model, folder, chats=CHATS, **args):
    target = FrozenTarget(model)
    torch.manual_seed(1)
    config = draft_config(target.config, tap_ids=[0, 2, 3], initializer_range=0.2)
    draft = new_draft(config, target.embedding_weight(), head_weight=target.head_weight())
    target.tap_ids = [0, 2, 3]
    args = EagleTrainingArguments(
        output_dir=str(folder), ttt_steps=2, report_to="none", disable_tqdm=True, save_strategy="no", **args
    )
    return EagleTrainer(model=draft, args=args, target=target, train_dataset=Dataset.from_list(chats))


@pytest.mark.parametrize("name", ["qwen3_5_text", "kimi_linear", "deepseek_v32"])
def test_a_packed_step_is_the_padded_one(name, tmp_path):
    trainer, steps = trainer_of(tiny_model_type(name, initializer_range=0.05), tmp_path), []
    count = trainer._get_num_items_in_batch([pad_batch(CHATS)], torch.device("cpu"))
    for batch in (pad_batch(CHATS), packed_batch(), packed_batch(side="left")):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        steps.append((loss.detach(), gradients))
    for step in steps[1:]:
        assert_same_step(step, steps[0])


def test_acceptance_is_measured_while_it_trains(tmp_path):
    trainer = trainer_of(tiny_model_type("qwen3_next"), tmp_path, max_steps=3, learning_rate=3e-3, logging_steps=1)
    trainer.train_dataset = pack_dataset(Dataset.from_list(CHATS), 48)
    trainer.add_callback(
        AcceptanceLengthCallback(trainer, word_tokenizer(VOCAB, 2), PROMPTS, every_steps=3, **MEASURED)
    )
    trainer.train()
    logged = [entry["acceptance_length"] for entry in trainer.state.log_history if "acceptance_length" in entry]

    trainer.save_model()
    draft = load_draft(tmp_path, trainer.target)
    found = measure_acceptance(
        trainer.target, draft, word_tokenizer(VOCAB, 2), PROMPTS, compare_to_target=True, progress=False, **MEASURED
    )
    assert logged == [pytest.approx(found["acceptance_length"], abs=1e-4)]


def test_trees_are_refused_before_the_first_step(tmp_path):
    trainer = trainer_of(tiny_model_type("lfm2"), tmp_path, max_steps=3)
    with pytest.raises(ValueError, match="`method` is 'tree', but `target` is a Lfm2ForCausalLM"):
        AcceptanceLengthCallback(trainer, word_tokenizer(VOCAB, 2), PROMPTS, every_steps=3, method="tree")
