"""Chat records to token ids and loss masks, and batches of them."""
