"""The public test sets, read from disk as published: images, prompts, and raters' verdicts on pairs of images.

`open_test_set` finds the files of a name in `test_sets_config.TEST_SETS`; `data.formats` reads them. Images are not
opened here. Which image of a pair comes first is as published (in HPDv3 always the preferred one), so a scorer must not
see it: `ImageSet.order` lists single images in an order that does not depend on pairs.
"""

import functools
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinalrm_align.data.formats import read_preferences
from dinalrm_align.data.formats.record import Cell, ImageRef, Preference
from dinalrm_align.data.formats.rows import image_source, row_group_starts
from dinalrm_align.eval.test_sets_config import TEST_SETS, PublicSet
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.files import HUB_ID

HUB = "hub"  # in place of a folder: download the set from where it is published


@dataclass(frozen=True)
class Image:
    """An image and its prompt. name: as published. read: the bytes of its file, or OSError. place: rank on disk."""

    name: str
    prompt: str
    read: Callable[[], bytes]
    place: int = 0
    file: Path | None = None


@dataclass(frozen=True)
class ImageSet:
    """M images, each (prompt, name) once, and N pairs of them.

    Args:
        chosen, rejected: (N,) int, rows of `images`; first and second image as published.
        label: (N,) float32, probability that a rater prefers the first; 0.5 is a tie.
        group: (N,) int, the published record, such as a ranked list, that a pair comes from.
    """

    name: str
    images: tuple[Image, ...]
    chosen: np.ndarray
    rejected: np.ndarray
    label: np.ndarray
    group: np.ndarray

    @property
    def order(self) -> list[int]:
        """The rows of `images` in scoring order: by place, then by digests of prompt and name."""

        def key(row: int) -> tuple[int, str, str]:
            image = self.images[row]
            return image.place, text_digest(image.prompt), text_digest(image.prompt + "\0" + image.name)

        return sorted(range(len(self.images)), key=key)

    def digest(self) -> str:
        """A digest of prompts, names and verdicts, but not of the images."""
        names = "\0".join(f"{image.name}\0{image.prompt}" for image in self.images)
        columns = (self.chosen, self.rejected, self.label, self.group)
        return text_digest(names + "".join(repr(column.tolist()) for column in columns))

    def missing(self) -> list[str]:
        """Names of image files that do not exist."""
        return [image.name for image in self.images if image.file and not image.file.is_file()]


def open_test_set(name: str, where: str | Path, *, unpack_to: Path | None = None) -> ImageSet:
    """Open a test set of `TEST_SETS`, or by any other name a jsonl of (prompt, chosen, rejected[, label]).

    where: its folder or annotation file; for a public set also "hub" or a hub id, which downloads it. unpack_to: folder
    for archives from the hub. Raises FileNotFoundError, with how to get the set, for missing files; ValueError for
    files in another layout.
    """
    if name not in TEST_SETS:
        path = Path(where)
        return _image_set(name, read_preferences(path, "jsonl", strict=False), _Finder([path.parent]), path)
    entry = TEST_SETS[name]
    if str(where) == HUB or (not Path(where).exists() and HUB_ID.fullmatch(str(where))):
        where = _download(name, entry, None if str(where) == HUB else str(where), unpack_to)
    path = Path(where).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no {name} at {where}; expected a folder with {entry.files}. To get it: {entry.how}")
    files = _find_files(name, entry, path)
    finder = _Finder([files[0].parent / root for root in entry.roots], files, published=True)
    return _image_set(name, read_preferences(files, entry.layout, strict=False), finder, path)


def _find_files(name: str, entry: PublicSet, path: Path) -> list[Path]:
    """The parquet files of the set's split, or its annotation file in JSON."""
    if path.is_file():
        return [path]
    folder = path / entry.folder if (path / entry.folder).is_dir() else path
    if entry.split:
        found = {*folder.glob(f"**/{entry.split}-*.parquet"), *folder.glob(f"**/{entry.split}/*.parquet")}
        if found:
            return sorted(found)
    for candidate in (f"{entry.split or 'test'}.json", "ImageReward_test.json"):
        if (folder / candidate).is_file():
            return [folder / candidate]
    raise FileNotFoundError(f"{path} holds no {name}: expected {entry.files}. To get it: {entry.how}")


def _image_set(name: str, pairs: Iterable[Preference], finder: "_Finder", where: Path) -> ImageSet:
    rows: dict[tuple[str, str], int] = {}
    images: list[Image] = []

    def row_of(image: ImageRef, prompt: str) -> int:
        row = rows.setdefault((prompt, finder.name(image)), len(images))
        if row == len(images):
            images.append(finder.image(image, prompt))
        return row

    columns = []
    for pair in pairs:
        rows_of_pair = row_of(pair.chosen, pair.prompt), row_of(pair.rejected, pair.prompt)
        columns.append((*rows_of_pair, pair.label, pair.group))
    if not columns:
        raise ValueError(f"{where} holds no pairs with a verdict")
    chosen, rejected, label, group = (np.array(column) for column in zip(*columns, strict=True))
    return ImageSet(name, tuple(images), chosen, rejected, label.astype(np.float32), group)


class _Finder:
    """Finds the images of a test set, in the first of `roots` that holds the first one.

    files: parquet files in reading order. published: reject paths that leave the folder.
    """

    def __init__(self, roots: Sequence[Path], files: Sequence[Path] = (), *, published: bool = False) -> None:
        self.roots, self.published = roots, published
        self.order = {str(file): number for number, file in enumerate(files)}
        self.root: Path | None = None

    def name(self, image: ImageRef) -> str:
        """The name by which results refer to the image."""
        if isinstance(image, Cell):
            row = row_group_starts(image.file)[image.row_group] + image.row
            return f"{Path(image.file).name}/{row}/{image.column}"
        return image if self.published else str(Path(image))

    def image(self, image: ImageRef, prompt: str) -> Image:
        if isinstance(image, Cell):
            place = self.order[image.file] * 100_000 + image.row_group
            return Image(self.name(image), prompt, functools.partial(image_source, image, Path()), place)
        if self.published and (Path(image).is_absolute() or ".." in image.split("/")):
            raise ValueError(f"image path: got {image!r:.80}; expected one inside the set's folder")
        if self.root is None:
            self.root = next((root for root in self.roots if (root / image).is_file()), None)
        file = (self.root or self.roots[0]) / image
        return Image(self.name(image), prompt, file.read_bytes, file=file)


def _download(name: str, entry: PublicSet, repository: str | None, unpack_to: Path | None) -> Path:
    """Download a set from the hub and unpack its archives to `unpack_to`."""
    if entry.hub is None:
        raise ValueError(f"{name} cannot be used from the hub as it is; get it: {entry.how}; then pass its folder")
    from huggingface_hub import snapshot_download

    try:
        files = list(entry.hub_files)
        folder = Path(snapshot_download(repository or entry.hub, repo_type="dataset", allow_patterns=files))
    except Exception as error:  # the client raises many types without a network
        reason = str(error).strip().split("\n")[0][:200]
        raise FileNotFoundError(
            f"{name} cannot be downloaded from the hub ({type(error).__name__}: {reason}). With a network: "
            f"{entry.how}; then pass DIR in place of {repository or HUB!r}"
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
