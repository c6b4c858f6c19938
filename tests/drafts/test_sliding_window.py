"""A draft with a sliding window: unrolled against the text row by row, planned, decoded, written and refused."""

import json

import pytest
import torch
from decoding_reference import reference_chain, reference_tree
from reference import ReferenceDraft, reference_loss
from tiny import pad_batch, random_chats, tiny_llama, tiny_pair, unrolled

from hf_eagle.decoding import speculative_generate
from hf_eagle.drafts.build import load_draft
from hf_eagle.drafts.dflash.configuration import DFlashConfig
from hf_eagle.drafts.eagle1.configuration import Eagle1Config
from hf_eagle.drafts.eagle3.configuration import EagleConfig, draft_config
from hf_eagle.drafts.eagle3.training import Eagle3Training
from hf_eagle.drafts.unroll_plan import UnrollPlan
from hf_eagle.losses.objectives import DraftObjective
from hf_eagle.losses.supervision import SupervisionPlan, supervised_steps


class WindowedReference(ReferenceDraft):
    """At step `s` a row has the keys of its own steps, and those of the `window - s` newest tokens of the target."""

    def unroll(self, ids, taps, row, steps):
        context = [self.qkv(ids[j + 1], self.combine(taps[j]), j)[1:] for j in range(row + 1)]
        own, hidden, out = [], self.combine(taps[row]), []
        for step in range(steps):
            token = ids[row + 1 + step] if row + 1 + step < len(ids) else 0
            query, *key_value = self.qkv(token, hidden, row + step)
            own += [key_value] * (step > 0)
            seen = context[max(0, row + 1 - (self.c.draft_sliding_window - step)) :] + own
            hidden = self.layer(hidden, query, *zip(*seen, strict=True))
            out.append(self.norm(hidden, "norm"))
            if self.c.norm_output:
                hidden = out[-1]
        return out


def gradients(draft, loss):
    draft.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in draft.named_parameters() if p.requires_grad}


def taught(target, draft, ids, mask, documents, features, steps):
    """Summed losses of each step, as the trainer has them."""
    plan = SupervisionPlan.of(supervised_steps(mask, documents, steps))
    hidden = features.last_hidden.flatten(0, 1)[plan.positions]
    objective = DraftObjective().bind(plan, target.distribution(hidden, draft.draft_ids), torch.ones(steps))
    where = {"documents": documents, "position_ids": positions_in(documents)}
    return unrolled(draft, ids, features.taps, plan.rows, steps, objective, **where)


def positions_in(documents):
    """Counted from each document's first token."""
    places = torch.arange(documents.shape[1]).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(starts, places, 0).cummax(1).values


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("window", "steps", "fields"),
    [(3, 2, {}), (16, 2, {}), (16, 4, {"fc_norm": True, "norm_output": True}), (16, 7, {}), (200, 7, {})],
)
def test_loss_and_gradients_equal_the_text_row_by_row(window, steps, fields, packed, implementation):
    target, draft = tiny_pair(draft_sliding_window=window, **fields)
    draft.set_attn_implementation(implementation)
    records = random_chats(3, seed=window + steps, longest=60)
    if packed:
        apart = [target(torch.tensor([record["input_ids"]])) for record in records]
        ids, mask = (torch.tensor([sum((r[name] for r in records), [])]) for name in ("input_ids", "loss_mask"))
        documents = torch.cat([torch.full((1, len(r["input_ids"])), n) for n, r in enumerate(records)], 1)
        features = type(apart[0])(
            taps=torch.cat([f.taps for f in apart], 1), last_hidden=torch.cat([f.last_hidden for f in apart], 1)
        )
    else:
        batch = pad_batch(records, side="left")
        ids, mask = batch["input_ids"], batch["loss_mask"]
        documents = batch["attention_mask"] - 1
        features = target(ids, batch["attention_mask"])

    output = taught(target, draft, ids, mask, documents, features, steps)
    sums, correct, _ = reference_loss(draft, target.model, records, steps, reference=WindowedReference)
    assert output.correct.tolist() == correct
    torch.testing.assert_close(output.loss_sums, sums, rtol=2e-5, atol=1e-5)
    ours, theirs = gradients(draft, output.loss), gradients(draft, sums.sum())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_training_plans_with_the_window_and_the_draft_takes_no_other_plan():
    batch = pad_batch(random_chats(2, seed=4))
    training = Eagle3Training(DraftObjective(), num_steps=2, window=4)
    plan = training.plan(batch, draw=None)
    assert plan.layout.window == plan.each(torch.clone).layout.window == 4
    assert len(plan.layout.keys) < len(UnrollPlan.of(batch, 2).layout.keys)

    target, draft = tiny_pair()
    with pytest.raises(ValueError, match="`plan` has the window 4, but the draft has None: plan with `window=None`."):
        draft(batch["input_ids"], target(batch["input_ids"], batch["attention_mask"]), plan)
    with pytest.raises(ValueError, match="`draft_sliding_window` is 7, but must be above the 7 steps"):
        Eagle3Training(DraftObjective(), window=7)


def test_decoding_shows_the_draft_its_window():
    target, draft = tiny_pair(draft_sliding_window=6)
    prompt = torch.randint(3, 96, (9,), generator=torch.Generator().manual_seed(1))
    chain = speculative_generate(target, draft, prompt[None], num_speculative_tokens=3, max_new_tokens=20)
    answer, _, _, rounds = reference_chain(target, draft, prompt.tolist(), 3, 20, window=6)
    assert (chain.answers, chain.accepted_by_round) == ([answer], [rounds])

    sizes = {"method": "tree", "depth": 3, "top_k": 3, "total_tokens": 9}
    tree = speculative_generate(target, draft, prompt[None], max_new_tokens=20, **sizes)
    answer, _, _, rounds = reference_tree(target, draft, prompt.tolist(), 3, 3, 9, 20, window=6)
    assert (tree.answers, tree.accepted_by_round) == ([answer], [rounds])

    with pytest.raises(ValueError, match="`draft_sliding_window` of the draft is 6, but must be above the 6 tokens"):
        speculative_generate(target, draft, prompt[None], num_speculative_tokens=6, max_new_tokens=4)


def test_the_config_has_both_keys_of_vllm_and_remembers_the_window(tmp_path):
    _, draft = tiny_pair(draft_sliding_window=6)
    draft.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["layer_types"], written["sliding_window"]) == (["sliding_attention"], 6)
    assert written["draft_sliding_window"] == load_draft(tmp_path).config.draft_sliding_window == 6

    _, draft = tiny_pair()
    assert not {"layer_types", "sliding_window", "draft_sliding_window"} & draft.config.to_diff_dict().keys()


@pytest.mark.parametrize("window", [1, 0, -4, 8.0, True])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(ValueError, match="`draft_sliding_window` of an EAGLE-3 draft must be a whole number from 2"):
        EagleConfig.from_target(tiny_llama().config, 40, draft_sliding_window=window)


def test_kinds_that_servers_run_without_a_window_refuse_one():
    config = tiny_llama().config
    with pytest.raises(ValueError, match="`draft_sliding_window` of an EAGLE-1 draft must be None, got 8"):
        Eagle1Config.from_target(config, draft_sliding_window=8)
    with pytest.raises(ValueError, match="`draft_sliding_window` of a DFlash draft must be None, got 8"):
        DFlashConfig(draft_sliding_window=8)
    with pytest.raises(ValueError, match="`draft_sliding_window` is 8, but the draft has latent attention, which"):
        draft_config(config, "mla", draft_sliding_window=8)
