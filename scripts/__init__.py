"""The command lines; in a wheel this folder is `hf_eagle.commands.scripts`, and `hf-eagle` runs what is in it."""
