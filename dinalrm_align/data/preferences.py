"""Preference data as others publish it: HPDv3, HPDv2 and Pick-a-Pic v2, and a plain jsonl. Torch-free.

    hpdv3     train.json, a list of {prompt, path1 (preferred), path2, confidence, choice_dist [votes 1, votes 2], ...}
    hpdv2     train.json, a list of {prompt, file_path [2], human_preference [2], 1 marks the preferred}
    pickapic  parquet with caption, jpg_0, jpg_1 (bytes of JPEG files), label_0 (1, 0, or 0.5 for a tie), has_label
    jsonl     one {prompt, chosen, rejected} a line, paths; with label in [0, 1], or votes [chosen, rejected], or
              confidence, or scores {name: [chosen, rejected]} where there are such
    released  DiNa-LRM's parquet of latents (`data.released`): nothing is encoded again but the text

Nothing of the pictures is read here. A record that cannot be meant is refused, or left out and told of.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dinalrm_align.data.parquet import parquet_module, read_column
from dinalrm_align.data.released import is_released, listed_rows, released_files, released_rows
from dinalrm_align.train.files import parse_json, read_text, reading

MAX_CHARACTERS = 10_000
"""Of a prompt, as in `encode`."""
PICKAPIC = ("caption", "label_0", "label_1", "has_label")


class Cell(NamedTuple):
    """A picture within a parquet file."""

    file: str
    row_group: int
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.file}, row group {self.row_group}, row {self.row}, {self.column}"


Picture = str | Cell
"""A path relative to the folder of pictures, or a cell."""


@dataclass(frozen=True, slots=True)
class Preference:
    """One pair. label: probability that a rater prefers `chosen`; 0.5 is a tie. votes: for chosen and rejected. shape:
    (C, h, w) of latents that stand in the place of pictures.
    """

    prompt: str
    chosen: Picture
    rejected: Picture
    label: float = 1.0
    votes: tuple[float, float] | None = None
    confidence: float | None = None
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    shape: tuple[int, int, int] | None = None

    @property
    def is_tie(self) -> bool:
        return self.label == 0.5


Told = Callable[[str, str], None]
"""Takes what is wrong with a record: a reason (by which it is counted) and a sentence that names it. May raise."""


def find_layout(source: Path) -> str:
    """The layout of a file or folder, by its name and first record. ValueError when it is none that is known."""
    if is_released(source):
        return "released"
    if source.is_dir() or source.suffix == ".parquet":
        return "pickapic"
    if source.suffix == ".jsonl":
        return "jsonl"
    record = next(iter(_records(source)), None)
    for layout, key in (("hpdv3", "path1"), ("hpdv2", "human_preference")):
        if isinstance(record, dict) and key in record:
            return layout
    got = sorted(record)[:6] if isinstance(record, dict) else type(record).__name__
    raise ValueError(f"{source}: got records of {got}; expected those of HPDv3 (path1) or HPDv2 (human_preference)")


def read_preferences(source: Path, layout: str, bad: Told) -> Iterator[Preference]:
    """Every pair of a data set in its order. bad: told of what cannot be meant, which is then left out.

    Raises FileNotFoundError, ValueError (with the file) for a file that cannot be read at all, ImportError without
    pyarrow.
    """
    if layout in ("pickapic", "released"):
        yield from (_pickapic if layout == "pickapic" else _released)(source, bad)
        return
    convert = {"hpdv3": _hpdv3, "hpdv2": _hpdv2, "jsonl": _jsonl}[layout]
    for number, record in enumerate(_lines(source, bad) if layout == "jsonl" else _records(source)):
        if record is None:
            continue
        where = f"{source}, {'line' if layout == 'jsonl' else 'record'} {number + (layout == 'jsonl')}"
        try:
            if not isinstance(record, dict):
                raise ValueError(f"got a {type(record).__name__}; expected an object")
            yield _checked(convert(record))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            bad("record that cannot be meant", f"{where}: {reason}")


def picture_source(picture: Picture, images: Path) -> Path | bytes:
    """What `images.open_image` opens. ValueError for a cell that holds no picture, or whose file is broken."""
    if not isinstance(picture, Cell):
        return images / picture
    data = read_column(picture.file, picture.row_group, picture.column)[picture.row]
    if not isinstance(data, bytes):
        raise ValueError(f"{picture}: got {type(data).__name__}; expected the bytes of a picture")
    return data


def _hpdv3(record: dict[str, Any]) -> Preference:
    votes = record.get("choice_dist")
    confidence = record.get("confidence")
    return Preference(
        record["prompt"], record["path1"], record["path2"], votes=None if votes is None else _two(votes, "choice_dist"),
        confidence=None if confidence is None else float(confidence),
    )  # fmt: skip


def _hpdv2(record: dict[str, Any]) -> Preference:
    paths, preferred = record["file_path"], _two(record["human_preference"], "human_preference")
    if len(paths) != 2 or sorted(preferred) not in ([0, 1], [0.5, 0.5]):
        raise ValueError(f"got {len(paths)} paths and preferences {preferred}; expected two, of which one is preferred")
    first = 0 if preferred[0] >= preferred[1] else 1
    return Preference(record["prompt"], paths[first], paths[1 - first], label=preferred[first])


def _jsonl(record: dict[str, Any]) -> Preference:
    votes, confidence = record.get("votes"), record.get("confidence")
    return Preference(
        record["prompt"], record["chosen"], record["rejected"], label=float(record.get("label", 1.0)),
        votes=None if votes is None else _two(votes, "votes"),
        confidence=None if confidence is None else float(confidence),
        scores={name: _two(values, f"scores.{name}") for name, values in record.get("scores", {}).items()},
    )  # fmt: skip


def _pickapic(source: Path, bad: Told) -> Iterator[Preference]:
    parquet = parquet_module()
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise FileNotFoundError(f"{source} holds no parquet files; expected those of Pick-a-Pic")
    for path in files:
        try:
            with reading("parquet file", path):
                file = parquet.ParquetFile(path)
                missing = sorted({*PICKAPIC, "jpg_0", "jpg_1"} - set(file.schema_arrow.names))
                if missing:
                    raise ValueError(f"it lacks the columns {', '.join(missing)}")
        except (OSError, ValueError) as error:
            bad("file that cannot be read", str(error))
            continue
        for group in range(file.num_row_groups):
            with reading("parquet file", path):
                records = file.read_row_group(group, columns=list(PICKAPIC)).to_pylist()
            for row, record in enumerate(records):
                if not record["has_label"]:
                    continue
                try:
                    labels = _two((record["label_0"], record["label_1"]), "label_0, label_1")
                    if sorted(labels) not in ([0, 1], [0.5, 0.5]):
                        raise ValueError(f"got labels {labels}; expected 1 and 0, or 0.5 twice")
                    first = 0 if labels[0] >= labels[1] else 1
                    cells = [Cell(str(path), group, row, f"jpg_{index}") for index in (first, 1 - first)]
                    yield _checked(Preference(record["caption"], *cells, label=labels[first]))
                except (TypeError, ValueError) as error:
                    bad("record that cannot be meant", f"{path}, row group {group}, row {row}: {error}")


def _released(source: Path, bad: Told) -> Iterator[Preference]:
    listed = listed_rows(source)
    for file in released_files(source):
        try:
            for row in released_rows(file):
                if isinstance(row, str):
                    bad("record that cannot be meant", row)
                elif listed is None or (file.name, row.row_group, row.row) in listed:
                    cells = [Cell(str(file), row.row_group, row.row, f"latent{index}") for index in (1, 2)]
                    yield Preference(row.prompt, *cells, votes=row.votes, confidence=row.confidence, shape=row.shape)
        except (OSError, ValueError) as error:
            bad("file that cannot be read", str(error))


def _checked(pair: Preference) -> Preference:
    if not isinstance(pair.prompt, str) or not pair.prompt.strip() or len(pair.prompt) > MAX_CHARACTERS:
        got = f"{len(pair.prompt)} characters" if isinstance(pair.prompt, str) else type(pair.prompt).__name__
        raise ValueError(f"prompt: got {got}; expected text of 1 to {MAX_CHARACTERS} characters")
    for name, picture in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not isinstance(picture, Cell) and not (isinstance(picture, str) and picture and "\0" not in picture):
            raise ValueError(f"{name}: got {picture!r:.80}; expected a path")
    if pair.chosen == pair.rejected:
        raise ValueError(f"chosen and rejected are one picture, {str(pair.chosen)!r:.80}")
    if not 0 <= pair.label <= 1:
        raise ValueError(f"label: got {pair.label}; expected a number in [0, 1]")
    if pair.votes is not None and (min(pair.votes) < 0 or sum(pair.votes) <= 0):
        raise ValueError(f"votes: got {pair.votes}; expected at least one, none negative")
    return pair


def _two(values: Any, name: str) -> tuple[float, float]:
    fits = isinstance(values, list | tuple) and len(values) == 2
    if not fits or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise ValueError(f"{name}: got {values!r:.80}; expected two numbers")
    return float(values[0]), float(values[1])


def _records(path: Path) -> list[Any]:
    records = parse_json(read_text(path, "file of preferences"), str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path}: got a JSON {type(records).__name__}; expected a list of records")
    return records


def _lines(path: Path, bad: Told) -> Iterator[Any]:
    """The value of every line, None for a blank one and for one that is no JSON."""
    for number, line in enumerate(read_text(path, "file of preferences").split("\n"), start=1):
        if not line.strip():
            yield None
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            bad("record that cannot be meant", f"{path}, line {number}: not valid JSON ({error})")
            yield None
