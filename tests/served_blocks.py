"""What a DFlash draft computes, and how a greedy server uses it: one row after another over the tensors of a folder.

Nothing is shared with `hf_eagle`. Slow on purpose. A block is the newest token and masked slots behind it; its slots
see the target's features before the newest token, and one another.
"""

import json
import math

import torch
from reference import rms_norm
from safetensors.torch import load_file


class BlockDraft:
    """A draft over its tensors.

    Args:
        tensors: by z-lab's or transformers' names.
        embedding, head: the target's, `(vocab, hidden)`.
        heads: number of query heads.
        mask: id of the mask token.
        slots: of a block, the newest token's included.
        eps: of all norms.
        theta: of RoPE.
        first_norm: norm the context's keys of every layer by the first layer's `k_norm`, as vLLM does on a CPU.
    """

    def __init__(self, tensors, embedding, head, heads, mask, slots, eps, theta, first_norm=False):
        other = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
        self.tensors = {other.get(name, name): x.float() for name, x in tensors.items()}
        self.embedding, self.head, self.heads, self.mask = embedding.float(), head.float(), heads, mask
        self.slots, self.eps, self.theta, self.first_norm = slots, eps, theta, first_norm
        self.layers = len({name.split(".")[1] for name in self.tensors if name.startswith("layers.")})

    @classmethod
    def of_folder(cls, folder, embedding, head, **changes):
        config = json.loads((folder / "config.json").read_text())
        said = {
            "heads": config["num_attention_heads"],
            "mask": config["dflash_config"]["mask_token_id"],
            "slots": config["block_size"],
            "eps": config["rms_norm_eps"],
            "theta": config["rope_parameters"]["rope_theta"],
        }
        return cls(load_file(folder / "model.safetensors"), embedding, head, **said | changes)

    def norm(self, x, name):
        return rms_norm(x, self.tensors[f"{name}.weight"], self.eps)

    def turned(self, head, position):
        """RoPE of one head: its halves are rotated against each other."""
        half = len(head) // 2
        angles = torch.tensor([position * self.theta ** (-i / half) for i in range(half)])
        first, second = head[:half], head[half:]
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])

    def key_values(self, x, position, layer, norm):
        """`(key heads, width)` each, of one row."""
        name = f"layers.{layer}.self_attn"
        width = len(self.tensors[f"{name}.k_norm.weight"])
        keys = (self.tensors[f"{name}.k_proj.weight"] @ x).view(-1, width)
        values = (self.tensors[f"{name}.v_proj.weight"] @ x).view(-1, width)
        return torch.stack([self.turned(self.norm(key, norm), position) for key in keys]), values

    def context(self, features):
        """Keys and values of every layer of each row of features, `(taps * hidden)` each."""
        found = [[] for _ in range(self.layers)]
        for position, row in enumerate(features):
            seen = self.norm(self.tensors["fc.weight"] @ row.float(), "hidden_norm")
            for layer, rows in enumerate(found):
                norm = f"layers.{0 if self.first_norm else layer}.self_attn.k_norm"
                rows.append(self.key_values(seen, position, layer, norm))
        return found

    def attended(self, rows, start, context, layer):
        """What attention adds to each row of a block whose newest token is at `start`."""
        name = f"layers.{layer}.self_attn"
        normed = [self.norm(row, f"layers.{layer}.input_layernorm") for row in rows]
        own = [self.key_values(x, start + slot, layer, f"{name}.k_norm") for slot, x in enumerate(normed)]
        keys, values = (torch.stack(part) for part in zip(*context, *own, strict=True))

        found = []
        for slot, x in enumerate(normed):
            queries, mixed = (self.tensors[f"{name}.q_proj.weight"] @ x).view(self.heads, -1), []
            for number, query in enumerate(queries):
                query = self.turned(self.norm(query, f"{name}.q_norm"), start + slot)
                group = number * keys.shape[1] // self.heads
                weights = (keys[:, group] @ query / math.sqrt(len(query))).softmax(0)
                mixed.append(weights @ values[:, group])
            found.append(self.tensors[f"{name}.o_proj.weight"] @ torch.cat(mixed))
        return found

    def logits(self, newest, context):
        """Over the vocabulary, of what is drafted behind the token `newest`, `(slots - 1, vocab)`."""
        start = len(context[0])
        rows = [self.embedding[token] for token in [newest] + [self.mask] * (self.slots - 1)]
        for layer in range(self.layers):
            rows = [row + a for row, a in zip(rows, self.attended(rows, start, context[layer], layer), strict=True)]
            for slot, row in enumerate(rows):
                x = self.norm(row, f"layers.{layer}.post_attention_layernorm")
                up = {part: self.tensors[f"layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")}
                rows[slot] = row + up["down"] @ (torch.nn.functional.silu(up["gate"] @ x) * (up["up"] @ x))
        return torch.stack([self.head @ self.norm(row, "norm") for row in rows[1:]])

    @torch.no_grad()
    def decode(self, ids, features, prompt_length, max_tokens):
        """What a greedy server drafts for a request whose answer is known.

        Args:
            ids: prompt and answer, and as many tokens more of the target as a block has slots.
            features: of each of them, `(taps * hidden)`.
            prompt_length, max_tokens: of the request.

        Returns:
            The blocks by the position of their newest token, and the accepted tokens by slot.
        """
        newest, blocks, accepted = prompt_length, {}, [0] * (self.slots - 1)
        context = self.context(features)
        while newest - prompt_length + 1 < max_tokens:
            before = [rows[:newest] for rows in context]
            block = self.logits(ids[newest], before).argmax(-1).tolist()
            run = 0
            while run < len(block) and block[run] == ids[newest + 1 + run]:
                accepted[run] += 1
                run += 1
            blocks[newest] = block
            newest += run + 1
        return blocks, accepted
