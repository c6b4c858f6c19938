"""The target's own words: regenerated answers, prompts that it writes itself, and the journal of both."""
