"""What every verb passes: how it ends, what it reads of others, what it writes and may not overwrite."""
