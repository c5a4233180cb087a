"""Where things lie in the repository, and recipes and scripts of evidence as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
FIXTURES = ROOT / "tests" / "fixtures"
RESULTS = ROOT / "examples" / "results"


def load_recipe(name: str) -> ModuleType:
    """Load recipes/NAME.py as a new module."""
    return _load(f"{name}_recipe", RECIPES / f"{name}.py")


def load_evidence(name: str) -> ModuleType:
    """Load examples/evidence/NAME.py as a new module."""
    return _load(name, ROOT / "examples" / "evidence" / f"{name}.py")


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
