"""Imports go one way: leaves, then what is built of them, then recipes. Read from the source, nothing is imported."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dinalrm_align"

LAYERS: list[set[str]] = [
    {"config", "files", "durable", "seal", "metrics", "processes", "pictures"},
    {
        "digest",
        "weight_sample",
        "noise",
        "losses",
        "cost",
        "sampling",
        "sde",
        "resume",
        "device",
        "intervals",
        "figures",
        "tracking",
        "quantise",
    },
    {
        "backbones",
        "head",
        "encode",
        "policy",
        "checkpoint",
        "loop",
        "report",
        "head_to_head",
        "compare",
        "data",
    },
    {"model", "pixel", "inputs", "sharding"},
    {"reward", "preference", "models", "shapes", "benchmarks", "functions", "reward_sum", "rewards"},
    {"align"},
    {"savings"},
]
"""A module may import its own layer and those above it in this list. `dinalrm_align` itself only names its exports."""

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
LIGHT_AT_THE_TOP = ["__init__.py", "models.py", "config", "tracking.py", "pictures.py"]
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "matplotlib"}


def sources(folder):
    return sorted(folder.rglob("*.py"))


def imports(tree, *, top_level_only=False):
    """Names of imported modules; those under `if TYPE_CHECKING` and, if asked, those inside functions left out."""
    found, pending = [], list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.match_case)]
    return found


def part_of(path):
    """The first name below dinalrm_align: a module or a package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_part_has_a_layer():
    unknown = {part_of(path) for path in sources(PACKAGE)} - RANK.keys() - {"__init__"}
    assert not unknown, f"add {unknown} to LAYERS"


def test_no_part_imports_one_built_on_it():
    upward = []
    for path in sources(PACKAGE):
        if path == PACKAGE / "__init__.py":
            continue
        for name in imports(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[0] == "dinalrm_align" and len(parts) > 1 and RANK[parts[1]] > RANK[part_of(path)]:
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upward, upward


def test_the_package_knows_no_recipe_and_recipes_not_each_other():
    recipes = {path.stem for path in sources(ROOT / "recipes")}
    for path in [*sources(PACKAGE), *sources(ROOT / "recipes")]:
        names = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
        assert not names & (recipes | {"recipes"}), path


def test_what_help_needs_imports_nothing_heavy():
    light = [source for name in LIGHT_AT_THE_TOP for source in (sources(PACKAGE / name) or [PACKAGE / name])]
    for path in [*light, *sources(ROOT / "recipes")]:
        names = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), top_level_only=True)}
        assert not names & HEAVY, f"{path.relative_to(ROOT)} imports {names & HEAVY} at its top"
