"""Publishing: model cards made of measured facts."""
