"""Multi-head latent attention of a draft, written a second time: one row, complex numbers for rotated pairs."""

import math

import torch
from reference import ReferenceDraft


def rotation_frequencies(theta, dim, scaling=None):
    """Radians a token of every pair, from the base and what an older `config.json` calls `rope_scaling`."""
    plain = [theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    kind = (scaling or {}).get("rope_type", "default")
    if kind == "default":
        return plain
    factor = scaling["factor"]
    if kind == "linear":
        return [f / factor for f in plain]
    length = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        share = [min(max((length * f / (2 * math.pi) - low) / (high - low), 0), 1) for f in plain]
    else:  # yarn: pairs that turn often keep their frequency, those that hardly turn are interpolated

        def pair_with(turns):
            return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(pair_with(scaling.get("beta_fast", 32))), 0)
        last = min(math.ceil(pair_with(scaling.get("beta_slow", 1))), dim - 1)
        share = [1 - min(max((pair - first) / (last - first), 0), 1) for pair in range(dim // 2)]
    return [f * s + f / factor * (1 - s) for f, s in zip(plain, share, strict=True)]


def temperature(scaling, name, default):
    return 0.1 * scaling.get(name, default) * math.log(scaling["factor"]) + 1


class ReferenceMLADraft(ReferenceDraft):
    """An EAGLE-3 draft with latent attention over the named parameters of another."""

    def __init__(self, draft):
        super().__init__(draft)
        c, scaling = self.c, dict(self.c.rope_parameters)
        self.frequencies = torch.tensor(rotation_frequencies(self.theta, c.qk_rope_head_dim, scaling))
        self.scale, self.stretch = 1 / math.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim), 1.0
        if scaling["rope_type"] == "yarn":
            self.scale *= temperature(scaling, "mscale_all_dim", 0) ** 2
            self.stretch = temperature(scaling, "mscale", 1) / temperature(scaling, "mscale_all_dim", 0)

    def turn(self, x, position):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        turned = pairs * torch.polar(torch.full_like(self.frequencies, self.stretch), position * self.frequencies)
        return torch.view_as_real(turned).flatten(-2)

    def qkv(self, token, hidden, position):
        embed, c, name = self.p["embed_tokens.weight"][token], self.c, "midlayer.self_attn."
        x = torch.cat([self.norm(embed, "midlayer.input_layernorm"), self.norm(hidden, "midlayer.hidden_norm")])
        if c.q_lora_rank is None:
            q = self.lin(x, name + "q_proj")
        else:
            q = self.lin(self.norm(self.lin(x, name + "q_a_proj"), name + "q_a_layernorm"), name + "q_b_proj")
        q = q.view(c.num_attention_heads, -1)
        latent = self.lin(x, name + "kv_a_proj_with_mqa")
        made = self.lin(self.norm(latent[: c.kv_lora_rank], name + "kv_a_layernorm"), name + "kv_b_proj")
        shared = self.turn(latent[c.kv_lora_rank :], position)
        queries, keys, values = [], [], []
        for head, part in enumerate(made.view(c.num_attention_heads, -1)):
            plain, width = q[head, : c.qk_nope_head_dim], c.qk_nope_head_dim
            queries.append(torch.cat([plain, self.turn(q[head, width:], position)]))
            keys.append(torch.cat([part[:width], shared]))
            values.append(part[width:])
        return torch.stack(queries), keys, values
