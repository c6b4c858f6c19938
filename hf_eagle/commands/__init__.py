"""In a wheel, `scripts/` lies in here: each script puts the folder above its own in front of `sys.path`, and beside
this file there is nothing that could be taken for somebody else's module."""
