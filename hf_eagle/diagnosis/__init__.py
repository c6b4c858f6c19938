"""Why acceptance is low: one thing is changed at a time, and acceptance measured again."""
