"""Jinja templates of model cards: `hf_eagle.model_cards` once installed, `model_cards/` in the repository."""
