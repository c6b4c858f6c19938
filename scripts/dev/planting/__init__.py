"""The faults that `plant_causes.py` plants, and its table."""
