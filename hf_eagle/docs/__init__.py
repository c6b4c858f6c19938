"""Pages about hf_eagle, shipped with it."""
