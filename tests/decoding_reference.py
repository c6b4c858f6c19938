"""Speculative decoding in plain formulas: every hidden state recomputed from the first token, no caches, no masks."""

import torch
from torch.nn.functional import silu


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, theta):  # (rows, heads, head_dim), row i at position i
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def reference_draft(draft, embedding, hidden, next_ids, window=None):
    """All rows at once, (rows, hidden) -> normed and fed-back hidden states of the last row; it sees `window` keys."""
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
    if window is not None:
        k, v = k[-window:], v[-window:]
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
def reference_chain(target, draft, prompt, num_speculative_tokens, max_new_tokens, eos_token_ids=(), window=None):
    """(answer, drafts, accepted per position, the numbers of tokens accepted in each round)"""

    embedding = target.model.get_input_embeddings().weight

    def propose(tokens):
        hidden, next_ids, proposed = reference_features(target, draft, tokens[:-1]), tokens[1:], []
        for _ in range(num_speculative_tokens):
            normed, fed_back = reference_draft(draft, embedding, hidden, next_ids, window)
            draft_id = int((draft.lm_head.weight @ normed).argmax())
            proposed.append(draft_id if draft.d2t is None else draft_id + int(draft.d2t[draft_id]))
            hidden, next_ids = torch.cat([hidden, fed_back[None]]), [*next_ids, proposed[-1]]
        return {tuple(proposed[: count + 1]) for count in range(num_speculative_tokens)}

    return reference_decode(target, propose, prompt, num_speculative_tokens, max_new_tokens, eos_token_ids)


@torch.no_grad()
def reference_tree(target, draft, prompt, depth, top_k, total_tokens, max_new_tokens, eos_token_ids=(), window=None):
    """As `reference_chain`, with the dynamic tree of EAGLE-2."""
    embedding = target.model.get_input_embeddings().weight

    def propose(tokens):
        features = reference_features(target, draft, tokens[:-1])
        frontier, found = [(0.0, (), features)], []  # score, path, hidden states in front of the path's last token
        for _ in range(depth):
            children = []
            for score, path, hidden in frontier:
                normed, fed_back = reference_draft(draft, embedding, hidden, tokens[1:] + list(path), window)
                log_probs = (draft.lm_head.weight @ normed).log_softmax(0)
                for draft_id in log_probs.argsort(descending=True)[:top_k].tolist():
                    token = draft_id if draft.d2t is None else draft_id + int(draft.d2t[draft_id])
                    longer = torch.cat([hidden, fed_back[None]])
                    children.append((score + float(log_probs[draft_id]), (*path, token), longer))
            found += children
            frontier = sorted(children, key=lambda node: -node[0])[:top_k]
        best = sorted(found, key=lambda node: -node[0])[:total_tokens]
        return {path for _, path, _ in best}

    return reference_decode(target, propose, prompt, depth, max_new_tokens, eos_token_ids)


def reference_decode(target, propose, prompt, depth, max_new_tokens, eos_token_ids):
    """`propose(tokens)` names every drafted path; the longest one of the target's own choices is accepted."""

    def choose(tokens):
        return int(target.model(torch.tensor([tokens])).logits[0, -1].argmax())

    def cut(tokens):
        ends = [i for i, token in enumerate(tokens) if token in eos_token_ids]
        return tokens[: min([max_new_tokens, *(end + 1 for end in ends)])]

    answer, rounds = [choose(prompt)], []
    while len(cut(answer)) == len(answer) < max_new_tokens and answer[-1] not in eos_token_ids:
        tokens, path = prompt + answer, ()
        drafted = propose(tokens)
        while (longer := (*path, choose(tokens + list(path)))) in drafted:
            path = longer
        answer += longer
        rounds.append(len(path))
    counts = [sum(accepted > k for accepted in rounds) for k in range(depth)]
    return cut(answer), len(rounds), counts, rounds
