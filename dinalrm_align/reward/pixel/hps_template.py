"""HPSv3's instruction: MIT-licensed text in the PyPI package `hpsv3`, read from the user's copy and known by its hash.

HPSv3 was trained with one instruction to the byte, and scores mean nothing with another. It is not part of this
package: it is taken from an installed `hpsv3` (never imported, since that package wants another transformers; `pip
install --no-deps hpsv3==1.0.0` is enough), from its `hpsv3/dataset/data_collator_qwen.py`, or from a JSON file.
"""

import ast
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from dinalrm_align.train.files import read_json, read_text

INSTRUCTION_SHA256 = "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a"
"""Of the instruction, 2523 characters with one field {text_prompt}."""
SUFFIX_SHA256 = "2471faca094ae5bd6fe17b71dce20c3d7583625545e235889f7e74e7eeb69d0a"
"""Of what follows it, 67 characters with the reward token."""
SCRIPT = "data_collator_qwen.py"
"""The file of the package that holds both."""
FIELD = "{text_prompt}"
NAMES = ("INSTRUCTION", "prompt_with_special_token")
"""What the package calls the two texts."""
HOW_TO_GET = (
    "run `pip install --no-deps hpsv3==1.0.0`, or pass template=, the path of that package's "
    "hpsv3/dataset/data_collator_qwen.py or of a JSON file with these two texts"
)


@dataclass(frozen=True)
class HPSTemplate:
    """The text that is asked about a picture: `instruction` with the prompt in its {text_prompt}, then `suffix`."""

    instruction: str
    suffix: str

    def __post_init__(self) -> None:
        if self.instruction.count(FIELD) != 1:
            raise ValueError(f"HPSv3's instruction: got {self.instruction.count(FIELD)} {FIELD}; expected one")

    def fill(self, prompt: str) -> str:
        return self.instruction.replace(FIELD, prompt) + self.suffix


def load_template(
    source: str | Path | None = None, *, sha256: tuple[str, str] = (INSTRUCTION_SHA256, SUFFIX_SHA256)
) -> HPSTemplate:
    """The template in the installed `hpsv3` (None), in its data_collator_qwen.py, or in a JSON file.

    The Python file is read, not run. sha256: of instruction and suffix as UTF-8. Raises ValueError when a text is not
    the one HPSv3 was trained with, ImportError when no source is given and `hpsv3` is not installed.
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
                f"{path}: {name} is not the text that HPSv3 was trained with (SHA-256 {got:.12}..., expected "
                f"{expected:.12}...), scores would mean nothing; {HOW_TO_GET}"
            )
    return HPSTemplate(*texts)


def _installed() -> Path:
    spec = importlib.util.find_spec("hpsv3")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"HPSv3 needs its instruction, and the package hpsv3 is not installed; {HOW_TO_GET}")
    return Path(spec.submodule_search_locations[0]) / "dataset" / SCRIPT


def _assigned(source: str, path: Path) -> dict[str, str]:
    """The texts that a Python file assigns to plain names at its top."""
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
