"""What may be wrong with an EAGLE-3 draft although its folder is sound."""

from collections.abc import Sequence

from torch import nn

from ..layers import EagleRMSNorm
from ..probe import Probe
from ..probes import column_orders, head_rows, rope_bases, rope_scalings, swapped_norms, tap_shifts


def probes_of(draft, target, bases: Sequence[float] = ()) -> list[Probe]:
    """See [`EaglePreTrainedModel.probes`]."""
    config, layer = draft.config, "midlayer"
    tap_ids = list(target.tap_ids)

    def told(order: tuple[int, ...]) -> str:
        return f"taps in the order {', '.join(str(tap_ids[place]) for place in order)}"

    # servers run the scaling of these in one way each, see `rope.py`
    scalings = () if config.mrope_section or config.reads_mscale else rope_scalings(draft, target.config)
    return [
        *column_orders("fc", config.num_taps, "tap_order", told, _reorder_norms if config.fc_norm else None),
        *tap_shifts(tap_ids, range(target.num_layers + 1), _set_taps),
        *rope_bases(draft, target.config, bases),
        *scalings,
        *swapped_norms(
            [(f"{layer}.input_layernorm", f"{layer}.hidden_norm")],
            [("norm", f"{layer}.post_attention_layernorm")],
        ),
        _other_feedback(config.norm_output),
        _other_fc_norm(config.fc_norm),
        *head_rows(draft, target),
    ]


def _set_taps(config, ids: list[int]) -> None:
    config.eagle_aux_hidden_state_layer_ids = ids


def _reorder_norms(draft, order: tuple[int, ...]) -> None:
    """Each tap has a norm of its own before `fc`, which goes with its columns."""
    draft.fc_norm = nn.ModuleList([draft.fc_norm[place] for place in order])


def _other_feedback(normed: bool) -> Probe:
    def apply(draft) -> None:
        draft.config.norm_output = not normed

    return Probe("norm_output", f"`norm_output` {str(not normed).lower()}", apply)


def _other_fc_norm(normed: bool) -> Probe:
    def apply(draft) -> None:
        config = draft.config
        config.fc_norm = not normed
        if normed:
            del draft.fc_norm
            return

        norms = [EagleRMSNorm(config.target_hidden_size, config.rms_norm_eps) for _ in range(config.num_taps)]
        draft.fc_norm = nn.ModuleList(norms).to(draft.fc.weight)

    return Probe("fc_norm", f"`fc_norm` {str(not normed).lower()}", apply)
