"""Chat records to token ids and loss masks, batches, and the target's own answers."""
