"""Training with a sharded target and a sharded draft is training in one process, and a run may change between them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_targets import tiny_family
from workers import losses, run_worker


ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = {
    "smollm2": str(ROOT / "assets" / "smollm2-135m-instruct"),
    "text": str(ROOT / "assets" / "prompts" / "train.jsonl"),
    "records": 40,
}
SMOLLM2_STEPS = 8
ONE_PROMPT = {"prompts": 1, "max_new_tokens": 48, "fields": {"max_steps": 3, "save_strategy": "no"}}
TINY = {"ttt_steps": 3, "learning_rate": 3e-3, "save_strategy": "steps"}


def args(ranks: int, **fields) -> dict:
    """Four rows a step, however many ranks there are."""
    return {**TINY, "per_device_train_batch_size": 4 // ranks, "max_steps": 9, "save_steps": 3, **fields}


def half(ranks: int) -> dict:
    """A step's four rows in two batches: one row a rank, if there are two."""
    fields = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2 // ranks}
    return {**fields, "max_steps": 6, "save_strategy": "no"}


def smollm2(out, ranks: int, sharding: str) -> dict:
    fields = {
        "max_steps": SMOLLM2_STEPS,
        "per_device_train_batch_size": 2 // ranks,
        "save_strategy": "no",
        "ttt_steps": 2,
        "oov_rows": "renormalize",  # every row counts, whatever the small vocabulary has
    }
    return {**SMOLLM2, "out": str(out), "sharding": sharding, "args": fields}


def launch(folder: Path, draft: str, ranks: int, runs: list[dict]) -> None:
    run_worker(folder / f"launch_{draft}_{ranks}", ranks, worker="sharded_training_worker.py", draft=draft, runs=runs)


def handed_over(folder: Path, before: str, step: int, after: str) -> str:
    """The checkpoint of one run, in a new run's folder."""
    name = f"checkpoint-{step}"
    shutil.copytree(folder / before / "run" / name, folder / after / "run" / name)
    return str(folder / after / "run" / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Launches of many runs each: alone, two ranks with a replicated and with a sharded draft, four, alone again."""
    folder = tmp_path_factory.mktemp("runs")
    for family in ("llama_tied", "qwen3_moe"):
        tiny_family(family).save_pretrained(folder / family)
    tied, moe = str(folder / "llama_tied"), str(folder / "qwen3_moe")

    def run(name, ranks, target=tied, sharding="none", records=20, fields=None, **spec):
        spec |= {"target": target, "sharding": sharding, "records": records, "args": args(ranks, **(fields or {}))}
        return {"out": str(folder / name), **spec}

    eagle1 = {"method": "eagle1", "fields": {"max_steps": 4, "feature_noise": "none", "ttt_steps": None}}
    dflash = {"method": "dflash", "options": {"draft_num_layers": 2}, "prompts": 6}
    dflash["fields"] = {"max_steps": 4, "num_anchors": 3, "ttt_steps": None}
    evaluated = {"eval_strategy": "steps", "eval_steps": 3}
    best = {"load_best_model_at_end": True, "bf16": True, "learning_rate": 0.3}  # gets worse
    uneven = {"records": 15, "evaluate": True, "fields": {**evaluated, "save_strategy": "no"}}
    launch(folder, "ddp", 1, [
        run("alone", 1, save=True, prompts=6),
        run("alone_moe", 1, moe, fields={"max_steps": 4}, prompts=6),
        run("alone_eagle1", 1, moe, **eagle1),
        run("alone_dflash", 1, moe, **dflash),
        run("alone_one_prompt", 1, **ONE_PROMPT),
        run("alone_bare", 1, unsupervised=8, fields=half(1)),
    ])  # fmt: skip
    to_ddp, to_fsdp2 = handed_over(folder, "alone", 3, "from_alone"), handed_over(folder, "alone", 3, "from_alone_2")
    launch(folder, "ddp", 2, [
        run("from_alone", 2, sharding="fsdp2", resume=to_ddp, stop_at=6),
        run("tensor", 2, moe, "tensor", fields={"max_steps": 4}, prompts=6),
        run("expert", 2, moe, "expert", fields={"max_steps": 4}, prompts=6),
        run("eagle1", 2, moe, "expert", **eagle1),
        run("dflash", 2, moe, "expert", **dflash),
        run("dflash_tensor", 2, moe, "tensor", **dflash),
        run("uneven", 2, **uneven),
        run("uneven_fsdp2", 2, sharding="fsdp2", **uneven),
        run("uneven_tensor", 2, sharding="tensor", **uneven),
    ])  # fmt: skip
    from_ddp = handed_over(folder, "from_alone", 6, "from_ddp")
    launch(folder, "fsdp2", 2, [
        run("from_ddp", 2, sharding="tensor", resume=from_ddp),
        run("from_alone_2", 2, resume=to_fsdp2, stop_at=6),
        run("fsdp2", 2, sharding="fsdp2", save=True, prompts=6),
        run("best", 2, moe, "expert", save=True, evaluate=True, fields={**evaluated, **best}),
        run("dflash_fsdp2", 2, moe, "fsdp2", **dflash),
        run("one_prompt", 2, **ONE_PROMPT),
        run("bare", 2, sharding="fsdp2", unsupervised=8, fields=half(2)),
    ])  # fmt: skip
    launch(folder, "fsdp2", 4, [run("one_prompt_groups", 4, sharding="fsdp2", shard_size=2, **ONE_PROMPT)])
    back = handed_over(folder, "from_alone_2", 6, "back")
    launch(folder / "again", "ddp", 1, [run("back", 1, resume=back)])
    return folder


@pytest.fixture(scope="module")
def smollm2_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    launch(folder, "ddp", 1, [smollm2(folder / "alone", 1, "none")])
    launch(folder, "ddp", 2, [smollm2(folder / "ddp", 2, "fsdp2")])
    launch(folder, "fsdp2", 2, [smollm2(folder / "fsdp2", 2, "none")])
    return folder


def logged(folder: Path, name: str) -> dict[int, float]:
    return {e["step"]: e[name] for e in json.loads((folder / "log.json").read_text()) if name in e}


@pytest.mark.parametrize("after", ["from_alone", "from_ddp", "from_alone_2", "back"])
def test_a_run_goes_on_wherever_it_is_resumed(after, runs):
    """1 -> 2 ranks -> FSDP2 draft, 1 -> FSDP2 draft -> 1, target sharded and not, each in the middle of an epoch."""
    wanted, found = losses(runs / "alone"), losses(runs / after)
    assert len(wanted) == 9 and len(found) == (9 if after in ("from_ddp", "back") else 6)
    assert found == pytest.approx({step: wanted[step] for step in found}, rel=1e-5)


@pytest.mark.parametrize("folder", ["checkpoint-9", "."])
def test_an_fsdp2_drafts_checkpoint_is_a_replicated_ones(folder, runs):
    wanted, found = runs / "alone" / "run" / folder, runs / "fsdp2" / "run" / folder
    names = {p.name for p in wanted.iterdir() if p.is_file() and "rng_state" not in p.name}
    assert names == {p.name for p in found.iterdir() if p.is_file() and "rng_state" not in p.name}
    a, b = load_file(wanted / "model.safetensors"), load_file(found / "model.safetensors")
    assert a.keys() == b.keys() and "embed_tokens.weight" not in a
    for name, tensor in a.items():
        assert torch.allclose(b[name].float(), tensor.float(), rtol=1e-4, atol=1e-5), name
    configs = [json.loads((path / "config.json").read_text()) for path in (wanted, found)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("run", "alone"),
    [
        *(("fsdp2", "alone"), ("tensor", "alone_moe"), ("expert", "alone_moe"), ("eagle1", "alone_eagle1")),
        *((run, "alone_dflash") for run in ("dflash", "dflash_tensor", "dflash_fsdp2")),
    ],
)
def test_loss_and_decoded_acceptance_are_those_of_one_process(run, alone, runs):
    assert losses(runs / run) == pytest.approx(losses(runs / alone), rel=1e-5)
    if run != "eagle1":
        wanted = logged(runs / alone, "acceptance_length")
        assert logged(runs / run, "acceptance_length") == wanted and len(wanted) >= 1


@pytest.mark.parametrize("run", ["one_prompt", "one_prompt_groups"])
def test_ranks_without_a_prompt_do_not_hang(run, runs):
    """An FSDP2 draft is gathered by all ranks, also by those, or those groups of a sharded target, with no prompt."""
    wanted = logged(runs / "alone_one_prompt", "acceptance_length")
    assert list(wanted) == [3] and wanted[3] > 1
    assert logged(runs / run, "acceptance_length") == wanted
    assert losses(runs / run) == pytest.approx(losses(runs / "alone_one_prompt"), rel=1e-5)


def test_batches_without_an_answer_do_not_hang_an_fsdp2_draft(runs):
    """8 of 20 chats, one a batch: many a rank has nothing to train on, beside one that has."""
    assert losses(runs / "bare") == pytest.approx(losses(runs / "alone_bare"), rel=1e-5)


@pytest.mark.parametrize("sharding", ["fsdp2", "tensor"])
def test_a_rank_whose_data_end_early_does_not_hang(sharding, runs):
    """15 chats and 5 held-out ones on two ranks, evaluated before and during training."""
    wanted, found = runs / "uneven", runs / f"uneven_{sharding}"
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-5)
    assert logged(found, "eval_loss") == pytest.approx(logged(wanted, "eval_loss"), rel=1e-5)


def test_an_fsdp2_draft_in_bf16_takes_its_best_checkpoint(runs):
    """The one with the lowest loss is what is saved in the end, whatever the last one was."""
    log = logged(runs / "best", "eval_loss")
    assert set(log) == {3, 6, 9}
    best = runs / "best" / "run" / f"checkpoint-{min(log, key=log.get)}"
    wanted, found = (load_file(folder / "model.safetensors") for folder in (best, best.parent))
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], x) for name, x in wanted.items())


@pytest.mark.timeout(600)  # every step of the first gathers 540 MB through gloo
@pytest.mark.parametrize("run", ["ddp", "fsdp2"])
def test_smollm2(run, smollm2_runs):
    """Real weights, real text: a replicated draft beside an FSDP2 target, and an FSDP2 draft."""
    wanted = losses(smollm2_runs / "alone")
    assert len(wanted) == SMOLLM2_STEPS and 0 < wanted[SMOLLM2_STEPS] < wanted[1]
    assert losses(smollm2_runs / run) == pytest.approx(wanted, rel=1e-5)


def test_another_number_of_rows_a_step_is_refused(runs, tmp_path):
    shutil.copytree(runs / "alone" / "run" / "checkpoint-3", tmp_path / "other" / "run" / "checkpoint-3")
    spec = {"out": str(tmp_path / "other"), "target": str(runs / "llama_tied"), "records": 20, "args": args(2)}
    with pytest.raises(AssertionError, match="2 rows per step, but .*checkpoint-3 was written with 4: keep the"):
        launch(tmp_path, "ddp", 1, [{**spec, "resume": "last"}])
