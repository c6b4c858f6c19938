"""Everything static is in setup.cfg; here only the list of packages, which follows the folders."""

from setuptools import find_packages, setup


# these lie at the top of the repository, where people look for them, and travel inside the package
SHIPPED = ["hf_eagle.training_args", "hf_eagle.model_cards", "hf_eagle.commands.scripts"]
setup(packages=[*find_packages(include=["hf_eagle", "hf_eagle.*"]), *SHIPPED])
