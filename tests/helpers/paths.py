"""Where things lie in the repository, and recipes as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
FIXTURES = ROOT / "tests" / "fixtures"
RESULTS = ROOT / "examples" / "results"


def load_recipe(name: str) -> ModuleType:
    """Load recipes/NAME.py as a new module."""
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
