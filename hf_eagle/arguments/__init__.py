"""What a run is told: groups of arguments, the objective's, `TrainingArguments`, and the parser."""
