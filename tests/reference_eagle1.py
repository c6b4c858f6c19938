"""The mathematics of EAGLE-1 a second time: one conversation, one row after another; nothing shared but parameters."""

import math

import torch
from reference import is_supervised, rms_norm, rope


class ReferenceEagle1:
    """An EAGLE-1 draft over the named parameters of another, with the embeddings and the head of a target model."""

    def __init__(self, draft, model, transform=lambda logits: logits):
        self.p, self.c = dict(draft.named_parameters()), draft.config
        self.theta = self.c.rope_parameters["rope_theta"]
        self.embedding = model.get_input_embeddings().weight.detach()
        self.head = model.get_output_embeddings().weight.detach()
        self.transform = transform

    def lin(self, x, name):
        return self.p[f"layers.0.{name}.weight"] @ x

    def x(self, token, feature):
        return self.p["fc.weight"] @ torch.cat([self.embedding[token], feature])

    def predict(self, next_ids, features):
        """The next feature of the last row, from all rows' features and next tokens."""
        rows = [self.x(token, feature) for token, feature in zip(next_ids, features, strict=True)]
        q, k, v = (
            [self.lin(x, f"self_attn.{name}_proj").view(-1, self.c.head_dim) for x in rows] for name in ("q", "k", "v")
        )
        query = rope(q[-1], len(rows) - 1, self.theta)
        keys = [rope(key, position, self.theta) for position, key in enumerate(k)]
        share, heads = self.c.num_attention_heads // self.c.num_key_value_heads, []
        for head in range(self.c.num_attention_heads):
            scores = torch.stack([key[head // share] @ query[head] for key in keys]) / math.sqrt(self.c.head_dim)
            heads.append(torch.softmax(scores, 0) @ torch.stack([value[head // share] for value in v]))
        u = rows[-1] + self.lin(torch.cat(heads), "self_attn.o_proj")
        m = rms_norm(u, self.p["layers.0.post_attention_layernorm.weight"], self.c.rms_norm_eps)
        gate = torch.nn.functional.silu(self.lin(m, "mlp.gate_proj"))
        return u + self.lin(gate * self.lin(m, "mlp.up_proj"), "mlp.down_proj")

    def logits(self, feature):
        return self.transform(self.head @ feature)


def last_hidden(model, ids):
    """`(length, hidden)` behind the final norm, where `output_hidden_states` ends, and the logits."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return out.hidden_states[-1][0], out.logits[0]


def reference_eagle1_loss(draft, model, records, supervision="serving", transform=lambda logits: logits):
    """Summed regression, summed cross-entropy, correct rows and supervised rows."""
    reference = ReferenceEagle1(draft, model, transform)
    regression, ce, correct, rows = 0.0, 0.0, 0, 0
    for record in records:
        ids, mask = record["input_ids"], record["loss_mask"]
        features, logits = last_hidden(model, ids)
        for row in range(len(ids)):
            if not is_supervised(mask, row, 0, supervision):
                continue
            predicted = reference.predict(ids[1 : row + 2], features[: row + 1])
            distance = (predicted - features[row + 1]).abs()
            regression = regression + torch.where(distance < 1, 0.5 * distance**2, distance - 0.5).mean()
            seen = reference.logits(predicted)
            ce = ce - (logits[row + 1].softmax(0) * seen.log_softmax(0)).sum()
            correct += int(seen.argmax()) == int(logits[row + 1].argmax())
            rows += 1
    return regression, ce, correct, rows
