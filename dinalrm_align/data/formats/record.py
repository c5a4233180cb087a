"""A preference pair, as every layout is read into, and its check. Torch-free."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

MAX_CHARACTERS = 10_000
"""Longest prompt, as in `models.text`."""

Bad = Callable[[str, str], None]
"""Called with what is wrong with a record: a reason to count it by, and a message that names it. May raise."""


class Cell(NamedTuple):
    """An image or latent inside a file; row counts within its row group (parquet), or within the file (shards)."""

    file: str
    row_group: int
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.file}, row group {self.row_group}, row {self.row}, {self.column}"


ImageRef = str | Cell
"""A path relative to the folder of images, or a cell."""


@dataclass(frozen=True, slots=True)
class Row:
    """A raw record. where: its name in messages; number: counted over all files; cell: its place in a parquet file."""

    where: str
    number: int
    fields: Any
    cell: Cell | None = None

    def image(self, column: str) -> ImageRef:
        return self.fields[column] if self.cell is None else self.cell._replace(column=column)


@dataclass(frozen=True, slots=True)
class Preference:
    """A pair of images or latents, and what raters said of it.

    Args:
        label: probability that a rater prefers `chosen`; 0.5 is a tie.
        votes: for chosen and rejected.
        scores: name -> score of chosen and rejected.
        concept: what the images differ in.
        shape: (C, h, w) of latents.
        group: number of the record; pairs of one ranked list share it.
    """

    prompt: str
    chosen: ImageRef
    rejected: ImageRef
    label: float = 1.0
    votes: tuple[float, float] | None = None
    confidence: float | None = None
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    concept: str | None = None
    shape: tuple[int, int, int] | None = None
    group: int = 0

    @property
    def is_tie(self) -> bool:
        return self.label == 0.5

    def preferred_first(self) -> "Preference":
        """The same pair with chosen and rejected exchanged where the label is 0."""
        if self.label != 0:
            return self
        scores, votes = {name: pair[::-1] for name, pair in self.scores.items()}, self.votes and self.votes[::-1]
        return replace(self, chosen=self.rejected, rejected=self.chosen, label=1.0, votes=votes, scores=scores)


def check_preference(pair: Preference, *, strict: bool = True) -> Preference:
    """The pair, if it is valid; ValueError otherwise. strict: see `read_preferences`."""
    if not isinstance(pair.prompt, str):
        raise ValueError(f"prompt: got {type(pair.prompt).__name__} {pair.prompt!r:.60}; expected text")
    if len(pair.prompt) > MAX_CHARACTERS or (strict and not pair.prompt.strip()):
        raise ValueError(f"prompt: got {len(pair.prompt)} characters; expected 1 to {MAX_CHARACTERS}")
    for name, image in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not isinstance(image, Cell) and not (isinstance(image, str) and image and "\0" not in image):
            raise ValueError(f"{name}: got {image!r:.80}; expected the path of an image")
    if not 0 <= number(pair.label, "label") <= 1:
        raise ValueError(f"label: got {pair.label}; expected a number in [0, 1]")
    if pair.votes is not None and (min(pair.votes) < 0 or sum(pair.votes) <= 0):
        raise ValueError(f"votes: got {pair.votes}; expected none negative and at least one positive")
    if not isinstance(pair.concept, str | None):
        raise ValueError(f"concept: got {pair.concept!r:.80}; expected a name")
    if strict and pair.chosen == pair.rejected:
        raise ValueError(f"chosen and rejected: got one image, {str(pair.chosen)!r:.80}; expected two")
    return pair


def refuse(reason: str, message: str) -> NoReturn:
    raise ValueError(message)


def number(value: Any, name: str) -> float:
    """The value as a float; ValueError unless it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: got {value!r:.80}; expected a number")
    return float(value)


def optional_number(value: Any, name: str) -> float | None:
    return None if value is None else number(value, name)


def two_numbers(values: Any, name: str) -> tuple[float, float] | None:
    """A list of two numbers; None stays None."""
    if values is None:
        return None
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise ValueError(f"{name}: got {values!r:.80}; expected two numbers")
    return number(values[0], name), number(values[1], name)
