"""Decoding behind prompts with images and videos: the target's own output, and the counts of a plain simulation."""

import pytest
import torch
from replayed import replayed
from tiny import unrolled
from tiny_vision import NAMES, chat, image, processed, text, tiny_vision_model, video, vision_processor

from hf_eagle.decoding import speculative_generate
from hf_eagle.decoding.generate import target_generate
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle3.configuration import EagleConfig
from hf_eagle.targets.target import FrozenTarget


TAPS, LONGEST = [4, 5, 7], 14
PROMPTS = [
    chat([image(1), text("hello"), image(2, 24, 16)]),
    chat("how are you?"),
    chat([video(3), text("see")], "the cat", [image(4, 8, 24), text("and")]),
]


KINDS = [(name, rope, "token") for name in NAMES for rope in ("1d", "mrope")] + [("qwen3-vl", "1d", "vision")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def trained(request):
    return teach(*request.param)


def teach(name, rope, embeds="token"):
    """Target, processor and a draft that was taught the target's answers to prompts of this kind."""
    target, processor = FrozenTarget(tiny_vision_model(name), TAPS), vision_processor(name)
    torch.manual_seed(1)
    draft = new_draft(
        EagleConfig.from_target(target.model.config, rope=rope, tap_ids=TAPS, image_embeddings=embeds),
        target.embedding_weight(),
        head_weight=target.head_weight(),
    )
    optimizer = torch.optim.Adam([p for p in draft.parameters() if p.requires_grad], lr=3e-3)
    rows = [answered(target, prompts(processor, [messages])) for messages in PROMPTS]
    for _ in range(25):
        for inputs, length in rows:
            seen = target(**inputs)
            positions = draft.select_positions(seen, None)
            places = torch.arange(length - 1, inputs["input_ids"].shape[1] - 3)
            more = {"position_ids": positions, "embeddings": draft.select_embeddings(seen)}
            hidden = unrolled(draft, inputs["input_ids"], seen.taps, places, 2, **more).hidden_states
            labels = [inputs["input_ids"][0, places + 2 + step] for step in range(2)]
            losses = (
                torch.nn.functional.cross_entropy(draft.lm_head(h), x) for h, x in zip(hidden, labels, strict=True)
            )
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
    return target, processor, draft.eval()


def prompts(processor, conversations):
    """Prompts as a user makes them, padded on the left."""
    return processed(processor, conversations, "left", add_generation_prompt=True)


def extended(inputs, more: list[int]) -> dict:
    """A prompt with tokens behind it."""
    longer = {"input_ids": torch.tensor([more]), "attention_mask": torch.ones(1, len(more), dtype=torch.long)}
    longer["mm_token_type_ids"] = torch.zeros(1, len(more), dtype=torch.long)
    return {k: torch.cat([x, longer[k].to(x.dtype)], 1) if k in longer else x for k, x in inputs.items()}


def answered(target, inputs):
    """A prompt with the target's greedy answer behind it, and the prompt's length."""
    length = inputs["input_ids"].shape[1]
    made = target.model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST, eos_token_id=None, pad_token_id=0)
    return extended(inputs, made[0, length:].tolist()), length


@torch.no_grad()
def simulated(target, draft, inputs, count):
    """Answer and accepted tokens of every round, by whole forwards over the prompt and all that follows it."""

    def choose(tokens):
        return int(target.model(**extended(inputs, tokens) if tokens else inputs).logits[0, -1].argmax())

    answer, rounds = [choose([])], []
    while len(answer) < LONGEST:
        seen = target(**extended(inputs, answer[:-1]) if len(answer) > 1 else inputs)
        positions, proposed = seen.position_ids, []
        for step in range(count):
            whole = extended(inputs, answer + proposed)["input_ids"]
            behind = whole.shape[1] - seen.taps.shape[1]
            taps = torch.nn.functional.pad(seen.taps, (0, 0, 0, behind))
            places = None
            if draft.config.mrope_section is not None and positions is not None:
                places = torch.nn.functional.pad(positions, (0, behind))
            row, shown = torch.tensor([seen.taps.shape[1] - 1]), draft.select_embeddings(seen)
            if shown is not None:
                shown = torch.cat([shown, draft.embed_tokens(whole[:, -behind:])], 1)
            hidden = unrolled(draft, whole, taps, row, step + 1, position_ids=places, embeddings=shown).hidden_states
            proposed.append(int(draft.lm_head(hidden[-1, 0]).argmax()))
        accepted = 0
        while accepted < count and proposed[accepted] == choose(answer + proposed[:accepted]):
            accepted += 1
        answer += [*proposed[:accepted], choose(answer + proposed[:accepted])]
        rounds.append(accepted)
    return answer[:LONGEST], rounds


def test_chain_equals_the_target_and_the_simulation(trained):
    target, processor, draft = trained
    all_accepted = []
    for messages in PROMPTS:
        inputs = prompts(processor, [messages])
        out = speculative_generate(target, draft, **inputs, num_speculative_tokens=3, max_new_tokens=LONGEST)
        wanted, length = answered(target, inputs)
        answer, rounds = simulated(target, draft, inputs, 3)
        assert out.sequences[0].tolist() == wanted["input_ids"][0].tolist()
        assert out.answers[0] == answer
        assert out.drafts == [len(rounds)]
        assert out.accepted_per_position == [[sum(n > k for n in rounds) for k in range(3)]]
        assert target_generate(target, **inputs, max_new_tokens=LONGEST) == out.answers
        all_accepted += rounds
    assert max(all_accepted) >= 1  # or rows that are rolled back alone would be looked at


def test_batches_and_trees_give_the_same(trained):
    """Prompts of several lengths, with media and without, in one batch; and a tree instead of a chain."""
    target, processor, draft = trained
    alone = [
        speculative_generate(target, draft, **prompts(processor, [m]), num_speculative_tokens=3, max_new_tokens=LONGEST)
        for m in PROMPTS
    ]
    inputs = prompts(processor, PROMPTS)
    assert (inputs["attention_mask"] == 0).any()
    batch = speculative_generate(target, draft, **inputs, num_speculative_tokens=3, max_new_tokens=LONGEST)
    assert batch.answers == [one.answers[0] for one in alone]
    assert batch.accepted_per_position == [one.accepted_per_position[0] for one in alone]
    assert target_generate(target, **inputs, max_new_tokens=LONGEST) == batch.answers
    tree = {"method": "tree", "depth": 3, "top_k": 2, "total_tokens": 8, "max_new_tokens": LONGEST}
    assert speculative_generate(target, draft, **inputs, **tree).answers == batch.answers
    chain = {"method": "tree", "depth": 3, "top_k": 1, "total_tokens": 3, "max_new_tokens": LONGEST}
    as_tree = speculative_generate(target, draft, **inputs, **chain)
    assert (as_tree.answers, as_tree.accepted_per_position) == (batch.answers, batch.accepted_per_position)


def test_what_the_model_remembers_does_not_matter():
    """`generate` leaves the last prompt's offset in the model; text that comes next must not be moved by it."""
    target, processor = FrozenTarget(tiny_vision_model(), TAPS), vision_processor()
    draft = new_draft(EagleConfig.from_target(target.model.config, tap_ids=TAPS), target.embedding_weight())
    plain = {k: x for k, x in prompts(processor, [PROMPTS[1]]).items() if k != "mm_token_type_ids"}
    before = speculative_generate(target, draft, **plain, max_new_tokens=LONGEST).answers
    answered(target, prompts(processor, [PROMPTS[0]]))
    assert target.model.model.rope_deltas.item() < 0
    assert speculative_generate(target, draft, **plain, max_new_tokens=LONGEST).answers == before


def test_pixels_matter_and_strangers_are_refused():
    target, processor = FrozenTarget(tiny_vision_model(), TAPS), vision_processor()
    inputs = prompts(processor, [PROMPTS[0]])
    answers = target_generate(target, **inputs, max_new_tokens=LONGEST)
    assert (
        target_generate(target, **inputs | {"pixel_values": -inputs["pixel_values"]}, max_new_tokens=LONGEST) != answers
    )
    with pytest.raises(TypeError, match="`labels` is not an argument of decoding"):
        target_generate(target, **inputs, max_new_tokens=2, labels=inputs["input_ids"])
    with pytest.raises(ValueError, match="`second_per_grid_ts`, which the forward of Qwen3VL"):
        target_generate(target, **inputs, max_new_tokens=2, second_per_grid_ts=torch.ones(1))
    with pytest.raises(ValueError, match="`mm_token_type_ids` has shape"):
        target_generate(target, **inputs | {"mm_token_type_ids": torch.zeros(1, 2)}, max_new_tokens=2)


def test_replaying_answers_counts_as_decoding_does(trained):
    """With media and without in one batch, and alone."""
    target, processor, draft = trained
    shapes = [{"num_speculative_tokens": 3}, {"method": "tree", "depth": 3, "top_k": 2, "total_tokens": 8}]
    for messages in (PROMPTS, PROMPTS[:1]):
        for decoded, again in replayed(target, draft, prompts(processor, messages), shapes, LONGEST):
            assert again == decoded
