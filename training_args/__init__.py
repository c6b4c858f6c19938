"""Training recipes, one YAML file each: `hf_eagle.training_args` once installed, `training_args/` in the repository."""
