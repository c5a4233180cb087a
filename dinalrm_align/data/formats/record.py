"""Define and validate `Preference`, the pair of images or latents that every reader yields. Torch-free."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

MAX_CHARACTERS = 10_000
"""Largest length of a prompt, as in `models.text`."""

Bad = Callable[[str, str], None]
"""Function called for each invalid record with (reason, message): the reason is a category for counts, and the message
names the record. The function may raise."""


class Cell(NamedTuple):
    """Location of an image or latent in a file. row: index in the parquet row group or in the safetensors tensor."""

    file: str
    row_group: int
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.file}, row group {self.row_group}, row {self.row}, {self.column}"


ImageRef = str | Cell
"""A path relative to the folder of images, or a location inside a file."""


@dataclass(frozen=True, slots=True)
class Row:
    """Record of preference data, not yet converted to `Preference`s. fields: content of the record.

    where: file and line or row, for error messages. number: index of the record, counted over all files.
    cell: location of the record in a parquet or safetensors file; None for JSON files.
    """

    where: str
    number: int
    fields: Any
    cell: Cell | None = None

    def image(self, column: str) -> ImageRef:
        return self.fields[column] if self.cell is None else self.cell._replace(column=column)


@dataclass(frozen=True, slots=True)
class Preference:
    """Pair of images or latents with the raters' preference.

    Args:
        label: probability that a rater prefers `chosen`; 0.5 is a tie.
        votes: numbers of votes for (chosen, rejected).
        scores: for each score name, such as "clip", the scores of (chosen, rejected).
        concept: name of the property in which the two images differ; None if unknown.
        shape: (C, h, w) of stored latents; None for images.
        group: index of the record that holds the pair. All pairs of a ranked list have the same index.
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
        """Return the pair with the preferred image as `chosen`: swapped if the label is 0, otherwise unchanged."""
        if self.label != 0:
            return self
        scores, votes = {name: pair[::-1] for name, pair in self.scores.items()}, self.votes and self.votes[::-1]
        return replace(self, chosen=self.rejected, rejected=self.chosen, label=1.0, votes=votes, scores=scores)


def check_preference(pair: Preference, *, strict: bool = True) -> Preference:
    """Return `pair`, or raise ValueError if it is invalid. strict: also refuse blank prompts and chosen == rejected."""
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


def raise_error(reason: str, message: str) -> NoReturn:
    raise ValueError(message)


def number(value: Any, name: str) -> float:
    """Return an int or float as float. Raises ValueError for a bool and for any other type."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: got {value!r:.80}; expected a number")
    return float(value)


def optional_number(value: Any, name: str) -> float | None:
    return None if value is None else number(value, name)


def two_numbers(values: Any, name: str) -> tuple[float, float] | None:
    """Convert a list of two numbers to floats, and None to None. Raises ValueError for any other value."""
    if values is None:
        return None
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise ValueError(f"{name}: got {values!r:.80}; expected two numbers")
    return number(values[0], name), number(values[1], name)
