"""What `compare_kinds.py` and `time_to_acceptance.py` run and show."""
