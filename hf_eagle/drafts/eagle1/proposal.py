"""What an EAGLE-1/2 draft proposes: a chain, or EAGLE-2's dynamic tree, on the features that it predicts itself."""

from ...decoding.proposal import AutoregressiveProposer


class Eagle1Proposer(AutoregressiveProposer):
    """Feeds back the predicted feature, which is what the target's head takes too."""
