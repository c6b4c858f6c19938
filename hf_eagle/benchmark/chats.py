"""Benchmarks on real chats: packed rows beside padded batches, the Trainer beside a bare loop."""
