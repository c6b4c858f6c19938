"""The tokens that an unroll meets, beside their definition row by row."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.drafts.row_layout import RowLayout
from hf_eagle.drafts.unroll_plan import StepTokens, UnrollPlan


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    chosen=st.sets(st.integers(0, 19)),
    num_steps=st.integers(1, 4),
)
def test_rows_and_keys_meet_the_tokens_behind_them(lengths, chosen, num_steps):
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    last = documents.numel() - 1
    rows = torch.tensor(sorted(row for row in chosen if row <= last), dtype=torch.long)
    layout = RowLayout.of(rows, documents)
    tokens = StepTokens.of(layout, num_steps, documents.numel())

    by_rows = [[min(row + 1 + step, last) for row in rows.tolist()] for step in range(num_steps)]
    by_keys = [min(key + 1, last) for key in layout.keys.tolist()]
    asked = sorted({token for step in by_rows for token in step})
    assert tokens.ids.tolist() == sorted({*asked, *by_keys})
    assert tokens.ids[tokens.of_key].tolist() == by_keys
    assert tokens.ids[tokens.of_row].tolist() == by_rows
    assert tokens.ids[tokens.asked].tolist() == asked
    assert tokens.ids[tokens.asked][tokens.asked_by_row].tolist() == by_rows


def test_all_tensors_of_a_plan_are_changed_together():
    """Moved or pinned: what was counted on the host stays, and no tensor is left behind."""
    rows = [{"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 1, 1, 1, 1], "document_lengths": [2, 3]}] * 2
    plan = UnrollPlan.of(EagleDataCollator(0)(rows), 2)
    moved = plan.to("meta")

    def tensors(x) -> dict[str, torch.Tensor]:
        found = {}
        for name, value in vars(x).items():
            if isinstance(value, torch.Tensor):
                found[name] = value
            elif hasattr(value, "__dict__"):
                found |= {f"{name}.{inner}": tensor for inner, tensor in tensors(value).items()}
        return found

    assert {x.device.type for x in tensors(moved).values()} == {"meta"}
    assert {n: (x.shape, x.dtype) for n, x in tensors(moved).items()} == {
        n: (x.shape, x.dtype) for n, x in tensors(plan).items()
    }
    assert moved.layout.spans is plan.layout.spans and moved.segments.bounds == plan.segments.bounds
    assert moved.packed == plan.packed and moved.num_steps == plan.num_steps
