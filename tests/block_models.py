"""A tiny target, DFlash drafts that learn its greedy answers in seconds, and what a greedy server does with them."""

import tempfile

import reference_dflash
import torch
from chain_models import generate, make_target, random_prompts
from datasets import Dataset
from tiny_blocks import options_of, shaken

from hf_eagle import EagleTrainer, EagleTrainingArguments, load_draft
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.dflash.configuration import config_for


BLOCK = 5
PROMPTS = random_prompts(8, 4, seed=2)  # whose answers are taught
# widths that vLLM's attention on a CPU knows
WIDTHS = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 6, "vocab_size": 257}


def wide_target():
    return make_target(**WIDTHS)


def answers_of(target):
    return generate(target, PROMPTS, 30)


def block_draft(target, layers=1, steps=0, **options):
    """A draft with norms that differ from one, taught for some steps on the target's own answers.

    Args:
        target: from [`wide_target`].
        layers: of the draft.
        steps: of training; 0 leaves it random.
        options: arguments of the draft.
    """
    answers = answers_of(target)
    unsaid = max(set(range(target.vocab_size)) - set(answers.flatten().tolist()))
    given = {"mask_token_id": unsaid, "block_size": BLOCK, "draft_num_layers": layers, "tap_ids": [1, 3, 4]}
    torch.manual_seed(1)
    config = config_for(target.config, options_of(**given | options), initializer_range=0.12)
    draft = shaken(new_draft(config, target.embedding_weight(), head_weight=target.head_weight()))
    target.tap_ids = config.tap_ids
    if not steps:
        return draft.eval()

    rows = [{"input_ids": row.tolist(), "loss_mask": [0] * 4 + [1] * (len(row) - 4)} for row in answers]
    with tempfile.TemporaryDirectory() as folder:
        args = EagleTrainingArguments(
            output_dir=folder,
            **{"max_steps": steps, "learning_rate": 6e-3, "per_device_train_batch_size": 8, "logging_steps": steps},
            **{"report_to": "none", "disable_tqdm": True, "seed": 5, "save_strategy": "no", "loss": "label"},
        )
        trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=Dataset.from_list(rows))
        trainer.train()
        trainer.save_model()
        return load_draft(folder, target)


def served_blocks(target, folder, prompt, max_new_tokens, slip=False):
    """What a greedy server drafts for one prompt, by the reference.

    Args:
        target: of the draft.
        folder: of the draft, in the main form.
        prompt: token ids, `(length,)`.
        max_new_tokens: of the answer.
        slip: as vLLM's CPU build norms the context's keys.

    Returns:
        `[place of the newest token, drafted tokens]` of every block, and the accepted tokens by position.
    """
    draft = reference_dflash.Draft.load(folder)
    draft.slip, slots = slip, draft.config["block_size"] - 1
    ids = generate(target, prompt[None], max_new_tokens + slots + 1)[0]
    features, _ = reference_dflash.target_features(target.model.model, ids, draft.taps)

    given = (target.embedding_weight().detach(), target.head_weight().detach(), ids, features)
    anchors, accepted = reference_dflash.served_counters(draft, *given, len(prompt), max_new_tokens, slots)
    blocks = [[a, reference_dflash.draft_block(draft, *given, a, slots).tolist()] for a in anchors]
    return blocks, accepted
