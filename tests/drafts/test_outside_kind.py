"""A kind of draft that hf_eagle does not know: registered, trained, resumed, saved, decoded, measured and carded."""

import copy
import json
import logging
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from chain_models import VOCAB, generate, make_target, random_prompts
from datasets import Dataset
from outside_kind import KIND
from outside_kind.configuration import config_for
from peft import LoraConfig
from replayed import replayed
from tiny_files import write_chats, write_tiny_target
from tiny_tokenizer import word_tokenizer
from workers import run_worker

from hf_eagle import EagleTrainer, EagleTrainingArguments, load_draft
from hf_eagle.benchmark.dry_run import dry_run
from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.packing import pack_dataset
from hf_eagle.decoding import speculative_generate, target_generate
from hf_eagle.decoding.caches import Lengths
from hf_eagle.decoding.checks import DraftShape
from hf_eagle.decoding.target_run import TargetRun
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.costs_base import RunShapes
from hf_eagle.drafts.kinds import KINDS, Kind, register_kind
from hf_eagle.drafts.modeling_unrolled import UnrolledDraft
from hf_eagle.drafts.prune import prune_vocabulary
from hf_eagle.drafts.training_base import Draw
from hf_eagle.drafts.vocabulary import VocabularyMapping
from hf_eagle.drafts.warm_start import start_from
from hf_eagle.evaluation.acceptance import measure_acceptance
from hf_eagle.evaluation.prompts import Prompt, load_prompts
from hf_eagle.hub.publish import contents
from hf_eagle.serving.check import check_draft
from hf_eagle.training.acceptance import AcceptanceLengthCallback
from hf_eagle.training.run_arguments import RunArguments


ROOT = Path(__file__).resolve().parents[2]
TAPS, ANSWER = [0, 2, 3], 30
PROMPTS = [Prompt([{"role": "user", "content": f"w{10 + i} w{20 + i} w{30 + 2 * i}"}], None, i) for i in range(4)]


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The kind is known to these tests, and to no others."""
    register_kind(KIND)
    yield
    del KINDS[KIND.name]


@pytest.fixture(scope="module")
def target():
    return make_target(tap_ids=TAPS)


@pytest.fixture(scope="module")
def records(target):
    return make_records(target)


def make_records(target):
    """The target's own answers, of several lengths."""
    answers = generate(target, random_prompts(24, 4, seed=2), ANSWER)
    lengths = [answers.shape[1] - i % 5 for i in range(len(answers))]
    return [
        {"input_ids": ids[:length].tolist(), "loss_mask": [0] * 4 + [1] * (length - 4)}
        for ids, length in zip(answers, lengths, strict=True)
    ]


def make_draft(target, records, draft_vocab_size=48, **fields):
    torch.manual_seed(1)
    config = config_for(target.config, {"tap_ids": TAPS, "draft_vocab_size": draft_vocab_size}, **fields)
    counts = torch.bincount(torch.tensor([token for row in records for token in row["input_ids"][4:]]))
    mapping = VocabularyMapping.from_token_ids(counts.topk(draft_vocab_size).indices, VOCAB)
    return new_draft(config, target.embedding_weight(), mapping, target.head_weight())


class Recording(EagleTrainer):
    """Also keeps what was drawn: from epoch and tokens of an example to the places of its anchors."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        epoch, plan = int((self.state.epoch or 0) + 1e-6), inputs["plan"]
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            example = tuple(inputs["input_ids"][row][mask].tolist())
            self.drawn[epoch, example] = plan.anchors[row][plan.real[row]].tolist()
        return super().compute_loss(model, inputs, *args, **kwargs)


def make_trainer(folder, target, records, peft_config=None, **fields):
    defaults = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 3, "save_strategy": "no"}
    args = EagleTrainingArguments(output_dir=str(folder), report_to="none", disable_tqdm=True, **{**defaults, **fields})
    data = Dataset.from_list(records)
    trainer = Recording(
        model=make_draft(target, records),
        args=args,
        target=target,
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=word_tokenizer(VOCAB, 2),
        peft_config=peft_config,
    )
    trainer.drawn = {}
    return trainer


@pytest.fixture(scope="module")
def trained(target, records, tmp_path_factory):
    """A trainer at the end of its run, with acceptance measured on the way."""
    fields = {"num_train_epochs": 40, "per_device_train_batch_size": 8, "max_grad_norm": 5.0}
    trainer = make_trainer(tmp_path_factory.mktemp("trained"), target, records, **fields)
    trainer.add_callback(
        AcceptanceLengthCallback(trainer, word_tokenizer(VOCAB, 2), PROMPTS, every_steps=60, max_new_tokens=16)
    )
    trainer.train()
    trainer.save_model()
    return trainer


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# ---- registered ----


def test_arguments_take_its_method_once_it_is_registered(capsys):
    asked = ["--target", "t", "--train_data", "d", "--output_dir", "o", "--report_to", "none", "--method"]
    recipe = RunArguments.parse([*asked, "block", "--draft_vocab_size", "48"])
    recipe.refuse_other_methods()
    assert recipe.draft.kind is KIND
    with pytest.raises(SystemExit):
        RunArguments.parse([*asked, "blocks"])
    assert "`method` must be one of eagle1, eagle2, eagle3, dflash, block, got 'blocks'." in capsys.readouterr().err
    with pytest.raises(ValueError, match="`ttt_steps` is 3, which means nothing to a Block draft"):
        RunArguments.parse([*asked, "block", "--ttt_steps", "3"]).refuse_other_methods()


def test_names_of_other_kinds_are_refused():
    register_kind(KIND)  # a module that is imported twice
    for name, architecture, method in (
        ("block", "Other", "other"),
        ("other", "OutsideBlockDraft", "other"),
        ("other", "Other", "eagle3"),
    ):
        with pytest.raises(ValueError, match="cannot be registered: .* draft already; choose other names"):
            register_kind(Kind(name, "Other", "other", {architecture: "modeling"}, {method: "chain"}))
    assert list(KINDS) == ["eagle1", "eagle3", "dflash", "block"]


def test_it_is_no_kind_that_is_here(target, records):
    draft = make_draft(target, records)
    assert draft.kind is KIND and not isinstance(draft, UnrolledDraft)
    assert draft.config.tap_ids == TAPS and draft.config.eagle_aux_hidden_state_layer_ids is None


# ---- what is drawn ----


def plan_of(trainer, rows, side="right", pack=None, **draw):
    """The anchors of each example of a batch, by its tokens."""
    if pack is not None:
        rows = list(pack_dataset(Dataset.from_list(rows), pack))
    batch = EagleDataCollator(pad_token_id=0, padding_side=side, pad_to_multiple_of=16)(rows)
    plan, found = trainer.step.training.plan(batch, Draw(**draw)), {}
    for ids, documents, anchors, real in zip(batch["input_ids"], plan.documents, plan.anchors, plan.real, strict=True):
        for document in documents[documents >= 0].unique():
            columns = (documents == document).nonzero()[:, 0]
            inside = [int(a - columns[0]) for a in anchors[real] if a in columns]
            found[tuple(ids[columns].tolist())] = inside
    return found


def test_what_is_drawn_of_an_example_depends_on_nothing_beside_it(trained, records):
    alone = {key: value for row in records[:6] for key, value in plan_of(trained, [row]).items()}
    assert len(alone) == 6 and all(len(set(anchors)) == 8 for anchors in alone.values())
    # the prompt is not drafted, nor is anything behind the last token
    assert all(4 <= anchor < len(tokens) - 1 for tokens, anchors in alone.items() for anchor in anchors)

    assert plan_of(trained, records[:6]) == alone
    assert plan_of(trained, records[5::-1], side="left") == alone
    assert plan_of(trained, records[:6], pack=80) == alone
    for other in ({"epoch": 1}, {"seed": 1}):
        assert all(anchors != alone[tokens] for tokens, anchors in plan_of(trained, records[:6], **other).items())


def test_workers_and_epochs(trained, target, records, tmp_path):
    alone = make_trainer(tmp_path / "alone", target, records, num_train_epochs=2)
    alone.train()
    for persistent in (False, True):
        fields = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
        spread = make_trainer(tmp_path / str(persistent), target, records, num_train_epochs=2, **fields)
        spread.train()
        assert spread.drawn == alone.drawn and len(alone.drawn) == 48
        assert_same(weights(spread), weights(alone))
    again = [alone.drawn[0, example] == alone.drawn[1, example] for _, example in list(alone.drawn)[:24]]
    assert not any(again)


def test_two_ranks_draw_and_end_as_one(target, records, tmp_path):
    fields = {"num_train_epochs": 2, "train_sampling_strategy": "sequential"}
    alone = make_trainer(tmp_path / "alone", target, records, **fields)
    alone.train()
    run_worker(
        tmp_path / "ranks",
        ranks=2,
        worker="outside_kind_worker.py",
        args={**fields, "per_device_train_batch_size": 2},
    )
    first, second = (torch.load(tmp_path / "ranks" / f"rank_{rank}.pt") for rank in (0, 1))
    assert first[0] | second[0] == alone.drawn and len(first[0]) == len(second[0]) == 24
    for name, tensor in weights(alone).items():
        assert torch.equal(first[1][name], second[1][name]), name
        torch.testing.assert_close(first[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_resumed_run_draws_and_ends_as_one_that_was_not_interrupted(target, records, tmp_path):
    """From the middle of an epoch over the end of two."""
    fields = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tmp_path / "whole", target, records, **fields)
    whole.train()
    for checkpoint in ("checkpoint-4", "checkpoint-12"):  # inside an epoch, and at the end of one
        folder = tmp_path / checkpoint
        shutil.copytree(tmp_path / "whole" / checkpoint, folder / checkpoint)
        resumed = make_trainer(folder, target, records, dataloader_num_workers=2, **fields)
        resumed.train(resume_from_checkpoint="last")
        assert resumed.state.global_step == 18 and 0 < len(resumed.drawn) < len(whole.drawn)
        assert resumed.drawn.items() <= whole.drawn.items()
        assert_same(weights(resumed), weights(whole))


def test_evaluations_are_drawn_alike_in_every_epoch(trained):
    first = trained.evaluate()
    trained.state.epoch = 7.0
    second = trained.evaluate()
    assert first["eval_loss"] == second["eval_loss"]


# ---- trained ----


def test_training_lowers_the_loss_of_every_slot(trained):
    history = [entry for entry in trained.state.log_history if "loss" in entry]
    assert history[-1]["loss"] < history[0]["loss"] - 0.2  # most of it is the target's own entropy
    for slot in range(3):
        assert history[-1][f"accuracy_step_{slot}"] > max(0.5, 2 * history[0][f"accuracy_step_{slot}"])
    assert "accuracy_step_3" not in history[0]


def test_a_batch_without_an_anchor_touches_all_parameters(target, records, tmp_path):
    silent = [{**row, "loss_mask": [0] * len(row["loss_mask"])} for row in records[:4]]
    trainer = make_trainer(tmp_path, target, records)
    batch = EagleDataCollator(pad_token_id=0)(silent)
    loss = trainer.compute_loss(trainer.model, batch | {"plan": trainer.step.plan(batch)})
    loss.backward()
    assert loss == 0 and all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)


def test_bf16_accumulation_and_packing(target, records, tmp_path):
    curves = []
    for name, fields in {
        "plain": {},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "bf16": {"bf16": True},
    }.items():
        trainer = make_trainer(tmp_path / name, target, records, max_steps=4, logging_steps=1, **fields)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=0.03)

    packed = pack_dataset(Dataset.from_list(records[:8]), 80)
    batches = [EagleDataCollator(pad_token_id=0)(rows) for rows in (list(packed), records[:8])]
    losses = [trainer.step(trainer.model, batch)[0].loss_sums for batch in batches]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=1e-4)


def test_an_adapter_is_trained_on_it(target, records, tmp_path):
    trainer = make_trainer(tmp_path, target, records, peft_config=LoraConfig(r=2), max_steps=2)
    before = load_state(trainer.model.get_base_model())
    trainer.train()
    trainer.save_model()
    after = load_draft(tmp_path, target).state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert "see.weight" in changed and "layer.self_attn.q_proj.weight" in changed and "lm_head.weight" not in changed


def load_state(draft):
    """Its tensors by their own names, whatever wraps its modules."""
    return {name.replace(".base_layer.", "."): tensor.clone() for name, tensor in draft.state_dict().items()}


# ---- saved and loaded ----


def test_a_run_warns_once_that_no_server_is_known_to_run_it(target, records, tmp_path, caplog):
    trainer = make_trainer(tmp_path, target, records, max_steps=4, save_strategy="steps", save_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
        trainer.save_model()
    told = [record.getMessage() for record in caplog.records if record.name.startswith("hf_eagle")]
    assert len(told) == 1 and "no server is known to run" in told[0]


def test_it_is_loaded_as_it_was_saved(trained, target):
    draft = load_draft(trained.args.output_dir, target)
    assert draft.kind is KIND and draft.config.block_size == 4 and draft.config.tap_ids == TAPS
    assert_same(draft.state_dict(), weights(trained))


def test_a_folder_is_no_draft_where_the_kind_is_not_registered(trained):
    del KINDS["block"]
    try:
        with pytest.raises(ValueError, match=r"`architectures` in its config.json is \['OutsideBlockDraft'\], known"):
            load_draft(trained.args.output_dir)
    finally:
        register_kind(KIND)


def test_the_servers_rules_are_not_asked(trained, target):
    found = check_draft(trained.args.output_dir, target.config, kind=KIND.name)
    assert [finding.level for finding in found] == ["limit"]


def test_its_vocabulary_is_pruned_and_another_one_is_started_from_it(trained, target, records, tmp_path):
    draft = load_draft(trained.args.output_dir, target)
    ids, hidden = draft.draft_ids[::2], torch.randn(3, draft.config.hidden_size)
    kept = draft.compute_logits(hidden)[:, ::2]
    prune_vocabulary(draft, ids)
    assert torch.equal(draft.draft_ids, ids) and torch.equal(draft.compute_logits(hidden), kept)
    draft.save_pretrained(tmp_path)

    larger = make_draft(target, records)
    assert start_from(larger, load_draft(tmp_path, target)) == 24
    assert_same(larger.layer.state_dict(), draft.layer.state_dict())


# ---- decoded ----


def test_it_proposes_what_it_was_trained_to(trained, target, records):
    """Every block of a plan, and the same one behind a cache: the same tokens."""
    draft = make_draft(target, records, initializer_range=0.5).eval()  # random, so that all that it sees matters
    batch = EagleDataCollator(pad_token_id=0)(records[:4])
    ids, plan = batch["input_ids"], trained.step.plan(batch)
    features = target(ids, attention_mask=batch["attention_mask"])
    with torch.no_grad():
        hidden = draft(ids, features, plan).hidden_states
        wanted = draft.to_target_ids(draft.compute_logits(hidden).argmax(-1)).T
        for (row, place), tokens in zip(plan.real.nonzero().tolist(), wanted, strict=True):
            anchor = int(plan.anchors[row, place])
            run = TargetRun(target, ids[row : row + 1, :1], None, room=ids.shape[1] + 4)
            proposer = draft.proposer(DraftShape.of("chain", 3), run)
            for begin, end in ((0, 3), (3, anchor)):  # what is new arrives in pieces
                lengths = Lengths([end], torch.tensor([end]))
                seen, behind = features.taps[row : row + 1, begin:end], ids[row : row + 1, begin + 1 : end + 1]
                proposal = proposer.propose(seen, behind, lengths)
            assert proposal.tree is None and torch.equal(proposal.tokens[0], tokens)
    assert len(wanted) == 32


@pytest.mark.parametrize("count", [1, 3])
def test_decoding_is_lossless_alone_and_in_a_batch(trained, target, count):
    draft = trained.model.eval()
    prompts = [prompt[-length:] for prompt, length in zip(random_prompts(5, 8, seed=9), (8, 3, 5, 2, 8), strict=True)]
    asked = {"num_speculative_tokens": count, "max_new_tokens": 20, "eos_token_ids": [5, 9]}
    alone = [speculative_generate(target, draft, prompt[None], **asked) for prompt in prompts]

    ids = torch.stack([torch.cat([prompt.new_zeros(8 - len(prompt)), prompt]) for prompt in prompts])
    mask = torch.stack([torch.arange(8) >= 8 - len(prompt) for prompt in prompts]).long()
    batch = speculative_generate(target, draft, ids, mask, **asked)
    answers = target_generate(target, ids, mask, max_new_tokens=20, eos_token_ids=[5, 9])
    assert batch.answers == answers == [out.answers[0] for out in alone]
    assert batch.drafts == [out.drafts[0] for out in alone]
    assert batch.accepted_per_position == [out.accepted_per_position[0] for out in alone]
    assert sum(map(sum, batch.accepted_per_position)) > 0


def test_replaying_answers_counts_as_decoding_does(trained, target):
    """Its proposer knows only rounds; a window would be ignored, and is refused."""
    draft, inputs = trained.model.eval(), {"input_ids": random_prompts(5, 8, seed=9)}
    for decoded, again in replayed(target, draft, inputs, [{"num_speculative_tokens": n} for n in (1, 3)], 20, [5, 9]):
        assert again == decoded
    with pytest.raises(ValueError, match="`draft_window` is 16, which a OutsideBlockDraft ignores"):
        replayed(target, draft, inputs, [{"num_speculative_tokens": 3, "draft_window": 16}], 20)


def test_shapes_that_it_does_not_propose_are_refused(trained, target):
    draft, prompt = trained.model.eval(), random_prompts(1, 4, seed=1)
    with pytest.raises(ValueError, match="chains of up to 3 tokens, not a chain of 4"):
        speculative_generate(target, draft, prompt, num_speculative_tokens=4, max_new_tokens=4)
    with pytest.raises(ValueError, match="not a tree"):
        speculative_generate(target, draft, prompt, method="tree", max_new_tokens=4)


def test_taps_of_another_target_are_refused(trained, target):
    try:
        target.tap_ids = [1, 2, 3]
        with pytest.raises(ValueError, match=r"trained on the taps \[0, 2, 3\], but the target takes \[1, 2, 3\]"):
            speculative_generate(target, trained.model.eval(), random_prompts(1, 4, seed=1), max_new_tokens=4)
    finally:
        target.tap_ids = TAPS


# ---- measured and described ----


def test_acceptance_is_measured_during_training_and_after_it(trained, target):
    logged = [entry["acceptance_length"] for entry in trained.state.log_history if "acceptance_length" in entry]
    found = measure_acceptance(
        target, trained.model.eval(), word_tokenizer(VOCAB, 2), PROMPTS, max_new_tokens=16, progress=False
    )
    assert len(logged) == 2 and found["identical_to_target"] is True
    assert found["acceptance_length"] == pytest.approx(logged[-1], abs=1e-3) and logged[-1] > 1.1


def test_its_card_says_that_no_server_is_known_to_run_it(trained, target):
    trained.card_facts = {"base_model": "org/target"}
    trained.create_model_card()
    card = (Path(trained.args.output_dir) / "README.md").read_text()
    assert "A Block draft for" in card and "No server is known to run a draft of its kind" in card
    assert "vllm" not in card.lower() and "EAGLE" not in card

    # nothing that could run it travels with it
    published = contents(trained.args.output_dir, "me/draft")
    assert {"README.md", "config.json", "model.safetensors"} <= set(published)
    assert not any(name.startswith("custom_generate") for name in published)


def test_its_card_names_its_taps(trained):
    trained.create_model_card()
    card = (Path(trained.args.output_dir) / "README.md").read_text()
    assert "entry of the target's layers 0, 2, 3" in card and "48 of the target's 67 tokens" in card


def test_a_dry_run_counts_what_it_holds(trained, target):
    config = trained.model.config
    run = dry_run(target.model.config, config, RunShapes(rows=2, length=64, ttt_steps=3, bf16=False))
    held = {holding.what: holding for holding in run.kept + run.draft_step}
    wanted = sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
    assert held["draft, trained, float32"].parameters == wanted
    assert "OutsideBlockDraft" in run.title and "taps 0, 2, 3" in run.title and "head and loss" in run.describe()


def test_a_dry_run_speaks_of_no_unroll(trained, target):
    run = dry_run(target.model.config, trained.model.config, RunShapes(length=64, ttt_steps=3))
    assert "TTT" not in run.describe()


def test_the_costs_are_those_that_pytorch_counts(trained, target, records):
    from torch.utils.flop_counter import FlopCounterMode

    trainer, batch = trained, EagleDataCollator(pad_token_id=0)(records[:4])
    plan = trainer.step.plan(batch)
    seen = trainer.step.target_features(batch, plan)
    lesson = trainer.step.teach(trainer.model, seen, plan, torch.ones(3))
    trainer.model.train()
    with FlopCounterMode(display=False) as counted:
        trainer.step.unroll(trainer.model, batch, plan, lesson).loss.backward()
    trainer.model.zero_grad()
    operations = counted.get_flop_counts()["Global"]
    products = sum(n for op, n in operations.items() if "attention" not in str(op) and "bmm" not in str(op))

    needed = KIND.part("costs").costs_of(trainer.model.config).needed_flops(plan)
    # of padding and of rows that the loss leaves out nothing is needed
    assert needed["projections"] + needed["head"] == pytest.approx(products, rel=0.15)


# ---- as a user starts it ----


def script(name):
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Arguments of a run, and the files that they name."""
    folder = tmp_path_factory.mktemp("script")
    write_tiny_target(folder / "target")
    write_chats(folder / "chats.jsonl")
    (folder / "asked.txt").write_text("red green\n")
    return RunArguments.parse(
        [
            *("--method", "block", "--target", str(folder / "target"), "--train_data", str(folder / "chats.jsonl")),
            *("--draft_vocab_size", "24", "--tap_ids", "2", "5", "--oov_rows", "renormalize"),
            *("--output_dir", str(folder / "draft"), "--max_steps", "2", "--logging_steps", "1"),
            *("--per_device_train_batch_size", "4", "--eval_share", "0.25", "--disable_tqdm", "true"),
            *("--report_to", "none"),
            *("--feature_store", str(folder / "store"), "--cache_mode", "first_epoch", "--store_dtype", "float32"),
            *("--acceptance_prompts", str(folder / "asked.txt"), "--acceptance_steps", "2", "--max_length", "64"),
        ]
    )


class Told(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def left(recipe):
    """What the script leaves: the folder of the draft, and what was logged at its end."""
    train, told = script("train_eagle"), Told()
    prompts = load_prompts(recipe.data.acceptance_prompts)
    trainer = train["build_trainer"](recipe, recipe.refuse_before_loading(), prompts)
    result, logger = trainer.train(), train["logger"]
    level = logger.level
    logger.addHandler(told)
    logger.setLevel(logging.INFO)
    train["leave_results"](trainer, result)
    logger.setLevel(level)
    logger.removeHandler(told)
    return Path(recipe.training.output_dir), told.lines


def test_the_training_script_trains_it_from_a_store(left, recipe):
    folder, _ = left
    draft = load_draft(folder)
    assert draft.kind is KIND and draft.config.tap_ids == [2, 5] and draft.config.tokenizer_fingerprint
    assert "No server is known to run" in (folder / "README.md").read_text()
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert any("acceptance_length" in entry for entry in history) and (folder / "training.png").is_file()


def test_the_training_script_does_not_say_that_servers_load_it(left):
    assert any("The draft is in" in line for line in left[1])
    assert not any("vLLM and SGLang load that folder" in line for line in left[1])


def test_the_training_script_resumes_what_has_the_same_shape(left, recipe):
    recipe = copy.deepcopy(recipe)
    recipe.training.resume_from_checkpoint, recipe.training.max_steps = "last", 3
    recipe.data.feature_store = None  # the first run still holds it
    train = script("train_eagle")
    trainer = train["build_trainer"](recipe, recipe.refuse_before_loading(), None)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 3
    recipe.target.tap_ids = [2, 4]
    with pytest.raises(ValueError, match=r"`tap_ids` is \[2, 4\] but .* was trained with \[2, 5\]"):
        train["build_trainer"](recipe, recipe.refuse_before_loading(), None)


def test_the_evaluation_script_gives_the_target_its_taps(left, recipe):
    evaluate = script("evaluate_draft")
    args = evaluate["EvaluationArguments"](
        target=recipe.target.target, draft=str(left[0]), prompts=recipe.data.acceptance_prompts, output_json="unwritten"
    )
    target, draft, *_ = evaluate["load"](args, {}, {}, evaluate["decoding_settings"](args))
    assert target.tap_ids == draft.config.tap_ids == [2, 5]
