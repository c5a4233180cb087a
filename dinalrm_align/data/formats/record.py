"""Define and validate `Preference`, the pair of images or latents that every reader yields. Torch-free."""

import collections
import numbers
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

from dinalrm_align.models.prompt import INVALID_CHARACTER, check_prompt
from dinalrm_align.train.files import InputError

INVALID = "invalid record"
"""Reason, in `Dropped.counts`, of a record that does not pass `check_preference`."""
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
    """Pair of images or latents with the raters' preference. Raises ValueError if invalid, see `check_preference`.

    Args:
        prompt: caption of both images.
        label: probability that a rater prefers `chosen`; 0.5 is a tie.
        votes: numbers of votes for (chosen, rejected).
        scores: for each score name, such as "clip", the scores of (chosen, rejected).
        concept: name of the property in which the two images differ; None if unknown.
        shape: (C, h, w) of stored latents; None for images.
        group: index of the record that holds the pair. All pairs of a ranked list have the same index.
        encoded: whether text embeddings are stored with the pair. Only then may `prompt` be "", if it is unknown.
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
    encoded: bool = False

    def __post_init__(self) -> None:
        check_preference(self, strict=False)

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
    """Return `pair`, or raise ValueError if it is invalid. The message names the field.

    The prompt must be text that a tokenizer accepts, and not blank. The label is in [0, 1]. Votes are not negative and
    not all zero. All numbers are finite. strict: also refuse a pair of an image with itself, which test sets may hold.
    Every `Preference` is checked when it is created, with strict=False.
    """
    if not isinstance(pair.prompt, str):
        raise InputError(f"prompt: got {type(pair.prompt).__name__} {pair.prompt!r:.60}; expected text")
    check_prompt("prompt", pair.prompt)
    if not pair.prompt.strip() and not (pair.encoded and pair.prompt == ""):
        raise InputError(f"prompt: got {pair.prompt!r:.60}, a blank one; expected text")
    for name, image in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not isinstance(image, Cell) and not is_path(image):
            raise InputError(f"{name}: got {image!r:.80}; expected the path of an image")
    if strict and pair.chosen == pair.rejected:
        raise InputError(f"chosen and rejected: got one image, {str(pair.chosen)!r:.80}; expected two")
    if not 0 <= number(pair.label, "label") <= 1:
        raise InputError(f"label: got {pair.label}; expected a number in [0, 1]")
    votes = two_numbers(pair.votes, "votes")
    if votes is not None and (min(votes) < 0 or not 0 < sum(votes) <= sys.float_info.max):
        raise InputError(f"votes: got {pair.votes}; expected none negative, at least one positive and a finite sum")
    optional_number(pair.confidence, "confidence")
    for name, scores in pair.scores.items():
        if two_numbers(scores, f"scores.{name}") is None:
            raise InputError(f"scores.{name}: got {scores}; expected two numbers")
    if pair.concept is not None and (not isinstance(pair.concept, str) or INVALID_CHARACTER.search(pair.concept)):
        raise InputError(f"concept: got {pair.concept!r:.80}; expected a name")
    return pair


def is_path(image: Any) -> bool:
    """Return whether `image` is text that a file system takes as a path: each name has at most 255 bytes."""
    if not isinstance(image, str) or not image or INVALID_CHARACTER.search(image):
        return False
    return max(map(len, image.encode().split(b"/"))) <= 255


def raise_error(reason: str, message: str) -> NoReturn:
    raise InputError(message)


class Dropped:
    """Records and pairs that were left out, by reason, with an error message for each invalid one.

    on_bad: what to do about an invalid record or an unreadable file. "refuse" raises; "skip" leaves it out.
    """

    def __init__(self, on_bad: str) -> None:
        self.on_bad = on_bad
        self.counts: collections.Counter[str] = collections.Counter()
        self.messages: dict[str, list[str]] = {}

    @property
    def named(self) -> dict[str, list[str]]:
        """Up to five error messages for each reason."""
        return {reason: messages[:5] for reason, messages in self.messages.items()}

    def drop(self, reason: str, message: str | None = None, pairs: int = 1) -> None:
        """Add `pairs` to the number of pairs that were left out for `reason`."""
        self.counts[reason] += pairs
        self.messages.setdefault(reason, []).extend([] if message is None else [message])

    def __str__(self) -> str:
        lines = [f"{count} pairs: {reason}" for reason, count in self.counts.most_common()]
        lines += [f"  {message}" for named in self.named.values() for message in named]
        return "\n".join(lines) or "no pair was left out"

    def bad(self, reason: str, message: str, pairs: int = 1) -> None:
        """Raise ValueError if on_bad is "refuse". Otherwise count `pairs` more pairs as left out for `reason`."""
        if self.on_bad == "refuse":
            raise InputError(f"{message}. To leave out such pairs and have them counted: --on_bad skip")
        self.drop(reason, message, pairs)


def number(value: Any, name: str) -> float:
    """Return a finite real number, also of NumPy, as float. Raises ValueError for any other value or a bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"{name}: got {value!r:.80}; expected a number")
    if not abs(value) <= sys.float_info.max:  # NaN, infinity, or an int too large for a float
        raise InputError(
            f"{name}: got {value if isinstance(value, float) else 'a huge integer'}; expected a finite number"
        )
    return float(value)


def optional_number(value: Any, name: str) -> float | None:
    return None if value is None else number(value, name)


def two_numbers(values: Any, name: str) -> tuple[float, float] | None:
    """Convert a list of two numbers to floats, and None to None. Raises ValueError for any other value."""
    if values is None:
        return None
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise InputError(f"{name}: got {values!r:.80}; expected two numbers")
    return number(values[0], name), number(values[1], name)


def named_scores(values: Any) -> dict[str, tuple[float, float]]:
    """Convert {name: [chosen, rejected]} to floats. None, also as the value of a name, means that there is no score."""
    if not isinstance(values, dict | None):
        raise InputError(f"scores: got {values!r:.80}; expected {{name: [score of chosen, score of rejected]}}")
    found = {name: two_numbers(pair, f"scores.{name}") for name, pair in (values or {}).items()}
    return {name: pair for name, pair in found.items() if pair is not None}


def two_images(values: Any, name: str) -> list[Any]:
    """Return a list of two images. Raises ValueError for any other value."""
    if not isinstance(values, list) or len(values) != 2:
        got = f"{len(values)} images" if isinstance(values, list) else f"{values!r:.80}"
        raise InputError(f"{name}: got {got}; expected a list of 2 images")
    return values
