"""What an EAGLE-1/2 draft proposes: a chain, or EAGLE-2's dynamic draft tree, from the features that it predicts."""

from ...decoding.proposal import AutoregressiveProposer


class Eagle1Proposer(AutoregressiveProposer):
    """Feeds back the predicted feature, which is also the input of the target's head."""
