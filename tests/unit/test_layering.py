"""The package is ten rooms; imports between them go one way. Read from the source, nothing is imported."""

import ast
from pathlib import Path

import dinalrm_align

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dinalrm_align"

ROOMS = ["train", "flow", "models", "data", "shapes", "reward", "eval", "align", "adapters", "serve"]
"""A room imports itself and the rooms before it. `dinalrm_align` itself only names its exports."""

LIGHT = ["__init__.py", "__main__.py", "models/specs.py", "reward/names.py", "train/settings.py", "train/command.py"]
"""Besides every module named config or *_config: what `--help` needs."""
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
            found += [node.module or ""] if node.module != "dinalrm_align" else [
                f"dinalrm_align.{alias.name}" for alias in node.names
            ]  # fmt: skip
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.match_case)]
    return found


def test_the_top_level_is_the_rooms():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__", "__init__.py", "__main__.py", "README.md"}
    assert entries == set(ROOMS)


def test_rooms_import_only_rooms_before_them():
    upward = []
    for path in sources(PACKAGE):
        room = path.relative_to(PACKAGE).parts[0]
        if room in ("__init__.py", "__main__.py"):
            continue
        for name in imports(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[0] == "dinalrm_align" and (len(parts) < 2 or ROOMS.index(parts[1]) > ROOMS.index(room)):
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upward, upward


def test_modules_do_not_import_each_other_in_a_circle():
    names = {
        ".".join(("dinalrm_align", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in sources(PACKAGE)
        if path != PACKAGE / "__init__.py"
    }
    graph = {
        name: {found for found in imports(ast.parse(path.read_text())) if found in names and found != name}
        for name, path in names.items()
    }
    done, visiting = set(), []

    def visit(name):
        assert name not in visiting, " -> ".join([*visiting[visiting.index(name) :], name])
        if name not in done:
            visiting.append(name)
            for imported in sorted(graph[name]):
                visit(imported)
            visiting.pop()
            done.add(name)

    for name in graph:
        visit(name)


def test_the_package_imports_no_recipe_and_recipes_not_each_other():
    recipes = {path.stem for path in sources(ROOT / "recipes")}
    for path in [*sources(PACKAGE), *sources(ROOT / "recipes")]:
        names = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
        assert not names & (recipes | {"recipes"}), path


def test_configurations_import_nothing_heavy():
    configs = [path for path in sources(PACKAGE) if path.stem == "config" or path.stem.endswith("_config")]
    for path in [*configs, *(PACKAGE / name for name in LIGHT), *sources(ROOT / "recipes")]:
        names = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), top_level_only=True)}
        assert not names & HEAVY, f"{path.relative_to(ROOT)} imports {names & HEAVY} at its top"


def test_unit_tests_start_no_process():
    """Tests that start processes are in tests/slow."""
    for path in sources(ROOT / "tests" / "unit"):
        names = {part for name in imports(ast.parse(path.read_text())) for part in name.split(".")}
        assert not names & {"subprocess", "multiprocessing"}, path.relative_to(ROOT)


def test_examples_import_public_names_only():
    """Checks examples/*.py. Scripts in examples/evidence are an intended exception: they measure internal modules."""
    for path in (ROOT / "examples").glob("*.py"):
        names = imports(ast.parse(path.read_text()))
        private = [
            name
            for name in names
            if name.startswith("dinalrm_align.")
            and not name.startswith("dinalrm_align.adapters.")  # adapters are imported by their users
            and not hasattr(dinalrm_align, name[14:])
        ]
        assert not private, f"{path.name} imports {private}"
