"""What may be wrong with an EAGLE-1 draft although its folder is sound."""

from collections.abc import Sequence

from ..probe import Probe
from ..probes import column_orders, rope_bases, rope_scalings


def probes_of(draft, target, bases: Sequence[float] = ()) -> list[Probe]:
    """See [`EaglePreTrainedModel.probes`]."""
    return [
        *column_orders("fc", 2, "fc_halves", lambda order: "the feature before the embedding in `fc`"),
        *rope_bases(draft, target.config, bases),
        *rope_scalings(draft, target.config),
    ]
