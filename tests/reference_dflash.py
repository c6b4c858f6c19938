"""A block draft of kind DFlash in plain PyTorch, written to be compared with: what a draft folder computes, how a
greedy server uses it, and what a trainer must feed it. Nothing here is fast, and nothing of hf_eagle is used.

Sizes: H hidden, n query heads, m key/value heads, d head size, L draft layers, t tapped target layers, B block size
(the anchor and B-1 masked slots), K = B-1 drafted tokens, T tokens of a conversation, A anchors, V vocabulary.
Parameter names are those of the checkpoint; the embedding and the head are the target's and are not in it.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x, positions, theta):
    """RoPE of x [..., T, heads, d] at integer positions [..., T]; the two halves of a head are paired."""
    half = x.shape[-1] // 2
    frequencies = theta ** -(torch.arange(half, dtype=torch.float32) / half)
    angles = positions[..., None, None].float() * frequencies
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, self.d = config["hidden_size"], config["head_dim"]
        n, m = config["num_attention_heads"], config["num_key_value_heads"]
        self.groups, self.theta = n // m, config["rope_parameters"]["rope_theta"]
        self.q_proj = nn.Linear(hidden, n * self.d, bias=False)
        self.k_proj = nn.Linear(hidden, m * self.d, bias=False)
        self.v_proj = nn.Linear(hidden, m * self.d, bias=False)
        self.o_proj = nn.Linear(n * self.d, hidden, bias=False)
        self.q_norm = Norm(self.d, config["rms_norm_eps"])
        self.k_norm = Norm(self.d, config["rms_norm_eps"])

    def keys_values(self, x, positions, norm=None):
        """One pair of projections and one k_norm, for the context and for the block: only the input differs."""
        k = (norm or self.k_norm)(self.k_proj(x).unflatten(-1, (-1, self.d)))
        return rotate(k, positions, self.theta), self.v_proj(x).unflatten(-1, (-1, self.d))

    def forward(self, x, positions, context, context_positions, mask, context_norm=None):
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.d))), positions, self.theta)
        seen = self.keys_values(context, context_positions, context_norm)
        parts = zip(seen, self.keys_values(x, positions), strict=True)
        k, v = (torch.cat(part, 0).repeat_interleave(self.groups, 1) for part in parts)
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.d**-0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = Norm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = Norm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn, self.mlp = Attention(config), Mlp(config)

    def forward(self, x, *rest):  # the context never passes through input_layernorm
        x = x + self.self_attn(self.input_layernorm(x), *rest)
        return x + self.mlp(self.post_attention_layernorm(x))


class Draft(nn.Module):
    """The draft of a folder.

    Attributes:
        slip: whether the context keys of all layers are normed with the first layer's weight, as vLLM's CPU build does.
    """

    slip = False

    def __init__(self, config):
        super().__init__()
        self.config, hidden, eps = config, config["hidden_size"], config["rms_norm_eps"]
        self.taps = config["dflash_config"]["target_layer_ids"]
        self.mask_id = config["dflash_config"]["mask_token_id"]
        self.fc = nn.Linear(len(self.taps) * hidden, hidden, bias=False)
        self.hidden_norm, self.norm = Norm(hidden, eps), Norm(hidden, eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, embeddings, positions, features, feature_positions, mask):
        """Rows of one or more blocks: embeddings [Q, H], features [T, t*H], mask [Q, T+Q] True where seen -> [Q, H].
        Logits are the target's lm_head of the result."""
        context = self.hidden_norm(self.fc(features))
        norm = self.layers[0].self_attn.k_norm if self.slip else None
        for layer in self.layers:
            embeddings = layer(embeddings, positions, context, feature_positions, mask, norm)
        return self.norm(embeddings)

    @classmethod
    def load(cls, folder):
        from safetensors.torch import load_file

        draft = cls(json.loads((Path(folder) / "config.json").read_text()))
        draft.load_state_dict(load_file(Path(folder) / "model.safetensors"))  # strict: exactly these tensors
        return draft.eval()


@torch.no_grad()
def target_features(decoder, ids, taps):
    """What a target (the inner model of a transformers CausalLM, with .layers) shows a draft: the residual stream
    BEHIND the layers `taps` (0-based), before any final norm, side by side: [T, t*H]; and its last hidden state [T, H].
    """
    seen = {}

    def keep(number):
        return lambda module, args, out: seen.__setitem__(
            number, (out[0] if isinstance(out, tuple) else out)[0].clone()
        )

    hooks = [decoder.layers[number].register_forward_hook(keep(number)) for number in taps]
    last = decoder(ids[None]).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    return torch.cat([seen[number] for number in taps], -1), last


# ---- serving ----


@torch.no_grad()
def draft_block(draft, embed, head, ids, features, anchor, K):
    """The K tokens drafted behind `anchor`, a position whose token is known and whose features are not: rows
    0 .. anchor-1 of `features` are the context. The block is [token, mask, .. mask] at anchor .. anchor+K; slot k is
    for anchor+k."""
    block = torch.full((1 + K,), draft.mask_id)
    block[0] = ids[anchor]
    mask = torch.ones(1 + K, anchor + 1 + K, dtype=torch.bool)  # all of the context, all of the block
    hidden = draft(embed[block], anchor + torch.arange(1 + K), features[:anchor], torch.arange(anchor), mask)
    return (hidden[1:] @ head.T).argmax(-1)


def served_counters(draft, embed, head, ids, features, prompt_length, max_tokens, K):
    """A greedy server's work on one request whose whole answer is known (`ids` must go on K+1 tokens behind it): the
    anchors it drafted from, and how many tokens were accepted by position."""
    anchor, anchors, accepted = prompt_length, [], [0] * K
    while anchor - prompt_length + 1 < max_tokens:
        right = (draft_block(draft, embed, head, ids, features, anchor, K) == ids[anchor + 1 : anchor + 1 + K]).int()
        run = int(right.cumprod(0).sum())
        for k in range(run):
            accepted[k] += 1
        anchors.append(anchor)
        anchor += run + 1
    return anchors, accepted


# ---- training ----


def anchored_blocks(ids, anchors, B, mask_id):
    """All blocks of a conversation in one row: ids [A*B], positions [A*B], mask [A*B, T + A*B]."""
    T, A = len(ids), len(anchors)
    blocks = torch.full((A, B), mask_id)
    blocks[:, 0] = ids[anchors]
    owner = torch.arange(A).repeat_interleave(B)
    context = torch.arange(T)[None] < anchors[owner][:, None]  # strictly before the anchor: its own features come later
    mask = torch.cat([context, owner[:, None] == owner], 1)
    return blocks.flatten(), (anchors[:, None] + torch.arange(B)).flatten(), mask


def training_loss(draft, embed, head, ids, features, last, supervised, anchors, B, gamma, kind="ce"):
    """Weighted sum, sum of weights. Slot k = 1 .. B-1 of anchor a is about token a+k and counts while tokens a+1 .. a+k
    are all supervised; its weight is exp(-(k-1)/gamma). The teacher of token a+k is the target's row a+k-1 (`last`)."""
    block_ids, positions, mask = anchored_blocks(ids, anchors, B, draft.mask_id)
    hidden = draft(embed[block_ids], positions, features, torch.arange(len(ids)), mask).unflatten(0, (-1, B))[:, 1:]
    where = anchors[:, None] + torch.arange(1, B)
    inside = where.clamp(max=len(ids) - 1)
    counts = ((where < len(ids)) & supervised[inside]).int().cumprod(1).bool()
    weights = torch.exp(-torch.arange(B - 1) / gamma).expand_as(counts)[counts]
    logits = hidden[counts] @ head.T
    if kind == "label":
        each = F.cross_entropy(logits, ids[where[counts]], reduction="none")
    elif kind == "ce":
        each = F.cross_entropy(logits, (last[where[counts] - 1] @ head.T).softmax(-1), reduction="none")
    else:
        each, weights = dpace(logits.log_softmax(-1), ids[where[counts]], counts), torch.ones_like(weights)
    return (weights * each).sum(), weights.sum()


def dpace(log_probabilities, labels, counts, alpha=0.5):
    """The losses of all slots that count [M], each times its weight: a block at a time, a slot at a time. `counts`
    [A, K] says which count."""
    found, row = [], 0
    for live in counts.sum(1).tolist():
        losses = [-log_probabilities[row + k, labels[row + k]] for k in range(live)]
        survived = []  # up to slot j
        for loss in losses:
            s = (1 - alpha) * math.exp(-float(loss.detach())) + alpha
            survived.append(s * (survived[-1] if survived else 1))
        found += [loss * sum(survived[k:]) for k, loss in enumerate(losses)]
        row += live
    return torch.stack(found)
