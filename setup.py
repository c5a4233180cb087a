"""The packages of the wheel. The folder recipes/ becomes dinalrm_align/recipes, for the command dinalrm-align."""

from setuptools import find_namespace_packages, setup

RECIPES = "dinalrm_align.recipes"
setup(
    packages=[*find_namespace_packages(include=["dinalrm_align", "dinalrm_align.*"]), RECIPES],
    package_dir={RECIPES: "recipes"},
)
