"""`EagleTrainer` with an EAGLE-1 draft: evaluation, parts of the loss, noise, one global batch, what is refused."""

import pytest
import torch
from datasets import Dataset
from reference_eagle1 import reference_eagle1_loss
from test_callbacks import PROMPTS
from test_global_batch import ARGS, run
from tiny import VOCAB, random_chats, tiny_eagle1_pair, tiny_pair
from tiny_tokenizer import word_tokenizer

from hf_eagle import EagleTrainer, EagleTrainingArguments, load_draft
from hf_eagle.arguments.groups import DraftArguments, TargetArguments
from hf_eagle.arguments.objective import refuse_other_methods
from hf_eagle.drafts.kinds import KINDS
from hf_eagle.training.acceptance import AcceptanceLengthCallback


RECORDS = random_chats(16, seed=1)


def make_trainer(tmp_path, pair=None, records=RECORDS, **fields):
    target, draft = pair or tiny_eagle1_pair()
    defaults = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 2, "save_strategy": "no"}
    args = EagleTrainingArguments(
        output_dir=str(tmp_path / "run"), report_to="none", disable_tqdm=True, **{**defaults, **fields}
    )
    data = Dataset.from_list(records)
    return EagleTrainer(model=draft, args=args, target=target, train_dataset=data, eval_dataset=data)


def test_evaluation_is_the_reference_before_and_after_training(tmp_path):
    """With noise on: it is for training only."""
    trainer = make_trainer(tmp_path, learning_rate=1e-2, regression_weight=0.5, ce_weight=0.2, feature_noise="uniform")
    seen = []
    for _ in range(2):
        with torch.no_grad():
            regression, ce, correct, rows = reference_eagle1_loss(trainer.model, trainer.target.model, RECORDS)
        metrics = trainer.evaluate()
        wanted = {
            "eval_regression_loss": float(regression) / rows,
            "eval_ce_loss": float(ce) / rows,
            "eval_loss": (0.5 * float(regression) + 0.2 * float(ce)) / rows,
        }
        assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
        assert metrics["eval_accuracy_step_0"] == pytest.approx(correct / rows, abs=1e-4)
        assert "eval_accuracy_step_1" not in metrics
        seen.append(wanted["eval_loss"])
        if trainer.state.global_step == 0:
            trainer.train()
    assert seen[1] < seen[0]


def test_training_logs_the_parts_and_leaves_a_draft(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    before = {name: p.clone() for name, p in trainer.target.model.state_dict().items()}
    trainer.train()
    trainer.save_model()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["regression_loss"] + 0.1 * log["ce_loss"], rel=0.1)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        load_draft(folder, trainer.target)
    assert not trainer.model.fc.bias.any()
    for name, tensor in trainer.target.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def losses(tmp_path, **fields):
    trainer = make_trainer(tmp_path, logging_steps=1, learning_rate=3e-3, **fields)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_noise_is_the_seeds(noise, tmp_path):
    again = [losses(tmp_path / str(i), feature_noise=noise, seed=5, data_seed=1) for i in range(2)]
    assert again[0] == again[1]
    assert again[0] != losses(tmp_path / "other", feature_noise=noise, seed=6, data_seed=1)
    assert again[0] != losses(tmp_path / "none", feature_noise="none", seed=5, data_seed=1)


def test_bf16_training_follows_float32(tmp_path):
    curves = {
        bf16: losses(tmp_path / str(bf16), bf16=bf16, max_steps=8, feature_noise="none") for bf16 in (False, True)
    }
    assert curves[True] == pytest.approx(curves[False], rel=0.03)
    assert curves[True] != curves[False]


def test_resuming_is_the_run_that_was_not_interrupted(tmp_path):
    whole = make_trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    pair = tiny_eagle1_pair()
    make_trainer(tmp_path / "half", pair, max_steps=6, save_strategy="steps", save_steps=3).train()
    folder = tmp_path / "half" / "run"
    resumed = make_trainer(tmp_path / "half", max_steps=6)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


SPLITS = {"accumulation": (1, 2, 4), "ranks": (2, 4, 1)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return split_run(tmp_path_factory.mktemp("whole"), 1, 8, 1)


def split_run(out, ranks, batch, accumulation):
    return run(out, ranks, batch, accumulation, method="eagle1")


@pytest.fixture(scope="module", autouse=True)
def arguments():
    """Those of the EAGLE-3 test, with what an EAGLE-1 draft takes; noise would be drawn anew for each part."""
    kept = dict(ARGS)
    del ARGS["ttt_steps"]
    ARGS["feature_noise"] = "none"
    yield
    ARGS.clear()
    ARGS.update(kept)


@pytest.mark.parametrize("split", SPLITS)
def test_gradient_does_not_depend_on_the_split(split, whole, tmp_path):
    gradients, curve = split_run(tmp_path, *SPLITS[split])
    assert gradients.keys() == whole[0].keys() and "fc.bias" not in gradients
    for name, wanted in whole[0].items():
        assert wanted.norm() > 0
        assert (gradients[name] - wanted).norm() <= 2e-6 * wanted.norm(), name
    assert curve == pytest.approx(whole[1], rel=1e-6)


def test_eagle2_is_measured_with_its_tree(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=1e-2, max_steps=30, feature_noise="none")
    trainer.train()
    chain, tree = (
        AcceptanceLengthCallback(
            trainer, word_tokenizer(VOCAB, 2), PROMPTS, every_steps=1, max_new_tokens=24, method=method
        ).measure()
        for method in ("chain", "tree")
    )
    assert tree > chain


# ---- what is refused ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"ttt_steps": 3},
            "`ttt_steps` is 3, which means nothing to an EAGLE-1/2 draft: leave it out, or set `method`",
        ),
        ({"loss": "lk_alpha"}, "`loss` is lk_alpha, which means nothing to an EAGLE-1/2 draft"),
        ({"oov_rows": "renormalize"}, "`oov_rows` is renormalize, which means nothing"),
        ({"step_weight": 0.5}, "`step_weight` is 0.5, which means nothing"),
    ],
)
def test_arguments_of_eagle3_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **fields)


@pytest.mark.parametrize("fields", [{"feature_noise": "none"}, {"ce_weight": 0.5}, {"regression_weight": 0.5}])
def test_arguments_of_eagle1_are_refused_for_eagle3(fields, tmp_path):
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}` is .* means nothing to an EAGLE-3 draft"):
        make_trainer(tmp_path, tiny_pair(40), **fields)


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (DraftArguments(draft_vocab_size=100), "draft_vocab_size"),
        (DraftArguments(fc_norm=True), "fc_norm"),
        (DraftArguments(norm_output=True), "norm_output"),
        (DraftArguments(draft_init="random"), "draft_init"),
        (TargetArguments(target="x", tap_ids=[2, 4, 7]), "tap_ids"),
        (TargetArguments(target="x", tap_method="output_hidden_states"), "tap_method"),
    ],
)
def test_options_of_an_eagle3_draft_are_refused(group, name):
    with pytest.raises(ValueError, match=f"`{name}` is .*, which means nothing to an EAGLE-1/2 draft"):
        refuse_other_methods(KINDS["eagle1"], group)
    refuse_other_methods(KINDS["eagle3"], group)


def test_one_step_is_no_contradiction(tmp_path):
    assert make_trainer(tmp_path, ttt_steps=1).step.training.steps == 1
    assert DraftArguments(method="eagle2").kind == KINDS["eagle1"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ce_weight": -0.1}, "`ce_weight` must be at least 0, got -0.1"),
        ({"regression_weight": 0.0, "ce_weight": 0.0}, "`regression_weight` and `ce_weight` must not both be 0"),
    ],
)
def test_weights_that_train_nothing_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **fields)


def test_another_target_is_refused(tmp_path):
    target, _ = tiny_pair(40)
    _, draft = tiny_eagle1_pair()
    draft.config.vocab_size = 50
    with pytest.raises(ValueError, match="vocabulary 50 and hidden size 32, this target has 96 and 32"):
        make_trainer(tmp_path, (target, draft))
