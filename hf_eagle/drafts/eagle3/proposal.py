"""What an EAGLE-3 draft proposes: a chain or a tree, from its own residual stream (EAGLE-3.1: the normed one)."""

from ...decoding.proposal import AutoregressiveProposer


class Eagle3Proposer(AutoregressiveProposer):
    """Feeds back the result of `Eagle3Draft.feedback`; the head takes the normed hidden states."""
