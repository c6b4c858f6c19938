"""Drafts that others publish: read in the form of their project, saved in ours, which both servers load."""
