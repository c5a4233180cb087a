"""HPSv3's instruction, read from the user's copy of the PyPI package `hpsv3` (MIT) and verified by its hash.

HPSv3 was trained with exactly this text; scores with another one are meaningless. It is read from an installed `hpsv3`
(which is not imported, since it requires another transformers; `pip install --no-deps hpsv3==1.0.0` is enough), from
its `hpsv3/dataset/data_collator_qwen.py`, or from a JSON file.
"""

import ast
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from dinalrm_align.train.files import read_json, read_text

INSTRUCTION_SHA256 = "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a"
"""Hash of the instruction, 2523 characters with one field {text_prompt}."""
SUFFIX_SHA256 = "2471faca094ae5bd6fe17b71dce20c3d7583625545e235889f7e74e7eeb69d0a"
"""Hash of the text after it, 67 characters with the reward token."""
SCRIPT = "data_collator_qwen.py"
"""The package's file with both texts."""
FIELD = "{text_prompt}"
NAMES = ("INSTRUCTION", "prompt_with_special_token")
"""The package's names of both texts."""
HOW_TO_GET = (
    "run `pip install --no-deps hpsv3==1.0.0`, or pass template=, the path of that package's "
    "hpsv3/dataset/data_collator_qwen.py or of a JSON file with these two texts"
)


@dataclass(frozen=True)
class HPSTemplate:
    """The text beside an image: `instruction` with the prompt for {text_prompt}, then `suffix`."""

    instruction: str
    suffix: str

    def __post_init__(self) -> None:
        if self.instruction.count(FIELD) != 1:
            raise ValueError(f"instruction: got {self.instruction.count(FIELD)} {FIELD}; expected one")

    def fill(self, prompt: str) -> str:
        return self.instruction.replace(FIELD, prompt) + self.suffix


def load_template(
    source: str | Path | None = None, *, sha256: tuple[str, str] = (INSTRUCTION_SHA256, SUFFIX_SHA256)
) -> HPSTemplate:
    """Read the template from data_collator_qwen.py, which is not run, or from a JSON file.

    Args:
        source: the file; default: that of the installed package `hpsv3`.
        sha256: hashes of instruction and suffix as UTF-8.

    Raises ValueError for other texts, ImportError if `hpsv3` is needed and not installed.
    """
    path = _installed() if source is None else Path(source)
    if path.suffix == ".json":
        found = read_json(path, f"HPSv3's template: {HOW_TO_GET}")
    else:
        found = _assigned(read_text(path, "template", HOW_TO_GET), path)
    texts = [found.get(name) for name in NAMES]
    for name, text, expected in zip(NAMES, texts, sha256, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{path}: no text {name}; {HOW_TO_GET}")
        got = hashlib.sha256(text.encode()).hexdigest()
        if got != expected:
            raise ValueError(
                f"{path}: {name} is not the text that HPSv3 was trained with (got SHA-256 {got:.12}...; expected "
                f"{expected:.12}...); {HOW_TO_GET}"
            )
    return HPSTemplate(*texts)


def _installed() -> Path:
    spec = importlib.util.find_spec("hpsv3")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"HPSv3 needs its instruction, and the package hpsv3 is not installed; {HOW_TO_GET}")
    return Path(spec.submodule_search_locations[0]) / "dataset" / SCRIPT


def _assigned(source: str, path: Path) -> dict[str, str]:
    """String constants that a Python file assigns at module level."""
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: not Python source ({error}); {HOW_TO_GET}") from error
    return {
        statement.targets[0].id: statement.value.value
        for statement in statements
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    }
