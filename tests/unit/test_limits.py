"""Sizes that keep the package readable: lines of the product, of modules and of functions, and parameters."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [*sorted((ROOT / "dinalrm_align").rglob("*.py")), *sorted((ROOT / "recipes").glob("*.py"))]
PRODUCT, MODULE, FUNCTION, PARAMETERS = 30_280, 400, 80, 10


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return node.end_lineno - first + 1


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = node.args
    return len([*given.posonlyargs, *given.args, *given.kwonlyargs]) + bool(given.vararg) + bool(given.kwarg)


def test_the_product_has_a_size():
    total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES)
    print(f"product: {total} lines")
    assert total <= PRODUCT


@pytest.mark.parametrize(
    ("what", "measure", "limit"), [("lines", lines, FUNCTION), ("parameters", parameters, PARAMETERS)]
)
def test_functions_are_short(what, measure, limit):
    sizes = sorted(
        ((measure(node), f"{path.relative_to(ROOT)}: {node.name}") for path in FILES for node in functions(path)),
        reverse=True,
    )
    print(f"most {what}: {sizes[:3]}")
    assert sizes[0][0] <= limit, [entry for entry in sizes if entry[0] > limit]


def test_modules_are_short():
    sizes = sorted(((len(path.read_text(encoding="utf-8").splitlines()), str(path)) for path in FILES), reverse=True)
    print(f"longest modules: {sizes[:3]}")
    assert sizes[0][0] <= MODULE, [entry for entry in sizes if entry[0] > MODULE]


def code_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of each line of code: no blank lines, comments, docstrings or imports."""
    text = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, node.end_lineno + 1))
    numbered = enumerate((line.strip() for line in text.splitlines()), start=1)
    return [(number, line) for number, line in numbered if line and line[0] != "#" and number not in left_out]


def test_no_eight_lines_stand_twice():
    seen: dict[tuple[str, ...], str] = {}
    twice = []
    for path in FILES:
        code = code_lines(path)
        for start in range(len(code) - 7):
            window = tuple(line for _, line in code[start : start + 8])
            where = f"{path.relative_to(ROOT)}:{code[start][0]}"
            if window in seen:
                twice.append(f"{seen[window]} and {where}")
            seen[window] = where
    assert not twice, twice[:5]
