"""The mathematics of EAGLE-3 training, written a second time: one conversation, one row, one step after another.

Nothing here is shared with `hf_eagle` but the draft's parameters. Slow on purpose.
"""

import math

import torch


def rms_norm(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rope(x, position, theta):
    """Rotate `(heads, dim)` to a position, the two halves of `dim` being the pairs."""
    dim = x.shape[-1]
    angle = position * theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=x.device) / dim)
    cos, sin = angle.cos(), angle.sin()
    first, second = x[:, : dim // 2], x[:, dim // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def is_supervised(mask, row, step, kind):
    """Does row `row` count at step `step`, for one conversation without padding?"""
    if kind == "serving":
        last = row + 2 + step
        return last < len(mask) and all(mask[row + 1 : last + 1])
    return row + 1 + step < len(mask) and mask[row + step] == 1


class ReferenceDraft:
    """An EAGLE-3 draft over the named parameters of another."""

    def __init__(self, draft):
        self.p = dict(draft.named_parameters())
        self.c = draft.config
        self.theta = self.c.rope_parameters["rope_theta"]
        self.scale = 1 / math.sqrt(self.c.head_dim)
        self.ids = (
            list(range(self.c.vocab_size))
            if draft.d2t is None
            else ([j + int(offset) for j, offset in enumerate(draft.d2t)])
        )

    def norm(self, x, name):
        return rms_norm(x, self.p[f"{name}.weight"], self.c.rms_norm_eps)

    def lin(self, x, name):
        return self.p[f"{name}.weight"] @ x

    def combine(self, taps):
        if self.c.fc_norm:
            parts = taps.chunk(self.c.num_taps)
            taps = torch.cat([self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)])
        return self.lin(taps, "fc")

    def qkv(self, token, hidden, position):
        embed = self.embedding(token)
        x = torch.cat([self.norm(embed, "midlayer.input_layernorm"), self.norm(hidden, "midlayer.hidden_norm")])
        q, k, v = (self.lin(x, f"midlayer.self_attn.{name}_proj").view(-1, self.c.head_dim) for name in ("q", "k", "v"))
        return self.rotate(q, position), self.rotate(k, position), v

    def embedding(self, token):
        return self.p["embed_tokens.weight"][token]

    def rotate(self, x, position):
        return rope(x, position, self.theta)

    def place(self, row, step):
        """Where a row stands at a step."""
        return row + step

    def layer(self, hidden, query, keys, values):
        heads = []
        share = self.c.num_attention_heads // self.c.num_key_value_heads
        for head in range(self.c.num_attention_heads):
            k = torch.stack([key[head // share] for key in keys])
            v = torch.stack([value[head // share] for value in values])
            weights = torch.softmax(k @ query[head] * self.scale, 0)
            heads.append(weights @ v)
        u = hidden + self.lin(torch.cat(heads), "midlayer.self_attn.o_proj")
        m = self.norm(u, "midlayer.post_attention_layernorm")
        gate = torch.nn.functional.silu(self.lin(m, "midlayer.mlp.gate_proj"))
        return u + self.lin(gate * self.lin(m, "midlayer.mlp.up_proj"), "midlayer.mlp.down_proj")

    def unroll(self, ids, taps, row, steps):
        """Normed hidden states of one row at each step."""
        keys, values = [], []
        for j in range(row + 1):
            _, k, v = self.qkv(ids[j + 1], self.combine(taps[j]), self.place(j, 0))
            keys.append(k)
            values.append(v)
        hidden, out = self.combine(taps[row]), []
        for step in range(steps):
            token = ids[row + 1 + step] if row + 1 + step < len(ids) else 0
            query, k, v = self.qkv(token, hidden, self.place(row, step))
            if step:
                keys.append(k)
                values.append(v)
            hidden = self.layer(hidden, query, keys, values)
            out.append(self.norm(hidden, "norm"))
            if self.c.norm_output:
                hidden = out[-1]
        return out


def reference_loss(
    draft,
    model,
    records,
    steps,
    supervision="serving",
    loss="ce",
    oov_rows="mask",
    scale=1.0,
    decay=3.0,
    reference=ReferenceDraft,
    look=None,
):
    """Per step: summed loss, correct rows, supervised rows, over conversations `{"input_ids", "loss_mask"}`.

    `look(ref, record)` gives a conversation's taps and logits; by default those of the model's text.
    """
    ref = reference(draft)
    rows = [[] for _ in range(steps)]
    for record in records:
        ids, mask = record["input_ids"], record["loss_mask"]
        if look is None:
            with torch.no_grad():
                out = model(input_ids=torch.tensor([ids], device=model.device), output_hidden_states=True)
            taps = torch.cat([out.hidden_states[i][0] for i in draft.config.tap_ids], -1)
            said = out.logits[0]
        else:
            taps, said = look(ref, record)
        for row in range(len(ids)):
            wanted = [s for s in range(steps) if is_supervised(mask, row, s, supervision)]
            if not wanted:
                continue
            hidden = ref.unroll(ids, taps, row, wanted[-1] + 1)
            for step in wanted:
                full = said[row + 1 + step]
                log_q = torch.log_softmax(ref.lin(hidden[step], "lm_head"), 0)
                rows[step].append((full, log_q))
    sums, correct = [], []
    for step in range(steps):
        total, hits, alphas, ces, kept = 0.0, 0, [], [], []
        for full, log_q in rows[step]:
            best = int(full.argmax())
            hits += best in ref.ids and ref.ids[int(log_q.argmax())] == best
            p = torch.softmax(full[ref.ids], 0)
            ces.append(-(p * log_q).sum())
            alphas.append(torch.minimum(torch.softmax(full, 0)[ref.ids], log_q.exp()).sum())
            kept.append(oov_rows == "renormalize" or best in ref.ids)
        chosen = [i for i, keep in enumerate(kept) if keep]
        share = 0.0
        if loss == "lk_lambda" and chosen:
            share = scale * math.exp(-decay * float(sum(alphas[i].detach() for i in chosen)) / len(chosen))
        for i in chosen:
            if loss == "ce":
                total = total + ces[i]
            elif loss == "lk_alpha":
                total = total - torch.log(alphas[i])
            else:
                total = total + share * ces[i] + (1 - share) * (1 - alphas[i])
        sums.append(torch.as_tensor(total))
        correct.append(hits)
    return torch.stack(sums), correct, [len(r) for r in rows]
