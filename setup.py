"""Everything static is in setup.cfg; here only the list of packages, which follows the folders."""

from setuptools import find_packages, setup


# recipes and card templates lie at the top of the repository, where people look for them, and travel inside the package
setup(packages=[*find_packages(include=["hf_eagle", "hf_eagle.*"]), "hf_eagle.training_args", "hf_eagle.model_cards"])
