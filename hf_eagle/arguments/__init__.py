"""What a run can be told: groups of arguments, the objective's, `TrainingArguments`, and the parser."""
