"""What every verb passes through: how it ends, what files it reads, what it writes and may not overwrite."""
