"""Chain decoding: lossless, and with the counts of a simulation that keeps no cache and shares no code with it."""

import pytest
import torch
from chain_models import VOCAB, generate, make_draft, make_target, random_prompts
from torch.nn.functional import silu
from transformers import MistralConfig

from hf_eagle.decoding.chain import chain_generate, greedy_generate


VARIANTS = {
    "eagle3": dict(draft_vocab_size=40, tap_ids=[0, 2, 3]),
    "full_vocabulary": dict(tap_ids=[0, 2, 3]),
    "eagle3.1": dict(draft_vocab_size=40, tap_ids=[0, 2, 3], fc_norm=True, norm_output=True),
    "four_taps": dict(draft_vocab_size=40, tap_ids=[0, 1, 2, 3], norm_output=True),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    variant = VARIANTS[request.param]
    target = make_target(tap_ids=variant["tap_ids"])
    return target, make_draft(target, **variant)


# the reference: plain formulas of the contract, every hidden state recomputed from the first token in every round


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, theta):  # (rows, heads, head_dim), row i at position i
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def reference_draft(draft, embedding, hidden, next_ids):
    """All rows at once, (rows, hidden) -> normed and fed-back hidden states of the last row."""
    w, c = draft.state_dict(), draft.config
    layer = {name.removeprefix("midlayer."): value for name, value in w.items() if name.startswith("midlayer.")}
    eps, heads = c.rms_norm_eps, c.num_attention_heads
    x = torch.cat(
        [
            rms_norm(embedding[next_ids], layer["input_layernorm.weight"], eps),
            rms_norm(hidden, layer["hidden_norm.weight"], eps),
        ],
        dim=-1,
    )
    q, k, v = ((x @ layer[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, c.head_dim)) for n in "qkv")
    q, k = rotate(q, c.rope_parameters["rope_theta"]), rotate(k, c.rope_parameters["rope_theta"])
    attended = []
    for head in range(heads):
        group = head * c.num_key_value_heads // heads
        scores = k[:, group] @ q[-1, head] / c.head_dim**0.5
        attended.append(scores.softmax(0) @ v[:, group])
    u = hidden[-1] + layer["self_attn.o_proj.weight"] @ torch.cat(attended)
    n = rms_norm(u, layer["post_attention_layernorm.weight"], eps)
    gated = silu(layer["mlp.gate_proj.weight"] @ n) * (layer["mlp.up_proj.weight"] @ n)
    out = u + layer["mlp.down_proj.weight"] @ gated
    normed = rms_norm(out, w["norm.weight"], eps)
    return normed, normed if c.norm_output else out


def reference_features(target, draft, tokens):
    w, c = draft.state_dict(), draft.config
    states = target.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    taps = [states[tap_id][0] for tap_id in target.tap_ids]
    if c.fc_norm:
        taps = [rms_norm(tap, w[f"fc_norm.{i}.weight"], c.rms_norm_eps) for i, tap in enumerate(taps)]
    return torch.cat(taps, dim=-1) @ w["fc.weight"].T


@torch.no_grad()
def reference_chain(target, draft, prompt, num_speculative_tokens, max_new_tokens, eos_token_ids=()):
    """(answer, drafts, accepted per position, the numbers of tokens accepted in each round)"""

    def choose(tokens):
        return int(target.model(torch.tensor([tokens])).logits[0, -1].argmax())

    def cut(tokens):
        ends = [i for i, token in enumerate(tokens) if token in eos_token_ids]
        return tokens[: min([max_new_tokens, *(end + 1 for end in ends)])]

    embedding = target.model.get_input_embeddings().weight
    answer, rounds = [choose(prompt)], []
    while len(cut(answer)) == len(answer) < max_new_tokens and answer[-1] not in eos_token_ids:
        tokens = prompt + answer
        hidden, next_ids, proposed = reference_features(target, draft, tokens[:-1]), tokens[1:], []
        for _ in range(num_speculative_tokens):
            normed, fed_back = reference_draft(draft, embedding, hidden, next_ids)
            draft_id = int((draft.lm_head.weight @ normed).argmax())
            proposed.append(draft_id if draft.d2t is None else draft_id + int(draft.d2t[draft_id]))
            hidden, next_ids = torch.cat([hidden, fed_back[None]]), [*next_ids, proposed[-1]]
        accepted = 0
        while accepted < num_speculative_tokens and choose(tokens + proposed[:accepted]) == proposed[accepted]:
            accepted += 1
        answer += [*proposed[:accepted], choose(tokens + proposed[:accepted])]
        rounds.append(accepted)
    counts = [sum(accepted > k for accepted in rounds) for k in range(num_speculative_tokens)]
    return cut(answer), len(rounds), counts, rounds


@pytest.mark.parametrize("num_speculative_tokens", [1, 2, 3, 4, 5])
def test_output_and_counts_equal_a_simulation_without_caches(pair, num_speculative_tokens):
    target, draft = pair
    seen = []
    for prompt in random_prompts(6, 5, seed=3):
        out = chain_generate(
            target, draft, prompt[None], num_speculative_tokens=num_speculative_tokens, max_new_tokens=24
        )
        answer, drafts, counts, rounds = reference_chain(target, draft, prompt.tolist(), num_speculative_tokens, 24)
        assert out.sequences[0].tolist() == prompt.tolist() + answer
        assert out.new_tokens == 24
        assert (out.drafts, out.accepted_per_position) == (drafts, counts)
        assert torch.equal(out.sequences, generate(target, prompt[None], 24))
        seen += rounds
    # a draft that is never, or always, right would leave the roll-back untested
    assert {0, 1, num_speculative_tokens} <= set(seen)


def test_every_max_new_tokens_cuts_like_generate_and_counts_whole_rounds(pair):
    target, draft = pair
    prompt = random_prompts(6, 5, seed=3)[:1]
    for max_new_tokens in range(1, 13):
        out = chain_generate(target, draft, prompt, num_speculative_tokens=4, max_new_tokens=max_new_tokens)
        answer, drafts, counts, _ = reference_chain(target, draft, prompt[0].tolist(), 4, max_new_tokens)
        assert torch.equal(out.sequences, generate(target, prompt, max_new_tokens))
        assert (out.new_tokens, out.drafts, out.accepted_per_position) == (len(answer), drafts, counts)


def test_stops_at_every_end_of_sequence_token_like_generate(pair):
    target, draft = pair
    prompt = random_prompts(1, 5, seed=4)
    whole = generate(target, prompt, 24)[0, 5:].tolist()
    for token in set(whole):
        out = chain_generate(
            target, draft, prompt, num_speculative_tokens=3, max_new_tokens=24, eos_token_ids={token, VOCAB - 1}
        )
        assert torch.equal(out.sequences, generate(target, prompt, 24, {token, VOCAB - 1}))
        assert out.new_tokens == out.sequences.shape[1] - 5 <= whole.index(token) + 1
        answer, drafts, counts, _ = reference_chain(
            target, draft, prompt[0].tolist(), 3, 24, eos_token_ids={token, VOCAB - 1}
        )
        assert (out.drafts, out.accepted_per_position) == (drafts, counts)


def test_tokens_accepted_behind_the_cut_are_counted():
    target = make_target()
    draft = make_draft(target, tap_ids=[0, 2, 3])
    found = 0
    for prompt in random_prompts(8, 5, seed=5):
        out = chain_generate(target, draft, prompt[None], num_speculative_tokens=5, max_new_tokens=2)
        assert (out.new_tokens, out.drafts) == (2, 1)
        found += sum(out.accepted_per_position) > 1
    assert found > 0


def test_prompt_of_one_token(pair):
    target, draft = pair
    for token in (1, 17, 40):
        prompt = torch.tensor([[token]])
        out = chain_generate(target, draft, prompt, num_speculative_tokens=3, max_new_tokens=20)
        _, drafts, counts, _ = reference_chain(target, draft, [token], 3, 20)
        assert torch.equal(out.sequences, generate(target, prompt, 20))
        assert (out.drafts, out.accepted_per_position) == (drafts, counts)


def test_sliding_window_target_is_lossless_past_its_window():
    target = make_target(MistralConfig, sliding_window=8)
    draft = make_draft(target, tap_ids=[0, 2, 3])
    for prompt in random_prompts(4, 11, seed=6):
        out = chain_generate(target, draft, prompt[None], num_speculative_tokens=3, max_new_tokens=30)
        assert torch.equal(out.sequences, generate(target, prompt[None], 30))
        assert sum(out.accepted_per_position) > 0


def test_greedy_generate_is_generate():
    target = make_target()
    for prompt in random_prompts(4, 5, seed=7):
        expected = generate(target, prompt[None], 20)
        assert torch.equal(greedy_generate(target.model, prompt[None], max_new_tokens=20), expected)
        eos = int(expected[0, 9])
        shorter = greedy_generate(target.model, prompt[None], max_new_tokens=20, eos_token_ids=[eos])
        assert torch.equal(shorter, generate(target, prompt[None], 20, [eos]))


class TestErrors:
    def call(self, target=None, draft=None, prompt=((1, 2),), **arguments):
        target = target or make_target()
        draft = draft or make_draft(target, tap_ids=[0, 2, 3], steps=0)
        return chain_generate(target, draft, torch.tensor(prompt), **dict(max_new_tokens=4) | arguments)

    def test_arguments_out_of_range(self):
        with pytest.raises(ValueError, match="`num_speculative_tokens` must be at least 1, but is 0"):
            self.call(num_speculative_tokens=0)
        with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1, but is 0"):
            self.call(max_new_tokens=0)
        with pytest.raises(ValueError, match=r"`input_ids` must be one prompt .* shape \(2, 1\)"):
            self.call(prompt=((1,), (2,)))

    def test_draft_of_another_target(self):
        draft = make_draft(make_target(), tap_ids=[0, 2, 3], steps=0)
        with pytest.raises(ValueError, match="`draft` was made for a vocabulary of 67 tokens, but the target has 80"):
            self.call(make_target(vocab_size=80), draft)
        with pytest.raises(ValueError, match="`draft` was made for a target with hidden size 32, .* is 64"):
            self.call(make_target(hidden_size=64), draft)
        with pytest.raises(ValueError, match=r"trained on the taps \[0, 2, 3\], but the target takes \[1, 2, 3\]"):
            self.call(make_target(tap_ids=(1, 2, 3)), draft)
