"""Frozen targets: load them, tap their layers, apply their head. Knows nothing of drafts."""
