"""Measure how good a draft is: its acceptance by decoding, and plots of it."""
