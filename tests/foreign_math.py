"""What the drafts of other projects compute, written from their sources: one row after another over THEIR tensors.

Nothing is shared with `hf_eagle`: neither names nor order of tokens nor code. Slow on purpose.
"""

import math

import reference_dflash
import torch
from reference import rms_norm
from reference_mla import rotation_frequencies, temperature


class ForeignDraft:
    """A draft decoding behind its own keys.

    Args:
        tensors: as the project stores them.
        embedding, head: the target's, `(vocab, hidden)`.
        heads: number of query heads.
        eps: of the norms.
        theta, scaling: of RoPE.
        feeds_normed: whether the normed output is fed back (EAGLE-3.1).
        latent: sizes of latent attention, `None` for Llama's.
    """

    def __init__(
        self, tensors, embedding, head, heads, eps, theta=10000.0, scaling=None, feeds_normed=False, latent=None
    ):
        self.tensors, self.embedding, self.target_head = tensors, embedding, head
        self.heads, self.eps, self.feeds_normed, self.latent = heads, eps, feeds_normed, latent
        self.is_eagle1 = not any(name.endswith("hidden_norm.weight") for name in tensors)
        self.theta, self.scaling = theta, scaling or {}
        self.keys, self.values = [], []

    def get(self, name):
        found = [x for key, x in self.tensors.items() if key == name or key.endswith(f".{name}")]
        found = found if len(found) == 1 else [x for k, x in self.tensors.items() if k in (name, f"model.{name}")]
        assert len(found) == 1, name
        return found[0]

    def lin(self, x, name):
        return self.get(f"{name}.weight") @ x

    def norm(self, x, name):
        return rms_norm(x, self.get(f"{name}.weight"), self.eps)

    def combine(self, taps):
        """`(taps * hidden)` -> `(hidden)`; of EAGLE-1 the feature itself."""
        if self.is_eagle1:
            return taps
        if any("fc_norm" in name for name in self.tensors):
            taps = torch.cat([self.norm(part, f"fc_norm.{i}") for i, part in enumerate(taps.chunk(3))])
        return self.lin(taps, "fc")

    def rotate(self, x, position, neighbours=False):
        """The last dimension of `x`: halves against each other, or neighbouring elements."""
        frequencies = torch.tensor(rotation_frequencies(self.theta, x.shape[-1], self.scaling))
        stretch = 1.0
        if self.scaling.get("rope_type") == "yarn":
            stretch = temperature(self.scaling, "mscale", 1) / temperature(self.scaling, "mscale_all_dim", 0)
        turn = torch.polar(torch.full_like(frequencies, stretch), position * frequencies)
        pairs = x.unflatten(-1, (-1, 2)) if neighbours else x.unflatten(-1, (2, -1)).transpose(-1, -2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        return turned.flatten(-2) if neighbours else turned.transpose(-1, -2).flatten(-2)

    def query_key_value(self, x, position):
        """`(heads, dim)` each."""
        if self.latent is None:
            size = self.get("q_proj.weight").shape[0] // self.heads
            q, k, v = (self.lin(x, f"{name}_proj").view(-1, size) for name in ("q", "k", "v"))
            share = self.heads // len(k)
            k, v = (part.repeat_interleave(share, 0) for part in (k, v))
            return self.rotate(q, position), self.rotate(k, position), v
        plain, rank = self.latent["qk_nope_head_dim"], self.latent["kv_lora_rank"]
        q = self.lin(self.norm(self.lin(x, "q_a_proj"), "q_a_layernorm"), "q_b_proj").view(self.heads, -1)
        squeezed = self.lin(x, "kv_a_proj_with_mqa")
        made = self.lin(self.norm(squeezed[:rank], "kv_a_layernorm"), "kv_b_proj").view(self.heads, -1)
        shared = self.rotate(squeezed[rank:], position, neighbours=True).expand(self.heads, -1)
        q = torch.cat([q[:, :plain], self.rotate(q[:, plain:], position, neighbours=True)], -1)
        return q, torch.cat([made[:, :plain], shared], -1), made[:, plain:]

    def score_scale(self, size):
        scale = 1 / math.sqrt(size)
        if self.latent is not None and self.scaling.get("rope_type") == "yarn":
            scale *= temperature(self.scaling, "mscale_all_dim", 0) ** 2
        return scale

    def row(self, token, hidden, position):
        """Logits over the target's vocabulary, minus infinity where there is no row, and what is fed back."""
        embed = self.embedding[token]
        if self.is_eagle1:
            x = residual = self.lin(torch.cat([embed, hidden]), "fc") + self.get("fc.bias")
        else:
            x, residual = torch.cat([self.norm(embed, "input_layernorm"), self.norm(hidden, "hidden_norm")]), hidden
        query, key, value = self.query_key_value(x, position)
        self.keys.append(key)
        self.values.append(value)
        scores = torch.einsum("hd,nhd->hn", query, torch.stack(self.keys)) * self.score_scale(query.shape[-1])
        attended = torch.einsum("hn,nhd->hd", scores.softmax(-1), torch.stack(self.values))
        u = residual + self.lin(attended.flatten(), "o_proj")
        m = self.norm(u, "post_attention_layernorm")
        out = u + self.lin(torch.nn.functional.silu(self.lin(m, "gate_proj")) * self.lin(m, "up_proj"), "down_proj")
        if self.is_eagle1:
            return self.target_head @ out, out
        normed = self.norm(out, "norm")
        logits = torch.full((len(self.embedding),), float("-inf"))
        for j, value in enumerate(self.lin(normed, "lm_head")):
            logits[j + int(self.tensors["d2t"][j]) if "d2t" in self.tensors else j] = value
        return logits, normed if self.feeds_normed else out

    def decode(self, tokens, taps):
        """Logits of the last of `len(taps)` rows, then of one row more a token: `(1 + len(tokens) - len(taps), vocab)`.

        Row `i` is run at position `i` with `tokens[i]`, the later ones with what was fed back.
        """
        found, fed = [], None
        for i, token in enumerate(tokens):
            hidden = self.combine(taps[i]) if i < len(taps) else fed
            logits, fed = self.row(token, hidden, i)
            if i >= len(taps) - 1:
                found.append(logits)
        return torch.stack(found)


# ---- DFlash ----


@torch.no_grad()
def block_logits(tensors, embedding, head, newest, features, heads, mask, slots, eps, theta):
    """Of what a DFlash draft proposes behind the token `newest`, whose features are not known: `(slots - 1, vocab)`.

    Args:
        tensors: by z-lab's or transformers' names.
        embedding, head: the target's, `(vocab, hidden)`.
        newest: a token id; it stands at place `len(features)`.
        features: `(rows, taps * hidden)`, of the tokens before it.
        heads: number of query heads.
        mask: id of the mask token.
        slots: of a block, the newest token's included.
        eps, theta: of all norms, and of RoPE.
    """
    other = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
    own = ("fc.", "hidden_norm.", "norm.", "layers.")
    tensors = {other.get(name, name): x.float() for name, x in tensors.items()}
    tensors = {name: x for name, x in tensors.items() if name.startswith(own)}
    width, hidden = len(tensors["layers.0.self_attn.k_norm.weight"]), len(tensors["norm.weight"])
    config = {
        "hidden_size": hidden,
        "intermediate_size": len(tensors["layers.0.mlp.up_proj.weight"]),
        "num_hidden_layers": len({name.split(".")[1] for name in tensors if name.startswith("layers.")}),
        "num_attention_heads": heads,
        "num_key_value_heads": len(tensors["layers.0.self_attn.k_proj.weight"]) // width,
        "head_dim": width,
        "rms_norm_eps": eps,
        "rope_parameters": {"rope_theta": theta},
        "dflash_config": {"mask_token_id": mask, "target_layer_ids": range(features.shape[1] // hidden)},
    }
    draft, start = reference_dflash.Draft(config), len(features)
    draft.load_state_dict(tensors)  # exactly these

    tokens = torch.tensor([newest] + [mask] * (slots - 1))
    seen = torch.ones(slots, start + slots, dtype=torch.bool)
    out = draft(embedding[tokens], start + torch.arange(slots), features, torch.arange(start), seen)
    return out[1:] @ head.T
