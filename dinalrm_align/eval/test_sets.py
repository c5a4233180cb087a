"""The public test sets as they are published, read from disk: pictures, prompts, and what raters said of pairs of them.

`open_test_set` finds the files of a name of `config.test_sets.TEST_SETS`. Pictures are not opened here. Which of a pair
stands first is as published (in HPDv3 always the preferred one), so nothing that judges may see it: `PictureSet.order`
gives pictures one by one, in an order that knows nothing of pairs.
"""

import itertools
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinalrm_align.data.image_pairs import read_jsonl
from dinalrm_align.eval.test_sets_config import TEST_SETS, PublicSet
from dinalrm_align.models.text import check_prompts
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.files import HUB_ID, parse_json, read_text
from dinalrm_align.train.settings import check_number

HUB = "hub"
"""Instead of a folder: download the set from where it is published."""


@dataclass(frozen=True)
class Picture:
    """A picture and its prompt. name: as published. read: its file's bytes; OSError when there is none. place: of the
    bytes among others, for reading in order.
    """

    name: str
    prompt: str
    read: Callable[[], bytes]
    place: int = 0


@dataclass(frozen=True)
class PictureSet:
    """M pictures and N pairs of them. chosen, rejected (N,): rows of pictures, as published, first and second. label
    (N,): the probability that a rater prefers the first; 0.5 is a tie. group (N,): the list that a pair is of.
    """

    name: str
    pictures: tuple[Picture, ...]
    chosen: np.ndarray
    rejected: np.ndarray
    label: np.ndarray
    group: np.ndarray

    @property
    def order(self) -> list[int]:
        """Rows of pictures as they are to be judged: by place, then by digests of prompt and name."""

        def key(row: int) -> tuple[int, str, str]:
            picture = self.pictures[row]
            return picture.place, text_digest(picture.prompt), text_digest(picture.prompt + "\0" + picture.name)

        return sorted(range(len(self.pictures)), key=key)

    def digest(self) -> str:
        """Of prompts, names and verdicts; not of the pictures."""
        names = "\0".join(f"{picture.name}\0{picture.prompt}" for picture in self.pictures)
        columns = (self.chosen, self.rejected, self.label, self.group)
        return text_digest(names + "".join(repr(column.tolist()) for column in columns))

    def missing(self) -> list[str]:
        """Names of the pictures without a file, for those that are files."""
        return [picture.name for picture in self.pictures if isinstance(picture.read, File) and not picture.read.found]


@dataclass(frozen=True)
class File:
    """The bytes of a file."""

    path: Path

    def __call__(self) -> bytes:
        if not self.found:
            raise FileNotFoundError(f"no file {self.path}")
        return self.path.read_bytes()

    @property
    def found(self) -> bool:
        return self.path.is_file()


class _Builder:
    """Collects pictures, each prompt and name once, and pairs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: dict[tuple[str, str], int] = {}
        self.pictures: list[Picture] = []
        self.pairs: list[tuple[int, int, float, int]] = []

    def picture(self, name: str, prompt: str, read: Callable[[], bytes], place: int = 0) -> int:
        row = self.rows.setdefault((prompt, name), len(self.pictures))
        if row == len(self.pictures):
            self.pictures.append(Picture(name, prompt, read, place))
        return row

    def build(self, where: object) -> PictureSet:
        if not self.pairs:
            raise ValueError(f"{where} holds no pairs that a rater judged")
        chosen, rejected, label, group = (np.array(column) for column in zip(*self.pairs, strict=True))
        return PictureSet(self.name, tuple(self.pictures), chosen, rejected, label.astype(np.float32), group)


def open_test_set(name: str, where: str | Path, *, unpack_to: Path | None = None) -> PictureSet:
    """The test set of that name in the folder `where` (or its annotation file); "hub" or a hub id downloads it.

    A name that is not in `TEST_SETS`: a jsonl of (prompt, chosen, rejected[, label]), as `data.image_pairs` reads it.
    unpack_to: for archives from the hub. FileNotFoundError, with how to get it, when the files are not there;
    ValueError for what is not in the published layout.
    """
    if name not in TEST_SETS:
        return _read_own(name, Path(where))
    entry = TEST_SETS[name]
    if str(where) == HUB or (not Path(where).exists() and HUB_ID.fullmatch(str(where))):
        where = _download(name, entry, None if str(where) == HUB else str(where), unpack_to)
    path = Path(where).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no {name} at {where}; expected a folder with {entry.files}. To get it: {entry.how}")
    return READERS[entry.layout](name, entry, path)


def _read_rankings(name: str, entry: PublicSet, path: Path) -> PictureSet:
    """ImageReward (generations, ranking) and HPDv2 (image_path, rank): lists of pictures, 1 is best, ties allowed."""
    file, records = _annotations(name, entry, path)
    built, find = _Builder(name), _Finder(file.parent, entry.roots)
    for number, record in enumerate(records):
        where = f"{file}, entry {number}"
        names = _field(record, ("generations", "image_path"), where)
        ranks = _field(record, ("ranking", "rank"), where)
        prompt = _prompt(record, "prompt", where)
        if not isinstance(names, list) or not isinstance(ranks, list) or len(names) != len(ranks) or len(names) < 2:
            raise ValueError(f"{where}: got pictures {names!r:.60}, ranks {ranks!r:.60}; expected lists of one length")
        for rank in ranks:
            check_number(f"{where}: rank", rank)
        rows = [built.picture(_path(each, where), prompt, find(each)) for each in names]
        for i, j in itertools.combinations(range(len(rows)), 2):
            built.pairs.append((rows[i], rows[j], 0.5 + 0.5 * np.sign(ranks[j] - ranks[i]), number))
    return built.build(file)


def _read_pairs(name: str, entry: PublicSet, path: Path) -> PictureSet:
    """HPDv3: path1 is preferred to path2."""
    file, records = _annotations(name, entry, path)
    built, find = _Builder(name), _Finder(file.parent, entry.roots)
    for number, record in enumerate(records):
        where = f"{file}, entry {number}"
        prompt = _prompt(record, "prompt", where)
        paths = [_path(_field(record, (key,), where), where) for key in ("path1", "path2")]
        built.pairs.append((*(built.picture(each, prompt, find(each)) for each in paths), 1.0, number))
    return built.build(file)


VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}


def _read_votes(name: str, entry: PublicSet, path: Path) -> PictureSet:
    """GenAI-Bench: left_image, right_image, vote_type; both bad counts as a tie."""
    folder = path / "image_generation" if (path / "image_generation").is_dir() else path  # other tasks have such splits
    built = _Builder(name)
    for number, where, row in _rows(name, entry, folder, ("prompt", "vote_type"), ("left_image", "right_image")):
        vote = row["vote_type"]
        if vote not in VOTES:
            raise ValueError(f"{where}: vote_type: got {vote!r:.40}; known: {', '.join(VOTES)}")
        _add_row(built, row, _prompt(row, "prompt", where), ("left_image", "right_image"), VOTES[vote], number)
    return built.build(folder)


def _read_pickapic(name: str, entry: PublicSet, path: Path) -> PictureSet:
    """Pick-a-Pic: jpg_0, jpg_1, label_0 (0, 1, or 0.5 for a tie), rows with a label alone."""
    built = _Builder(name)
    for number, where, row in _rows(name, entry, path, ("caption", "label_0", "has_label"), ("jpg_0", "jpg_1")):
        if not row["has_label"]:
            continue
        check_number(f"{where}: label_0", row["label_0"], low=0, high=1)
        prompt = _prompt(row, "caption", where)
        _add_row(built, row, prompt, ("jpg_0", "jpg_1"), float(row["label_0"]), number)
    return built.build(path)


READERS: Mapping[str, Callable[[str, PublicSet, Path], PictureSet]] = {
    "rankings": _read_rankings,
    "pairs": _read_pairs,
    "votes": _read_votes,
    "pickapic": _read_pickapic,
}


def _read_own(name: str, path: Path) -> PictureSet:
    """A jsonl of the user's own pairs."""
    built = _Builder(name)
    for number, record in enumerate(read_jsonl(path)):
        rows = [
            built.picture(str(file.relative_to(path.parent)), record["prompt"], File(file))
            for file in (record["chosen"], record["rejected"])
        ]
        built.pairs.append((*rows, record["label"], number))
    return built.build(path)


class _Finder:
    """Where pictures lie: in the first root that holds the first of them, else the first root."""

    def __init__(self, folder: Path, roots: Sequence[str]) -> None:
        self.candidates = [folder / root for root in roots]
        self.root: Path | None = None

    def __call__(self, name: str) -> File:
        if self.root is None:
            self.root = next((root for root in self.candidates if (root / name).is_file()), None)
        return File((self.root or self.candidates[0]) / name)


def _annotations(name: str, entry: PublicSet, path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The annotation file and its entries."""
    names = [f"{entry.split or 'test'}.json", "ImageReward_test.json"]
    found = [path] if path.is_file() else [path / each for each in names if (path / each).is_file()]
    if not found:
        raise FileNotFoundError(f"{path} holds no {name}: expected {entry.files}. To get it: {entry.how}")
    records = parse_json(read_text(found[0], f"annotations of {name}"), str(found[0]))
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{found[0]}: got {type(records).__name__}; expected a list of objects: {entry.files}")
    return found[0], records


def _rows(
    name: str, entry: PublicSet, path: Path, columns: Sequence[str], pictures: Sequence[str]
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, where, {column: value, picture: (name, read, place)}) from parquet files, or an exported JSON file."""
    files = [path] if path.is_file() else sorted(
        {*path.glob(f"**/{entry.split}-*.parquet"), *path.glob(f"**/{entry.split}/*.parquet")}
    )  # fmt: skip
    if not files or files[0].suffix != ".parquet":
        file, records = _annotations(name, entry, path)
        for number, record in enumerate(records):
            where = f"{file}, entry {number}"
            row = {column: _field(record, (column,), where) for column in columns}
            for key in pictures:
                each = _path(_field(record, (key,), where), where)
                row[key] = (each, File(file.parent / each), 0)
            yield number, where, row
        return
    from dinalrm_align.eval.parquet_pictures import ParquetPictures

    number = 0
    for index, file in enumerate(files):
        source = ParquetPictures(file, columns, pictures)
        for row in source.rows():
            where = f"{file}, row {row['row']}"
            for key in pictures:
                place = index * 100_000 + row["row_group"]
                row[key] = (f"{file.name}/{row['row']}/{key}", source.reader(row["row"], key), place)
            yield number, where, row
            number += 1


def _add_row(
    built: _Builder, row: Mapping[str, Any], prompt: str, keys: Sequence[str], label: float, number: int
) -> None:
    rows = []
    for key in keys:
        name, read, place = row[key]
        rows.append(built.picture(name, prompt, read, place))
    built.pairs.append((*rows, label, number))


def _field(record: Mapping[str, Any], keys: Sequence[str], where: str) -> Any:
    """The value of the first of `keys` that is there."""
    for key in keys:
        if key in record:
            return record[key]
    raise ValueError(f"{where}: got the fields {', '.join(record)}; expected {' or '.join(keys)}")


def _prompt(record: Mapping[str, Any], key: str, where: str) -> str:
    prompt = _field(record, (key,), where)
    try:
        return check_prompts([prompt])[0]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _path(value: Any, where: str) -> str:
    """A path inside the set's folder."""
    if (
        not isinstance(value, str)
        or not value
        or "\0" in value
        or Path(value).is_absolute()
        or ".." in value.split("/")
    ):
        raise ValueError(f"{where}: got the picture path {value!r:.80}; expected one inside the set's folder")
    return value


def _download(name: str, entry: PublicSet, repository: str | None, unpack_to: Path | None) -> Path:
    """The folder of a set from the hub, archives unpacked to `unpack_to`."""
    if entry.hub is None:
        raise ValueError(f"{name} cannot be taken from the hub as it is; get it: {entry.how}; then name its folder")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(repository or entry.hub, repo_type="dataset", allow_patterns=list(entry.hub_files))
        )
    except Exception as error:  # the hub's client fails in many ways without a network
        reason = str(error).strip().split("\n")[0][:200]
        raise FileNotFoundError(
            f"{name} cannot be had from the hub ({type(error).__name__}: {reason}). Where there is a network: "
            f"{entry.how}; then name DIR in place of {repository or HUB!r}"
        ) from error
    archives = sorted(folder.glob("*.tar.gz"))
    if not archives:
        return folder
    target = (unpack_to or folder) / name
    for archive in archives:
        done = target / f".{archive.name}.unpacked"
        if not done.exists():
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter="data")
            done.touch()
    for file in folder.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    return target
