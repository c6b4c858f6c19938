"""Shapes of a layer's parameters, by the names that both servers read from a checkpoint."""

from collections.abc import Collection, Mapping

from ..draft_folder import Shape


def layer(config: dict, attention: Mapping[str, Shape], norms: Collection[str], prefix: str) -> dict[str, Shape]:
    """A layer's parameters by their names in a checkpoint: this attention, these norms, and the common gated MLP."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    found = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    found |= {f"self_attn.{name}": shape for name, shape in attention.items()}
    found |= {norm: (hidden,) for norm in norms}
    return {f"{prefix}.{name}.weight": shape for name, shape in found.items()}


def llama_attention(config: dict, width: int) -> dict[str, Shape]:
    """The projections of Llama's attention over rows of this width."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads

    return {
        "q_proj": (heads * head_dim, width),
        "k_proj": (kv_heads * head_dim, width),
        "v_proj": (kv_heads * head_dim, width),
        "o_proj": (hidden, heads * head_dim),
    }
