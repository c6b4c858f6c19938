"""What a training step costs: workloads of known shapes, their needed operations, time and memory."""
