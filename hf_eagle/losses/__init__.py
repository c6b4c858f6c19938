"""What a draft is trained on: which rows count, objectives, and the head and its loss in one piece."""
