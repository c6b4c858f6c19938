"""What `compare_kinds.py` runs and shows."""
