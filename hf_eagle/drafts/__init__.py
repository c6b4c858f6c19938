"""Drafts: configuration, models, vocabulary mapping. Knows nothing of targets, data or training."""
