"""What `measure_gpu.py` measures."""
