"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
FIXTURES = ROOT / "tests" / "fixtures"
RESULTS = ROOT / "examples" / "results"
