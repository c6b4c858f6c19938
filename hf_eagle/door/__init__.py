"""Code that every verb runs: how it ends, which files it reads, and which it writes and must not overwrite."""
