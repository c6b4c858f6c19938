"""What a draft is trained on: which rows count, objectives, and the head fused with its loss."""
