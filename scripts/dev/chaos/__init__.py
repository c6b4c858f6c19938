"""Parts of `chaos.py`: what is tried, the ranks it is tried on, and what must be true afterwards."""
