"""Import drafts that others publish: read in their project's form, saved in ours, which both servers load."""
