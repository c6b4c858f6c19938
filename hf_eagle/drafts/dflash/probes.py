"""What may be wrong with a DFlash draft although its folder is sound."""

from collections.abc import Sequence

from ..probe import Probe
from ..probes import column_orders, rope_bases, rope_scalings, swapped_norms, tap_shifts


def probes_of(draft, target, bases: Sequence[float] = ()) -> list[Probe]:
    """See [`EaglePreTrainedModel.probes`]."""
    tap_ids, layers = list(target.tap_ids), [f"layers.{number}" for number in range(len(draft.layers))]

    def told(order: tuple[int, ...]) -> str:
        return f"taps in the order {', '.join(str(tap_ids[place]) for place in order)}"

    head_norms = [(f"{layer}.self_attn.q_norm", f"{layer}.self_attn.k_norm") for layer in layers]
    return [
        *column_orders("fc", len(tap_ids), "tap_order", told),
        *tap_shifts(tap_ids, range(1, target.num_layers), _set_taps),
        *rope_bases(draft, target.config, bases),
        *rope_scalings(draft, target.config),
        *swapped_norms(
            [("norm", "hidden_norm")],
            [(f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm") for layer in layers],
            *([] if draft.config.share_k_norm else [head_norms]),
        ),
    ]


def _set_taps(config, ids: list[int]) -> None:
    config.target_layer_ids = [number - 1 for number in ids]  # these count outputs
