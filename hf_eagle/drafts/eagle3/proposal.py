"""What an EAGLE-3 draft proposes: a chain or a tree, on its own residual stream (EAGLE-3.1: on the normed one)."""

from ...decoding.proposal import AutoregressiveProposer


class Eagle3Proposer(AutoregressiveProposer):
    """Feeds back what `Eagle3Draft.feedback` says; the head takes the normed hidden states."""
